#include "core/sha256.hpp"

#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cstdlib>
#include <cstring>
#include <ctime>
#include <fstream>
#include <vector>

#include "core/error.hpp"
#include "core/user_cache.hpp"

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace vlmtrim {
namespace {

constexpr size_t kPiece = 1 << 20;
constexpr int64_t kLarge = 64 << 20;  // bytes from which on a digest is remembered
constexpr double kSettled = 2.0;      // seconds; a file that changed just now may change again within one tick

constexpr uint32_t kRounds[64] = {
    0x428a2f98, 0x71374491, 0xb5c0fbcf, 0xe9b5dba5, 0x3956c25b, 0x59f111f1, 0x923f82a4, 0xab1c5ed5,
    0xd807aa98, 0x12835b01, 0x243185be, 0x550c7dc3, 0x72be5d74, 0x80deb1fe, 0x9bdc06a7, 0xc19bf174,
    0xe49b69c1, 0xefbe4786, 0x0fc19dc6, 0x240ca1cc, 0x2de92c6f, 0x4a7484aa, 0x5cb0a9dc, 0x76f988da,
    0x983e5152, 0xa831c66d, 0xb00327c8, 0xbf597fc7, 0xc6e00bf3, 0xd5a79147, 0x06ca6351, 0x14292967,
    0x27b70a85, 0x2e1b2138, 0x4d2c6dfc, 0x53380d13, 0x650a7354, 0x766a0abb, 0x81c2c92e, 0x92722c85,
    0xa2bfe8a1, 0xa81a664b, 0xc24b8b70, 0xc76c51a3, 0xd192e819, 0xd6990624, 0xf40e3585, 0x106aa070,
    0x19a4c116, 0x1e376c08, 0x2748774c, 0x34b0bcb5, 0x391c0cb3, 0x4ed8aa4a, 0x5b9cca4f, 0x682e6ff3,
    0x748f82ee, 0x78a5636f, 0x84c87814, 0x8cc70208, 0x90befffa, 0xa4506ceb, 0xbef9a3f7, 0xc67178f2};

uint32_t rotated(uint32_t word, int by) { return word >> by | word << (32 - by); }

void plain_block(uint32_t* state, const unsigned char* data) {
  uint32_t w[64];
  for (int i = 0; i < 16; ++i) {
    w[i] = uint32_t{data[4 * i]} << 24 | uint32_t{data[4 * i + 1]} << 16 | uint32_t{data[4 * i + 2]} << 8 |
           data[4 * i + 3];
  }
  for (int i = 16; i < 64; ++i) {
    const uint32_t a = w[i - 15], b = w[i - 2];
    w[i] =
        w[i - 16] + (rotated(a, 7) ^ rotated(a, 18) ^ a >> 3) + w[i - 7] + (rotated(b, 17) ^ rotated(b, 19) ^ b >> 10);
  }
  uint32_t v[8];
  std::memcpy(v, state, sizeof v);
  for (int i = 0; i < 64; ++i) {
    const uint32_t e = v[4], a = v[0];
    const uint32_t one =
        v[7] + (rotated(e, 6) ^ rotated(e, 11) ^ rotated(e, 25)) + ((e & v[5]) ^ (~e & v[6])) + kRounds[i] + w[i];
    const uint32_t two = (rotated(a, 2) ^ rotated(a, 13) ^ rotated(a, 22)) + ((a & v[1]) ^ (a & v[2]) ^ (v[1] & v[2]));
    std::memmove(v + 1, v, 7 * sizeof *v);
    v[4] += one;
    v[0] = one + two;
  }
  for (int i = 0; i < 8; ++i) state[i] += v[i];
}

#if defined(__x86_64__)
// The same with the processor's own instructions, several times as fast: weights of gigabytes are hashed.
__attribute__((target("sha,sse4.1,ssse3"))) void fast_block(uint32_t* state, const unsigned char* data) {
  const __m128i order = _mm_set_epi64x(0x0c0d0e0f08090a0bLL, 0x0405060700010203LL);
  __m128i low = _mm_shuffle_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(state)), 0xB1);
  __m128i high = _mm_shuffle_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(state + 4)), 0x1B);
  __m128i abef = _mm_alignr_epi8(low, high, 8), cdgh = _mm_blend_epi16(high, low, 0xF0);
  const __m128i abef_before = abef, cdgh_before = cdgh;
  __m128i w[4];
  for (int i = 0; i < 4; ++i) {
    w[i] = _mm_shuffle_epi8(_mm_loadu_si128(reinterpret_cast<const __m128i*>(data) + i), order);
  }
  for (int i = 0; i < 16; ++i) {
    const __m128i now = w[i & 3];
    __m128i sum = _mm_add_epi32(now, _mm_loadu_si128(reinterpret_cast<const __m128i*>(kRounds + 4 * i)));
    cdgh = _mm_sha256rnds2_epu32(cdgh, abef, sum);
    abef = _mm_sha256rnds2_epu32(abef, cdgh, _mm_shuffle_epi32(sum, 0x0E));
    if (i < 12) {
      const __m128i last = w[(i + 3) & 3];
      __m128i next = _mm_add_epi32(_mm_sha256msg1_epu32(now, w[(i + 1) & 3]), _mm_alignr_epi8(last, w[(i + 2) & 3], 4));
      w[i & 3] = _mm_sha256msg2_epu32(next, last);
    }
  }
  abef = _mm_add_epi32(abef, abef_before);
  cdgh = _mm_add_epi32(cdgh, cdgh_before);
  low = _mm_shuffle_epi32(abef, 0x1B);
  high = _mm_shuffle_epi32(cdgh, 0xB1);
  _mm_storeu_si128(reinterpret_cast<__m128i*>(state), _mm_blend_epi16(low, high, 0xF0));
  _mm_storeu_si128(reinterpret_cast<__m128i*>(state + 4), _mm_alignr_epi8(high, low, 8));
}

