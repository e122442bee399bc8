// Where ONNX Runtime computes: the CPU, or a GPU by its CUDA provider; tensors as its values, and copies between both.
#pragma once

#include <map>
#include <mutex>

#include "backends/ort_library.hpp"
#include "core/tensor.hpp"

namespace vlmtrim {

// A handle of the C API with the function that releases it.
template <class T>
using Handle = std::shared_ptr<T>;

std::optional<DType> dtype_of(ONNXTensorElementDataType number);

// Shared by threads. All throw Refusal; `what` begins its sentence.
class OrtDevice {
 public:
  // Throws where the library has no such provider.
  OrtDevice(std::shared_ptr<OrtLibrary> library, bool cuda);

  const OrtLibrary& library() const { return *library_; }
  bool cuda() const { return cuda_; }
  // Throws where the provider does not start.
  void start();
  // Of a session on this device that prints nothing.
  Handle<OrtSessionOptions> options() const;
  // Of what graphs return.
  const OrtMemoryInfo* memory() const { return (cuda_ ? device_ : host_).get(); }
  // A value over the memory of a tensor, and the other way round.
  Handle<OrtValue> value_of(const Tensor& tensor, const std::string& what) const;
  Tensor tensor_of(const Handle<OrtValue>& value, const std::string& what) const;
  // What a binding's outputs were bound to, in order.
  std::vector<Handle<OrtValue>> outputs_of(const OrtIoBinding* binding, const std::string& what) const;
  Tensor to_host(const Tensor& tensor);
  Tensor to_device(const Tensor& tensor) { return copied(tensor, memory()); }

 private:
  Tensor copied(const Tensor& tensor, const OrtMemoryInfo* place);
  OrtSession* copier(DType dtype);

  std::shared_ptr<OrtLibrary> library_;
  bool cuda_;
  Handle<OrtMemoryInfo> host_, device_;
  std::mutex mutex_;
  std::map<DType, Handle<OrtSession>> copiers_;  // a graph that copies is the C API's way between memories
};

}  // namespace vlmtrim
