// Command lines of the tools: --name VALUE and --name=VALUE, flags, and plain arguments.
#pragma once

#include <cstdlib>
#include <iostream>
#include <map>
#include <optional>
#include <set>
#include <string>
#include <vector>

namespace tools {

// What is wrong with a command line.
struct BadArguments {
  std::string message;
};

class Arguments {
 public:
  Arguments(int count, char** values, const std::set<std::string>& options, const std::set<std::string>& flags) {
    for (int i = 1; i < count; ++i) {
      const std::string word = values[i];
      if (word.rfind("--", 0) != 0) {
        plain.push_back(word);
        continue;
      }
      const size_t equals = word.find('=');
      const std::string name = word.substr(0, equals);
      if (flags.count(name) > 0 && equals == std::string::npos) {
        flags_.insert(name);
      } else if (options.count(name) > 0 && equals != std::string::npos) {
        values_[name].push_back(word.substr(equals + 1));
      } else if (options.count(name) > 0) {
        if (i + 1 == count) throw BadArguments{name + " is without a value"};
        values_[name].push_back(values[++i]);
      } else {
        throw BadArguments{"unknown option " + name + "; see --help"};
      }
    }
  }

  bool flag(const std::string& name) const { return flags_.count(name) > 0; }
  std::vector<std::string> all(const std::string& name) const {
    const auto found = values_.find(name);
    return found == values_.end() ? std::vector<std::string>{} : found->second;
  }
  std::optional<std::string> last(const std::string& name) const {
    const auto found = all(name);
    return found.empty() ? std::nullopt : std::make_optional(found.back());
  }
  // A number from `least` on.
  template <class T>
  T number(const std::string& name, T fallback, double least) const {
    const auto text = last(name);
    if (!text) return fallback;
    char* end = nullptr;
    const double value = std::strtod(text->c_str(), &end);
    if (text->empty() || *end != 0 || !(value >= least) || static_cast<double>(static_cast<T>(value)) != value) {
      throw BadArguments{name + " is " + *text + "; give a number of " + std::to_string(static_cast<long>(least)) +
                         " or more"};
    }
    return static_cast<T>(value);
  }

  std::vector<std::string> plain;

 private:
  std::map<std::string, std::vector<std::string>> values_;
  std::set<std::string> flags_;
};

}  // namespace tools
