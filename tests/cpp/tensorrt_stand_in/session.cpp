#include "session.hpp"

#include <cstring>

namespace stand_in {
namespace {

size_t bytes_of(ONNXTensorElementDataType type) {
  switch (type) {
    case ONNX_TENSOR_ELEMENT_DATA_TYPE_INT64:
      return 8;
    case ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT16:
    case ONNX_TENSOR_ELEMENT_DATA_TYPE_BFLOAT16:
      return 2;
    case ONNX_TENSOR_ELEMENT_DATA_TYPE_BOOL:
      return 1;
    default:
      return 4;
  }
}

void read_type(const vlmtrim::OrtLibrary& library, const OrtTensorTypeAndShapeInfo* info, Array& array) {
  const OrtApi* api = library.api();
  size_t rank = 0;
  library.check(api->GetTensorElementType(info, &array.type), "stand-in");
  library.check(api->GetDimensionsCount(info, &rank), "stand-in");
  array.shape.resize(rank);
  library.check(api->GetDimensions(info, array.shape.data(), rank), "stand-in");
}

}  // namespace

size_t Array::nbytes() const {
  size_t count = bytes_of(type);
  for (const int64_t size : shape) count *= static_cast<size_t>(size);
  return count;
}

OnnxSession::OnnxSession(const std::string& path) : library_(vlmtrim::OrtLibrary::get("")) {
  const OrtApi* api = library_->api();
  OrtSessionOptions* raw = nullptr;
  library_->check(api->CreateSessionOptions(&raw), "stand-in");
  const std::shared_ptr<OrtSessionOptions> options(raw, api->ReleaseSessionOptions);
  library_->check(api->SetIntraOpNumThreads(raw, 1), "stand-in");
  library_->check(api->SetSessionLogSeverityLevel(raw, ORT_LOGGING_LEVEL_FATAL), "stand-in");
  OrtSession* session = nullptr;
  library_->check(api->CreateSession(library_->env(), path.c_str(), raw, &session), "stand-in");
  session_.reset(session, api->ReleaseSession);
  size_t count = 0;
  library_->check(api->SessionGetInputCount(session, &count), "stand-in");
  for (size_t i = 0; i < count; ++i) inputs_.push_back(described(true, i));
  library_->check(api->SessionGetOutputCount(session, &count), "stand-in");
  for (size_t i = 0; i < count; ++i) outputs_.push_back(described(false, i));
}

Array OnnxSession::described(bool input, size_t index) const {
  const OrtApi* api = library_->api();
  OrtAllocator* allocator = nullptr;
  char* name = nullptr;
  OrtTypeInfo* raw = nullptr;
  library_->check(api->GetAllocatorWithDefaultOptions(&allocator), "stand-in");
  const auto get_name = input ? api->SessionGetInputName : api->SessionGetOutputName;
  const auto get_type = input ? api->SessionGetInputTypeInfo : api->SessionGetOutputTypeInfo;
  library_->check(get_name(session_.get(), index, allocator, &name), "stand-in");
  Array array{name, {}, {}, {}};
  library_->check(api->AllocatorFree(allocator, name), "stand-in");
  library_->check(get_type(session_.get(), index, &raw), "stand-in");
  const std::shared_ptr<OrtTypeInfo> type(raw, api->ReleaseTypeInfo);
  const OrtTensorTypeAndShapeInfo* info = nullptr;
  library_->check(api->CastTypeInfoToTensorInfo(raw, &info), "stand-in");
  read_type(*library_, info, array);
  return array;
}

std::vector<Array> OnnxSession::run(const std::vector<Array>& inputs) const {
  const OrtApi* api = library_->api();
  OrtMemoryInfo* raw = nullptr;
  library_->check(api->CreateCpuMemoryInfo(OrtDeviceAllocator, OrtMemTypeDefault, &raw), "stand-in");
  const std::shared_ptr<OrtMemoryInfo> memory(raw, api->ReleaseMemoryInfo);
  std::vector<std::shared_ptr<OrtValue>> held;
  std::vector<const OrtValue*> values;
  std::vector<const char*> names, wanted;
  static char nothing[8];
  for (const auto& array : inputs) {
    OrtValue* value = nullptr;
    void* const data = array.bytes.empty() ? nothing : const_cast<char*>(array.bytes.data());
    library_->check(api->CreateTensorWithDataAsOrtValue(raw, data, array.bytes.size(), array.shape.data(),
                                                        array.shape.size(), array.type, &value),
                    "stand-in");
    held.emplace_back(value, api->ReleaseValue);
    values.push_back(value);
    names.push_back(array.name.c_str());
  }
  for (const auto& array : outputs_) wanted.push_back(array.name.c_str());
  std::vector<OrtValue*> found(wanted.size(), nullptr);
  library_->check(api->Run(session_.get(), nullptr, names.data(), values.data(), values.size(), wanted.data(),
                           wanted.size(), found.data()),
                  "stand-in");
  std::vector<Array> outputs;
  for (size_t i = 0; i < found.size(); ++i) {
    const std::shared_ptr<OrtValue> value(found[i], api->ReleaseValue);
    OrtTensorTypeAndShapeInfo* info = nullptr;
    void* data = nullptr;
    Array array{outputs_[i].name, {}, {}, {}};
    library_->check(api->GetTensorTypeAndShape(found[i], &info), "stand-in");
    const std::shared_ptr<OrtTensorTypeAndShapeInfo> owned(info, api->ReleaseTensorTypeAndShapeInfo);
    read_type(*library_, info, array);
    library_->check(api->GetTensorMutableData(found[i], &data), "stand-in");
    array.bytes.assign(static_cast<char*>(data), static_cast<char*>(data) + array.nbytes());
    outputs.push_back(std::move(array));
  }
  return outputs;
}

}  // namespace stand_in
