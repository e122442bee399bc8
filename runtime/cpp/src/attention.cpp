#include "attention.hpp"

#include <algorithm>
#include <numeric>

#include "core/error.hpp"

namespace vlmtrim {

Attention::Attention(const Contract& contract)
    : emitted_(contract.graph("decoder").output("key_scores") != nullptr),
      most_(emitted_ ? contract.dims.at("R").second : 0) {}

void Attention::sum() {
  if (!emitted_) {
    throw Refusal("the bundle does not return its attention; export it with --method none --emit-guide");
  }
  on_ = true;
  forget();
}

void Attention::forget() {
  entries_.reset();
  sum_.clear();
}

std::vector<float> Attention::received() const {
  if (!entries_) throw Refusal("no attention was summed: switch it on, and ask about a picture");
  return {sum_.begin(), sum_.end()};
}

Tensors Attention::feeds(int64_t tokens, const std::vector<int64_t>& visual) const {
  if (!emitted_) return {};
  const int64_t after = visual.empty() ? 0 : visual.back() + 1;
  const int64_t rows = watches(visual) ? std::clamp<int64_t>(tokens - after, 0, most_) : 0;
  std::vector<int64_t> numbers(static_cast<size_t>(rows));
  std::iota(numbers.begin(), numbers.end(), tokens - rows);
  return {{"score_rows", Tensor::of(numbers, {1, rows})},
          {"score_weights", Tensor::of(std::vector<float>(numbers.size(), 1), {1, rows})}};
}

void Attention::took(const Tensors& outputs, Backend& backend, const std::vector<int64_t>& visual, int64_t entries) {
  if (!watches(visual)) return;
  if (!visual.empty()) {
    entries_ = visual;
    for (int64_t& entry : *entries_) entry += entries;
    sum_.assign(visual.size(), 0);
  }
  const std::vector<float> scores = floats_of(backend.to_host(outputs.at("key_scores")));
  for (size_t i = 0; i < sum_.size(); ++i) {
    const auto entry = static_cast<size_t>((*entries_)[i]);
    if (entry >= scores.size()) throw Refusal("the decoder returns too few key_scores; export the model again");
    sum_[i] += static_cast<double>(scores[entry]);
  }
}

}  // namespace vlmtrim
