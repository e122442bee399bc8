#include "core/user_cache.hpp"

#include <unistd.h>

#include <cstdlib>
#include <fstream>
#include <iterator>

namespace vlmtrim {

std::filesystem::path user_cache() {
  const char* cache = std::getenv("XDG_CACHE_HOME");
  const char* home = std::getenv("HOME");
  const std::filesystem::path base = cache != nullptr && *cache != 0
                                         ? std::filesystem::path(cache)
                                         : std::filesystem::path(home != nullptr ? home : "/") / ".cache";
  return base / "vlmtrim";
}

std::string read_kept(const std::filesystem::path& path) {
  std::ifstream in(path, std::ios::binary);
  return {std::istreambuf_iterator<char>(in), std::istreambuf_iterator<char>()};
}

void keep_for_later(const std::filesystem::path& path, const std::string& data) {
  std::error_code ignored;
  std::filesystem::create_directories(path.parent_path(), ignored);
  const std::filesystem::path fresh = path.string() + "." + std::to_string(getpid());
  std::ofstream out(fresh, std::ios::binary);
  out << data;
  out.close();
  if (out) std::filesystem::rename(fresh, path, ignored);
  if (!out || ignored) std::filesystem::remove(fresh, ignored);
}

}  // namespace vlmtrim
