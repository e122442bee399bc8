// What takes long to compute, kept in the user's cache folder; a folder that cannot be written is no error.
// Mirrors runtime/engines/user_cache.py.
#pragma once

#include <filesystem>
#include <string>

namespace vlmtrim {

// $XDG_CACHE_HOME/vlmtrim, by default ~/.cache/vlmtrim.
std::filesystem::path user_cache();

// What was kept in a file; empty where nothing was.
std::string read_kept(const std::filesystem::path& path);

// Keeps data in a file. Written beside and renamed, so that a kill leaves no half file.
void keep_for_later(const std::filesystem::path& path, const std::string& data);

}  // namespace vlmtrim