bool has_instructions() {
  unsigned a = 7, b = 0, c = 0, d = 0;
  __asm__("cpuid" : "+a"(a), "=b"(b), "+c"(c), "=d"(d));
  return (b >> 29 & 1) != 0 && __builtin_cpu_supports("sse4.1") != 0;
}
#else
void fast_block(uint32_t* state, const unsigned char* data) { plain_block(state, data); }
bool has_instructions() { return false; }
#endif

struct stat state_of(const std::filesystem::path& path) {
  struct stat found{};
  if (stat(path.c_str(), &found) != 0) throw BundleError(said(path.string(), " cannot be read"));
  return found;
}

std::string identity(const struct stat& file) {
  return said(file.st_size, " ", int64_t{file.st_mtim.tv_sec} * 1000000000 + file.st_mtim.tv_nsec, " ");
}

}  // namespace

void Sha256::block(const unsigned char* data) {
  static const bool fast = has_instructions();
  fast ? fast_block(state_.data(), data) : plain_block(state_.data(), data);
}

void Sha256::update(const void* data, size_t size) {
  auto* at = static_cast<const unsigned char*>(data);
  total_ += size;
  while (size > 0) {
    if (filled_ == 0 && size >= 64) {
      block(at);
      at += 64;
      size -= 64;
      continue;
    }
    const size_t taken = std::min(size, 64 - filled_);
    std::memcpy(held_.data() + filled_, at, taken);
    filled_ += taken;
    at += taken;
    size -= taken;
    if (filled_ == 64) {
      block(held_.data());
      filled_ = 0;
    }
  }
}

std::string Sha256::finish() {
  const uint64_t bits = total_ * 8;
  const unsigned char one = 0x80, zero = 0;
  update(&one, 1);
  while (filled_ != 56) update(&zero, 1);
  unsigned char length[8];
  for (int i = 0; i < 8; ++i) length[i] = static_cast<unsigned char>(bits >> (56 - 8 * i));
  update(length, 8);
  std::string hex;
  for (const uint32_t word : state_) {
    for (int shift = 28; shift >= 0; shift -= 4) hex += "0123456789abcdef"[word >> shift & 15];
  }
  return hex;
}

std::string sha256(const std::filesystem::path& path) {
  const int file = open(path.c_str(), O_RDONLY | O_CLOEXEC);
  if (file < 0) throw BundleError(said(path.string(), " cannot be read"));
  Sha256 digest;
  std::vector<unsigned char> piece(kPiece);
  ssize_t count = 0;
  while ((count = read(file, piece.data(), piece.size())) > 0) digest.update(piece.data(), static_cast<size_t>(count));
  close(file);
  if (count < 0) throw BundleError(said(path.string(), " cannot be read"));
  return digest.finish();
}

std::string known_sha256(const std::filesystem::path& path) {
  const struct stat before = state_of(path);
  if (before.st_size < kLarge) return sha256(path);
  const auto note = user_cache() / "sha256" / said(std::hex, before.st_dev, "-", before.st_ino);
  const std::string remembered = read_kept(note);
  const std::string wanted = identity(before);
  if (remembered.compare(0, wanted.size(), wanted) == 0) return remembered.substr(wanted.size());
  const std::string digest = sha256(path);
  const struct stat after = state_of(path);
  const double age = static_cast<double>(std::time(nullptr)) - static_cast<double>(after.st_mtim.tv_sec);
  if (identity(after) == wanted && age > kSettled) keep_for_later(note, wanted + digest);
  return digest;
}

}  // namespace vlmtrim
