// SHA-256 (FIPS 180-4) of files, with the digests of large ones remembered where the Python runtime remembers them.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <filesystem>
#include <string>

namespace vlmtrim {

class Sha256 {
 public:
  void update(const void* data, size_t size);
  // Hex digest of all that was given; nothing may follow.
  std::string finish();

 private:
  void block(const unsigned char* data);

  std::array<uint32_t, 8> state_{0x6a09e667, 0xbb67ae85, 0x3c6ef372, 0xa54ff53a,
                                 0x510e527f, 0x9b05688c, 0x1f83d9ab, 0x5be0cd19};
  std::array<unsigned char, 64> held_{};
  size_t filled_ = 0;
  uint64_t total_ = 0;
};

// Hex digest of a file's bytes, always computed. Throws BundleError where it cannot be read.
std::string sha256(const std::filesystem::path& path);

// Hex digest of a file, remembered for large files that did not change since.
std::string known_sha256(const std::filesystem::path& path);

}  // namespace vlmtrim
