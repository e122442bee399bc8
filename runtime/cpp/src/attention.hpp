// Attention to the visual tokens of a conversation, summed while it runs: what a bundle tells the one that it guides.
// Mirrors runtime/attention.py for one row.
#pragma once

#include <optional>
#include <vector>

#include "backends/backend.hpp"

namespace vlmtrim {

// Feeds the rows that are summed and adds up what they give, while it is on; no rows are fed before. The sum begins
// anew with every step that brings visual tokens.
class Attention {
 public:
  explicit Attention(const Contract& contract);

  // Whether the bundle returns any.
  bool emitted() const { return emitted_; }
  // From now on, which begins a new conversation. Throws Refusal where the bundle returns none.
  void sum();
  // Begins a new conversation.
  void forget();
  // What each visual token of the last step that brought any has received since, [N]. Throws Refusal.
  std::vector<float> received() const;

  // Inputs of the decoder for a step of so many tokens; `visual` are the positions of its visual tokens.
  Tensors feeds(int64_t tokens, const std::vector<int64_t>& visual) const;
  // Adds what a step gave; `entries` are those of the caches before it.
  void took(const Tensors& outputs, Backend& backend, const std::vector<int64_t>& visual, int64_t entries);

 private:
  bool watches(const std::vector<int64_t>& visual) const { return on_ && (!visual.empty() || entries_); }

  bool emitted_, on_ = false;
  int64_t most_;                                 // rows of a step
  std::optional<std::vector<int64_t>> entries_;  // of the visual tokens in the caches
  std::vector<double> sum_;
};

}  // namespace vlmtrim
