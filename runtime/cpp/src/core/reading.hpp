// Reads what strangers wrote: files of a bundle by plain name, JSON within limits, values by type and range.
// Mirrors graphs/reading.py.
#pragma once

#include <cstdint>
#include <filesystem>
#include <nlohmann/json.hpp>
#include <optional>
#include <set>
#include <string>
#include <string_view>
#include <vector>

namespace vlmtrim {

using Json = nlohmann::json;

constexpr size_t kLargestText = 64u << 20;  // bytes of a JSON or text file

// The files of a folder that may be read: by plain name, regular ones, never through a link.
class Folder {
 public:
  // `names`: the only files that may be read, those under a checksum; nullopt for every regular file of the folder.
  explicit Folder(std::filesystem::path path, std::optional<std::set<std::string>> names = std::nullopt);

  const std::filesystem::path& path() const { return path_; }
  const std::set<std::string>& names() const { return *names_; }
  bool contains(const std::string& name) const;
  // Path of a regular file of the folder. All of these throw BundleError.
  std::filesystem::path file(const std::string& name) const;
  std::string bytes(const std::string& name, size_t limit = kLargestText) const;
  std::string text(const std::string& name, size_t limit = kLargestText) const;
  Json json(const std::string& name, size_t limit = kLargestText) const;

 private:
  int open(const std::string& name) const;

  std::filesystem::path path_;
  std::optional<std::set<std::string>> names_;
};

// Whether a name is that of a file in the folder itself: no separators, no "..", nothing that cannot be one.
bool is_plain_name(const std::string& name);

// The object that a JSON text holds; its depth is bounded. Throws BundleError naming `where`.
Json json_object(std::string_view text, const std::string& where);

// A value of the named type and range. Each throws BundleError naming `where`.
int64_t integer(const Json& value, const std::string& where, int64_t low, int64_t high);
double number(const Json& value, const std::string& where, double low, double high);
bool boolean(const Json& value, const std::string& where);
std::string text_value(const Json& value, const std::string& where, size_t most = 4096);

// A value for a message: on one line, cut where it is long.
std::string shown(const Json& value);

// Where a text stops being UTF-8; nullopt where it is UTF-8 to its end.
std::optional<size_t> first_bad_utf8(std::string_view text);

}  // namespace vlmtrim
