// Reads JSON objects field by field, lists and maps of them; every one of these throws BundleError naming the place.
// Mirrors graphs/schema.py.
#pragma once

#include <functional>
#include <map>
#include <set>
#include <string>
#include <vector>

#include "core/error.hpp"
#include "core/reading.hpp"

namespace vlmtrim {

// The fields of a JSON object: each is taken once, and none may be left.
class Fields {
 public:
  Fields(const Json& value, const std::string& where, bool top = false) : value_(value), where_(where), top_(top) {
    if (!value.is_object()) throw BundleError(said(where, " is ", shown(value), "; expected an object"));
  }

  const Json& need(const char* name) {
    taken_.insert(name);
    const auto found = value_.find(name);
    if (found == value_.end()) throw BundleError(said(where_, " has no ", name));
    return *found;
  }

  // nullptr where it is not there.
  const Json* may(const char* name) {
    taken_.insert(name);
    const auto found = value_.find(name);
    return found == value_.end() ? nullptr : &*found;
  }

  std::string at(const char* name) const { return said(where_, top_ ? ": " : ".", name); }

  int64_t whole(const char* name, int64_t low, int64_t high) { return integer(need(name), at(name), low, high); }

  std::string among(const Json& value, const char* name, const std::vector<std::string>& allowed) const {
    for (const auto& one : allowed) {
      if (value.is_string() && value.get_ref<const std::string&>() == one) return one;
    }
    std::string list;
    for (const auto& one : allowed) list += (list.empty() ? "" : ", ") + one;
    throw BundleError(said(at(name), " is ", shown(value), "; expected one of ", list));
  }

  void finish() const {
    for (const auto& [name, unused] : value_.items()) {
      if (taken_.count(name) == 0) throw BundleError(said(where_, " has an unknown field ", shown(name)));
    }
  }

 private:
  const Json& value_;
  std::string where_;
  bool top_;
  std::set<std::string> taken_;
};

template <class T>
std::vector<T> listed(const Json& value, const std::string& where,
                      const std::function<T(const Json&, const std::string&)>& one) {
  if (!value.is_array()) throw BundleError(said(where, " is ", shown(value), "; expected a list"));
  std::vector<T> items;
  for (size_t i = 0; i < value.size(); ++i) items.push_back(one(value[i], said(where, "[", i, "]")));
  return items;
}

template <class T>
std::map<std::string, T> mapped(const Json& value, const std::string& where,
                                const std::function<T(const Json&, const std::string&)>& one) {
  if (!value.is_object()) throw BundleError(said(where, " is ", shown(value), "; expected an object"));
  std::map<std::string, T> items;
  for (const auto& [name, item] : value.items()) items.emplace(name, one(item, where + "." + name.substr(0, 60)));
  return items;
}

}  // namespace vlmtrim
