#include "crossing.hpp"

#include <numeric>

#include "core/error.hpp"

namespace vlmtrim {

Crossing::Crossing(const Contract& contract, const Processor& processor)
    : processor_(processor), selects_(contract.graph("decoder").output("kept_counts") != nullptr) {
  for (size_t i = 0; i < contract.groups.size(); ++i) {
    if (contract.groups[i].of_images) held_[i].assign(static_cast<size_t>(contract.groups[i].capacity), kNoEntry);
  }
}

Tensors Crossing::feeds(const std::vector<int64_t>& ids, const Pictures* pictures,
                        const std::vector<int64_t>& windows) {
  numbers_ = pictures != nullptr ? processor_.image_numbers(*pictures, view_) : std::vector<int64_t>{};
  const auto tokens = static_cast<int64_t>(ids.size()), features = static_cast<int64_t>(numbers_.size());
  Tensors feeds;
  feeds["image_numbers"] = Tensor::of(numbers_, {1, features});
  feeds["seen_images"] = Tensor::of(processor_.seen_images(ids, view_, pictures != nullptr), {1, tokens, 2});
  for (const auto& [group, held] : held_) {
    const std::vector<int64_t> live(held.begin(), held.begin() + windows[group]);
    feeds[said("key_images.", group)] = Tensor::of(live, {1, windows[group]});
  }
  return feeds;
}

std::vector<int64_t> Crossing::took(const Tensors& outputs, Backend& backend, const std::vector<int64_t>& entries) {
  std::vector<int64_t> kept(numbers_.size());
  std::iota(kept.begin(), kept.end(), 0);
  if (selects_ && !kept.empty()) {
    const std::vector<int64_t> found = integers_of(backend.to_host(outputs.at("kept_features")));
    const int64_t count = integers_of(backend.to_host(outputs.at("kept_counts"))).at(0);
    bool real = count >= 0 && count <= static_cast<int64_t>(found.size());
    int64_t last = -1;
    for (int64_t i = 0; real && i < count; ++i) {
      const int64_t index = found[static_cast<size_t>(i)];
      real = index > last && index < static_cast<int64_t>(numbers_.size());
      last = index;
    }
    if (!real) throw Refusal("the decoder names kept image features that there are not; export the model again");
    kept.assign(found.begin(), found.begin() + count);
  }
  for (auto& [group, held] : held_) {
    const auto start = static_cast<size_t>(entries[group]);
    if (start + kept.size() > held.size()) {
      throw Refusal("the decoder kept more image features than fit its caches; export the model again");
    }
    for (size_t i = 0; i < kept.size(); ++i) held[start + i] = numbers_[static_cast<size_t>(kept[i])];
  }
  return kept;
}

}  // namespace vlmtrim
