// Pictures that reach the decoder through cross-attention: which features the caches hold, and which a token sees.
// Mirrors runtime/crossing.py.
#pragma once

#include <map>
#include <vector>

#include "backends/backend.hpp"
#include "processors/processor.hpp"

namespace vlmtrim {

// In image_numbers and key_images: a feature of no picture, and no feature at all. In seen_images: no picture.
constexpr int64_t kPadding = -1, kNoEntry = -2;
constexpr int64_t kSeesNothing[2] = {-1, INT32_MAX};

class Crossing {
 public:
  Crossing(const Contract& contract, const Processor& processor);

  // Inputs of the decoder for a step but the features; `windows` are the live windows of the groups.
  Tensors feeds(const std::vector<int64_t>& ids, const Pictures* pictures, const std::vector<int64_t>& windows);
  // The kept features (indices in N) that a step added to every group of images; `entries` are those before it.
  std::vector<int64_t> took(const Tensors& outputs, Backend& backend, const std::vector<int64_t>& entries);

 private:
  const Processor& processor_;
  std::map<size_t, std::vector<int64_t>> held_;  // by group, as long as its capacity
  View view_;
  bool selects_;
  std::vector<int64_t> numbers_;
};

}  // namespace vlmtrim
