// The regular expressions of pre-tokenisers: alternatives, classes with \p{L}, \p{N} and \s, repetition, (?i:...) and
// looking ahead. A backtracking machine with a limit on its steps; what it does not know it refuses.
#pragma once

#include <cstdint>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

namespace vlmtrim {

class Regex {
 public:
  // Throws Refusal naming what is not known.
  explicit Regex(std::string_view pattern);

  // (start, end) in bytes of all matches in valid UTF-8, from the left, none of them empty. Throws Refusal where the
  // search takes too long.
  std::vector<std::pair<size_t, size_t>> matches(std::string_view text) const;

  struct Set {
    bool negated = false, folded = false;
    std::vector<std::pair<uint32_t, uint32_t>> ranges;
    // Properties: 'L', 'N', 's'; what they are not is in capital form of `without`.
    std::string properties, without;

    bool has(uint32_t code) const;
  };
  enum class Op { kSet, kSplit, kJump, kAhead, kNotAhead, kMatch };
  struct Step {
    Op op;
    size_t set = 0;                // of kSet
    size_t first = 0, second = 0;  // where to go on; kSplit tries `first` first; kAhead: behind the inner expression
  };

 private:
  friend class RegexParser;

  // End of a match from `start`, or npos.
  size_t match(std::string_view text, size_t start, size_t step, int64_t& budget) const;

  std::vector<Set> sets_;
  std::vector<Step> steps_;
};

}  // namespace vlmtrim
