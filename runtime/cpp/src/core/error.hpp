// What goes wrong, as one sentence each; nothing else crosses the C boundary.
#pragma once

#include <sstream>
#include <stdexcept>
#include <string>

namespace vlmtrim {

// A folder that is no bundle, or one that is damaged; the message names the file.
class BundleError : public std::runtime_error {
  using std::runtime_error::runtime_error;
};

// Something that was asked for and cannot be done; the message says what is allowed.
class Refusal : public std::runtime_error {
  using std::runtime_error::runtime_error;
};

// The parts, printed one after the other.
template <class... Parts>
std::string said(const Parts&... parts) {
  std::ostringstream out;
  (out << ... << parts);
  return out.str();
}

}  // namespace vlmtrim
