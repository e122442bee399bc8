#include "backends/ort_device.hpp"

#include <algorithm>
#include <cstring>
#include <optional>

#include "backends/handmade.hpp"
#include "core/error.hpp"

namespace vlmtrim {
namespace {

constexpr const char* kProvider = "CUDAExecutionProvider";
constexpr const char* kStart =
    "ONNX Runtime's CUDA provider does not start; check the NVIDIA driver, and that CUDA and cuDNN are those that this "
    "ONNX Runtime was made for";
constexpr const char* kCopy = "a tensor cannot be copied from or to the GPU";

struct Element {
  DType dtype;
  ONNXTensorElementDataType number;
};
constexpr Element kElements[] = {{DType::kFloat32, ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT},
                                 {DType::kFloat16, ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT16},
                                 {DType::kBFloat16, ONNX_TENSOR_ELEMENT_DATA_TYPE_BFLOAT16},
                                 {DType::kInt64, ONNX_TENSOR_ELEMENT_DATA_TYPE_INT64},
                                 {DType::kInt32, ONNX_TENSOR_ELEMENT_DATA_TYPE_INT32},
                                 {DType::kBool, ONNX_TENSOR_ELEMENT_DATA_TYPE_BOOL}};

ONNXTensorElementDataType element_of(DType dtype) {
  for (const auto& element : kElements) {
    if (element.dtype == dtype) return element.number;
  }
  return ONNX_TENSOR_ELEMENT_DATA_TYPE_UNDEFINED;
}

void check_provider(const OrtLibrary& library) {
  const OrtApi* api = library.api();
  char** names = nullptr;
  int count = 0;
  library.check(api->GetAvailableProviders(&names, &count), "ONNX Runtime");
  const std::vector<std::string> found(names, names + count);
  library.check(api->ReleaseAvailableProviders(names, count), "ONNX Runtime");
  if (std::find(found.begin(), found.end(), kProvider) != found.end()) return;
  std::string list;
  for (const auto& name : found) list += (list.empty() ? "" : ", ") + name;
  throw Refusal(said("backend ort-cuda needs ONNX Runtime's ", kProvider, ", the library here has ", list,
                     "; set VLMTRIM_ONNXRUNTIME to the libonnxruntime.so of a build for CUDA (onnxruntime-gpu)"));
}

}  // namespace

std::optional<DType> dtype_of(ONNXTensorElementDataType number) {
  for (const auto& element : kElements) {
    if (element.number == number) return element.dtype;
  }
  return std::nullopt;
}

OrtDevice::OrtDevice(std::shared_ptr<OrtLibrary> library, bool cuda) : library_(std::move(library)), cuda_(cuda) {
  const OrtApi* api = library_->api();
  OrtMemoryInfo* memory = nullptr;
  library_->check(api->CreateCpuMemoryInfo(OrtDeviceAllocator, OrtMemTypeDefault, &memory), "ONNX Runtime");
  host_.reset(memory, api->ReleaseMemoryInfo);
  if (!cuda) return;
  check_provider(*library_);
  library_->check(api->CreateMemoryInfo("Cuda", OrtDeviceAllocator, 0, OrtMemTypeDefault, &memory), kStart);
  device_.reset(memory, api->ReleaseMemoryInfo);
}

void OrtDevice::start() {
  if (cuda_) copier(DType::kFloat32);
}

Handle<OrtSessionOptions> OrtDevice::options() const {
  const OrtApi* api = library_->api();
  OrtSessionOptions* raw = nullptr;
  library_->check(api->CreateSessionOptions(&raw), "ONNX Runtime");
  Handle<OrtSessionOptions> options(raw, api->ReleaseSessionOptions);
  library_->check(api->SetSessionLogSeverityLevel(raw, ORT_LOGGING_LEVEL_FATAL), "ONNX Runtime");
  if (!cuda_) return options;
  OrtCUDAProviderOptionsV2* made = nullptr;
  library_->check(api->CreateCUDAProviderOptions(&made), kStart);
  const Handle<OrtCUDAProviderOptionsV2> provider(made, api->ReleaseCUDAProviderOptions);
  // float32 stays float32: TF32, the provider's default, keeps 10 bits of it.
  const char* const name = "use_tf32";
  const char* const value = "0";
  library_->check(api->UpdateCUDAProviderOptions(made, &name, &value, 1), kStart);
  library_->check(api->SessionOptionsAppendExecutionProvider_CUDA_V2(raw, made), kStart);
  return options;
}

Handle<OrtValue> OrtDevice::value_of(const Tensor& tensor, const std::string& what) const {
  OrtValue* value = nullptr;
  const OrtMemoryInfo* const memory = (tensor.on_device ? device_ : host_).get();
  library_->check(
      library_->api()->CreateTensorWithDataAsOrtValue(memory, tensor.data, tensor.nbytes(), tensor.shape.data(),
                                                      tensor.shape.size(), element_of(tensor.dtype), &value),
      what);
  return {value, library_->api()->ReleaseValue};
}

Tensor OrtDevice::tensor_of(const Handle<OrtValue>& value, const std::string& what) const {
  const OrtApi* api = library_->api();
  OrtTensorTypeAndShapeInfo* raw = nullptr;
  library_->check(api->GetTensorTypeAndShape(value.get(), &raw), what);
  const Handle<OrtTensorTypeAndShapeInfo> info(raw, api->ReleaseTensorTypeAndShapeInfo);
  size_t rank = 0;
  ONNXTensorElementDataType number{};
  library_->check(api->GetDimensionsCount(raw, &rank), what);
  library_->check(api->GetTensorElementType(raw, &number), what);
  Tensor tensor;
  tensor.shape.resize(rank);
  library_->check(api->GetDimensions(raw, tensor.shape.data(), rank), what);
  const auto dtype = dtype_of(number);
  if (!dtype) throw Refusal(said(what, ": it returned a tensor of a dtype that no contract has"));
  tensor.dtype = *dtype;
  library_->check(api->GetTensorMutableData(value.get(), &tensor.data), what);
  tensor.owner = value;
  const OrtMemoryInfo* memory = nullptr;
  OrtMemoryInfoDeviceType kind{};
  library_->check(api->GetTensorMemoryInfo(value.get(), &memory), what);
  api->MemoryInfoGetDeviceType(memory, &kind);
  tensor.on_device = kind == OrtMemoryInfoDeviceType_GPU;
  return tensor;
}

std::vector<Handle<OrtValue>> OrtDevice::outputs_of(const OrtIoBinding* binding, const std::string& what) const {
  const OrtApi* api = library_->api();
  OrtAllocator* allocator = nullptr;
  library_->check(api->GetAllocatorWithDefaultOptions(&allocator), what);
  OrtValue** values = nullptr;
  size_t count = 0;
  library_->check(api->GetBoundOutputValues(binding, allocator, &values, &count), what);
  std::vector<Handle<OrtValue>> found;
  for (size_t i = 0; i < count; ++i) found.emplace_back(values[i], api->ReleaseValue);
  if (values != nullptr) library_->check(api->AllocatorFree(allocator, values), what);
  return found;
}

Tensor OrtDevice::to_host(const Tensor& tensor) {
  if (tensor.on_device) return copied(tensor, host_.get());
  Tensor copy = Tensor::empty(tensor.dtype, tensor.shape);
  std::memcpy(copy.data, tensor.data, tensor.nbytes());
  return copy;
}

Tensor OrtDevice::copied(const Tensor& tensor, const OrtMemoryInfo* place) {
  const OrtApi* api = library_->api();
  OrtSession* const session = copier(tensor.dtype);
  OrtIoBinding* raw = nullptr;
  library_->check(api->CreateIoBinding(session, &raw), kCopy);
  const Handle<OrtIoBinding> binding(raw, api->ReleaseIoBinding);
  const Handle<OrtValue> value = value_of(tensor, kCopy);
  library_->check(api->BindInput(raw, "x", value.get()), kCopy);
  library_->check(api->BindOutputToDevice(raw, "y", place), kCopy);
  library_->check(api->RunWithBinding(session, nullptr, raw), kCopy);
  return tensor_of(outputs_of(raw, kCopy).at(0), kCopy);
}

OrtSession* OrtDevice::copier(DType dtype) {
  const std::lock_guard<std::mutex> lock(mutex_);
  auto& session = copiers_[dtype];
  if (!session) {
    const std::string model = handmade::identity(dtype);
    OrtSession* made = nullptr;
    library_->check(
        library_->api()->CreateSessionFromArray(library_->env(), model.data(), model.size(), options().get(), &made),
        kStart);
    session.reset(made, library_->api()->ReleaseSession);
  }
  return session.get();
}

}  // namespace vlmtrim
