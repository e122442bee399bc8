#include "core/reading.hpp"

#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cerrno>
#include <cmath>
#include <cstring>

#include "core/error.hpp"

namespace vlmtrim {
namespace {

constexpr int kDeepestJson = 64;  // brackets inside brackets; the files of a bundle need 8
constexpr size_t kLongestShown = 60;

const char* kind(const Json& value) {
  if (value.is_object()) return "an object";
  if (value.is_array()) return "a list";
  if (value.is_string()) return "a text";
  if (value.is_boolean()) return "true or false";
  return value.is_null() ? "null" : "a number";
}

int depth_of(std::string_view text) {
  int depth = 0, deepest = 0;
  bool inside = false;
  for (size_t at = 0; at < text.size(); ++at) {
    const char c = text[at];
    if (inside) {
      if (c == '\\') ++at;
      if (c == '"') inside = false;
      continue;
    }
    if (c == '"') inside = true;
    if (c == '[' || c == '{') deepest = std::max(deepest, ++depth);
    if (c == ']' || c == '}') --depth;
  }
  return deepest;
}

}  // namespace

Folder::Folder(std::filesystem::path path, std::optional<std::set<std::string>> names)
    : path_(std::move(path)), names_(std::move(names)) {}

bool Folder::contains(const std::string& name) const {
  if (!is_plain_name(name)) return false;
  struct stat found{};
  return names_ ? names_->count(name) > 0 : lstat((path_ / name).c_str(), &found) == 0;
}

std::filesystem::path Folder::file(const std::string& name) const {
  close(open(name));
  return path_ / name;
}

std::string Folder::bytes(const std::string& name, size_t limit) const {
  const int descriptor = open(name);
  struct stat found{};
  const bool known = fstat(descriptor, &found) == 0;
  std::string data(known ? std::min(static_cast<size_t>(found.st_size), limit) + 1 : limit + 1, '\0');
  size_t filled = 0;
  ssize_t count = 0;
  while (filled < data.size() && (count = read(descriptor, data.data() + filled, data.size() - filled)) > 0) {
    filled += static_cast<size_t>(count);
  }
  close(descriptor);
  if (count < 0) throw BundleError(said((path_ / name).string(), " cannot be read (", std::strerror(errno), ")"));
  if (filled > limit) {
    throw BundleError(
        said((path_ / name).string(), " has more than ", limit, " bytes, the most that this file may have"));
  }
  data.resize(filled);
  return data;
}

std::string Folder::text(const std::string& name, size_t limit) const {
  std::string data = bytes(name, limit);
  if (const auto bad = first_bad_utf8(data)) {
    throw BundleError(said((path_ / name).string(), " is no UTF-8 text (byte ", *bad, ")"));
  }
  return data;
}

Json Folder::json(const std::string& name, size_t limit) const {
  return json_object(text(name, limit), (path_ / name).string());
}

int Folder::open(const std::string& name) const {
  if (!is_plain_name(name)) {
    throw BundleError(
        said(path_.string(), ": ", shown(name), " is no plain file name; files lie in the bundle's own folder"));
  }
  const auto path = path_ / name;
  if (names_ && names_->count(name) == 0) {
    throw BundleError(said(path.string(), " is not listed in the bundle's checksums, so it is not used"));
  }
  // Without following a link, and without waiting for the other end of a FIFO.
  const int descriptor = ::open(path.c_str(), O_RDONLY | O_NOFOLLOW | O_NONBLOCK | O_CLOEXEC);
  if (descriptor < 0) {
    const int reason = errno;
    if (reason == ELOOP) throw BundleError(said(path.string(), " is a link; a bundle holds its files itself"));
    throw BundleError(said(path.string(), " cannot be read (", std::strerror(reason), ")"));
  }
  struct stat found{};
  if (fstat(descriptor, &found) != 0 || !S_ISREG(found.st_mode)) {
    close(descriptor);
    throw BundleError(said(path.string(), " is no regular file"));
  }
  return descriptor;
}

bool is_plain_name(const std::string& name) {
  if (name.empty() || name.size() > 255 || name == "." || name == "..") return false;
  for (const char c : name) {
    if (c == '/' || c == '\\' || static_cast<unsigned char>(c) < 32) return false;
  }
  return true;
}

Json json_object(std::string_view text, const std::string& where) {
  if (const int deepest = depth_of(text); deepest > kDeepestJson) {
    throw BundleError(said(where, " nests ", deepest, " deep; the limit is ", kDeepestJson));
  }
  Json found;
  try {
    found = Json::parse(text.begin(), text.end());
  } catch (const Json::parse_error& error) {  // its own words quote the bytes, which may be no text
    throw BundleError(said(where, " is no valid JSON (byte ", error.byte, ")"));
  } catch (const Json::exception&) {
    throw BundleError(said(where, " is no valid JSON: a number is too large"));
  }
  if (!found.is_object()) throw BundleError(said(where, " holds ", kind(found), "; expected an object"));
  return found;
}

int64_t integer(const Json& value, const std::string& where, int64_t low, int64_t high) {
  const bool fits = value.is_number_integer() &&
                    !(value.is_number_unsigned() && value.get<uint64_t>() > static_cast<uint64_t>(INT64_MAX)) &&
                    value.get<int64_t>() >= low && value.get<int64_t>() <= high;
  if (!fits) throw BundleError(said(where, " is ", shown(value), "; expected an integer from ", low, " to ", high));
  return value.get<int64_t>();
}

double number(const Json& value, const std::string& where, double low, double high) {
  const bool fits = value.is_number() && value.get<double>() >= low && value.get<double>() <= high &&
                    std::isfinite(value.get<double>());
  if (!fits) throw BundleError(said(where, " is ", shown(value), "; expected a number from ", low, " to ", high));
  return value.get<double>();
}

bool boolean(const Json& value, const std::string& where) {
  if (!value.is_boolean()) throw BundleError(said(where, " is ", shown(value), "; expected true or false"));
  return value.get<bool>();
}

std::string text_value(const Json& value, const std::string& where, size_t most) {
  if (!value.is_string() || value.get_ref<const std::string&>().size() > 4 * most) {
    throw BundleError(said(where, " is ", shown(value), "; expected a text of at most ", most, " characters"));
  }
  return value.get<std::string>();
}

std::string shown(const Json& value) {
  if (value.is_structured()) return kind(value);
  std::string text = value.dump(-1, ' ', true, Json::error_handler_t::replace);
  return text.size() <= kLongestShown ? text : text.substr(0, kLongestShown) + "...";
}

std::optional<size_t> first_bad_utf8(std::string_view text) {
  for (size_t at = 0; at < text.size();) {
    const auto lead = static_cast<unsigned char>(text[at]);
    size_t more = 0;
    uint32_t code = 0, least = 0;
    if (lead < 0x80) {
      ++at;
      continue;
    }
    if (lead >= 0xC2 && lead < 0xE0) more = 1, code = lead & 0x1F, least = 0x80;
    else if (lead >= 0xE0 && lead < 0xF0) more = 2, code = lead & 0x0F, least = 0x800;
    else if (lead >= 0xF0 && lead < 0xF5) more = 3, code = lead & 0x07, least = 0x10000;
    else return at;
    if (at + more >= text.size()) return at;
    for (size_t i = 1; i <= more; ++i) {
      const auto byte = static_cast<unsigned char>(text[at + i]);
      if ((byte & 0xC0) != 0x80) return at;
      code = code << 6 | (byte & 0x3Fu);
    }
    if (code < least || code > 0x10FFFF || (code >= 0xD800 && code < 0xE000)) return at;
    at += more + 1;
  }
  return std::nullopt;
}

}  // namespace vlmtrim
