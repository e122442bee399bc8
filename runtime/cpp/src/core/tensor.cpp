#include "core/tensor.hpp"

#include <algorithm>
#include <cmath>
#include <new>

#include "core/error.hpp"

namespace vlmtrim {
namespace {

constexpr std::align_val_t kAlignment{64};

uint32_t bits_of(float value) {
  uint32_t bits = 0;
  std::memcpy(&bits, &value, sizeof bits);
  return bits;
}

float float_of(uint32_t bits) {
  float value = 0;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

uint16_t to_bfloat16(float value) {
  const uint32_t word = bits_of(value);
  if (std::isnan(value)) return 0x7FC0;
  return static_cast<uint16_t>((uint64_t{word} + 0x7FFF + (word >> 16 & 1)) >> 16);
}

uint16_t to_half(float value) {
  const uint32_t word = bits_of(value), sign = word >> 16 & 0x8000, magnitude = word & 0x7FFFFFFF;
  if (magnitude > 0x7F800000) return static_cast<uint16_t>(sign | 0x7E00);
  if (magnitude >= 0x477FF000) return static_cast<uint16_t>(sign | 0x7C00);  // 65520 and above round to infinity
  if (magnitude < 0x38800000) {  // subnormal: the sum's own rounding does it
    const float shifted = float_of(magnitude) + 0.5F;
    return static_cast<uint16_t>(sign | (bits_of(shifted) - bits_of(0.5F)));
  }
  const uint32_t rounded = magnitude + 0xFFF + (magnitude >> 13 & 1);
  return static_cast<uint16_t>(sign | ((rounded - 0x38000000) >> 13));
}

float from_half(uint16_t half) {
  const uint32_t sign = (half & 0x8000u) << 16, exponent = half >> 10 & 31, fraction = half & 0x3FF;
  if (exponent == 31) return float_of(sign | 0x7F800000 | fraction << 13);
  if (exponent > 0) return float_of(sign | (exponent + 112) << 23 | fraction << 13);
  const float small = static_cast<float>(fraction) * 0x1p-24F;
  return sign != 0 ? -small : small;
}

}  // namespace

int64_t elements_of(const Shape& shape) {
  int64_t count = 1;
  for (const int64_t size : shape) count *= size;
  return count;
}

std::string said_of(const Shape& shape) {
  std::string list;
  for (const int64_t size : shape) list += (list.empty() ? "" : ", ") + std::to_string(size);
  return "[" + list + "]";
}

Tensor Tensor::reshaped(Shape other) const {
  if (elements_of(other) != elements()) throw Refusal(said(said_of(shape), " cannot be read as ", said_of(other)));
  Tensor same = *this;
  same.shape = std::move(other);
  return same;
}

Tensor Tensor::empty(DType dtype, Shape shape) {
  Tensor made{dtype, std::move(shape), nullptr, nullptr};
  made.data = ::operator new(std::max<size_t>(made.nbytes(), 1), kAlignment);
  made.owner = std::shared_ptr<void>(made.data, [](void* memory) { ::operator delete(memory, kAlignment); });
  return made;
}

Tensor Tensor::zeros(DType dtype, Shape shape) {
  Tensor made = empty(dtype, std::move(shape));
  std::memset(made.data, 0, made.nbytes());
  return made;
}

Tensor Tensor::of(const std::vector<int64_t>& values, Shape shape) {
  Tensor made = empty(DType::kInt64, std::move(shape));
  if (made.elements() != static_cast<int64_t>(values.size())) throw Refusal("values do not fill their shape");
  std::copy(values.begin(), values.end(), made.as<int64_t>());
  return made;
}

Tensor Tensor::of(const std::vector<float>& values, Shape shape) {
  Tensor made = empty(DType::kFloat32, std::move(shape));
  if (made.elements() != static_cast<int64_t>(values.size())) throw Refusal("values do not fill their shape");
  std::copy(values.begin(), values.end(), made.as<float>());
  return made;
}

Tensor cast(const Tensor& tensor, DType dtype) {
  if (dtype == tensor.dtype) return tensor;
  Tensor made = Tensor::empty(dtype, tensor.shape);
  const auto* values = tensor.as<float>();
  auto* converted = made.as<uint16_t>();
  for (int64_t i = 0, count = tensor.elements(); i < count; ++i) {
    converted[i] = dtype == DType::kFloat16 ? to_half(values[i]) : to_bfloat16(values[i]);
  }
  return made;
}

std::vector<float> floats_of(const Tensor& tensor) {
  std::vector<float> values(static_cast<size_t>(tensor.elements()));
  if (tensor.dtype == DType::kFloat32) {
    std::copy_n(tensor.as<float>(), values.size(), values.begin());
    return values;
  }
  const auto* words = tensor.as<uint16_t>();
  for (size_t i = 0; i < values.size(); ++i) {
    values[i] = tensor.dtype == DType::kFloat16 ? from_half(words[i]) : float_of(uint32_t{words[i]} << 16);
  }
  return values;
}

std::vector<int64_t> integers_of(const Tensor& tensor) {
  return {tensor.as<int64_t>(), tensor.as<int64_t>() + tensor.elements()};
}

}  // namespace vlmtrim
