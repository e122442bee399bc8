// From logits to token ids: greedy, temperature, top-k, top-p, reproducible by seed: the tokens that the Python runtime
// draws, whose generator is numpy's PCG64. Mirrors runtime/sampling.py and stopping.py.
#pragma once

#include <array>
#include <cstdint>
#include <optional>
#include <string>
#include <vector>

namespace vlmtrim {

// numpy.random.default_rng(seed): PCG64 (O'Neill, PCG: XSL-RR 128/64), seeded by a SeedSequence.
class Pcg64 {
 public:
  explicit Pcg64(uint64_t seed);
  uint64_t next();
  // In [0, 1), 53 bits.
  double uniform() { return static_cast<double>(next() >> 11) * 0x1p-53; }

 private:
  void step() { state_ = state_ * ((static_cast<unsigned __int128>(kHigh) << 64) | kLow) + increment_; }

  static constexpr uint64_t kHigh = 2549297995355413924u, kLow = 4865540595714422341u;
  unsigned __int128 state_ = 0, increment_ = 0;
};

struct Sampling {
  double temperature = 0;        // 0 is greedy; the lowest id wins ties
  int64_t top_k = 0;             // only the k most probable tokens; 0 for all
  double top_p = 1;              // the smallest set of most probable tokens that reach p
  std::optional<uint64_t> seed;  // none draws a fresh one

  // Throws Refusal for a value that is not allowed.
  void check() const;
};

class Sampler {
 public:
  explicit Sampler(const Sampling& sampling);
  // logits [V] -> token id. Throws Refusal where they are no numbers.
  int64_t operator()(const std::vector<float>& logits);

 private:
  int64_t draw(const std::vector<float>& logits);

  Sampling sampling_;
  Pcg64 generator_;
};

// Of the likeliest token, at temperature 1.
double largest_probability(const std::vector<float>& logits);

// Passes text on until a stop text begins in it; holds back what may become one.
class Stopper {
 public:
  explicit Stopper(std::vector<std::string> stops);
  // (text that is certain now, whether a stop text was found); `last` lets everything out that is held.
  std::pair<std::string, bool> take(const std::string& text, bool last);

 private:
  std::vector<std::string> stops_;
  std::string held_;
};

}  // namespace vlmtrim
