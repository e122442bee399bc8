// Values that graphs take and return: dtype, shape, and memory that several may share.
#pragma once

#include <cstdint>
#include <cstring>
#include <map>
#include <memory>
#include <string>
#include <vector>

#include "core/contract.hpp"

namespace vlmtrim {

using Shape = std::vector<int64_t>;

int64_t elements_of(const Shape& shape);
std::string said_of(const Shape& shape);

// Memory belongs to `owner`, which a library may have made; copies of a Tensor share it.
struct Tensor {
  DType dtype = DType::kFloat32;
  Shape shape;
  std::shared_ptr<void> owner;
  void* data = nullptr;    // never null in a tensor that was made, even of no elements
  bool on_device = false;  // data is an address of a GPU, which only its backend reads

  int64_t elements() const { return elements_of(shape); }
  size_t nbytes() const { return static_cast<size_t>(elements()) * bytes_of(dtype); }

  template <class T>
  T* as() {
    return static_cast<T*>(data);
  }
  template <class T>
  const T* as() const {
    return static_cast<const T*>(data);
  }

  // The same memory under another shape. Throws Refusal where it has not as many elements.
  Tensor reshaped(Shape other) const;

  static Tensor zeros(DType dtype, Shape shape);
  // Not filled.
  static Tensor empty(DType dtype, Shape shape);
  static Tensor of(const std::vector<int64_t>& values, Shape shape);
  static Tensor of(const std::vector<float>& values, Shape shape);
};

using Tensors = std::map<std::string, Tensor>;

// A float32 tensor in a dtype of the contract; rounds to nearest, ties to even.
Tensor cast(const Tensor& tensor, DType dtype);
// Values of a float tensor of any dtype, as float32, which holds every value of the others.
std::vector<float> floats_of(const Tensor& tensor);
std::vector<int64_t> integers_of(const Tensor& tensor);

}  // namespace vlmtrim
