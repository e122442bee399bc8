#include "backends/ort.hpp"

#include <sys/stat.h>

#include <set>
#include <tuple>

#include "backends/ort_fusing.hpp"
#include "backends/ort_library.hpp"
#include "core/error.hpp"

namespace vlmtrim {
namespace {

using Library = std::shared_ptr<OrtLibrary>;

constexpr double kFreeShare = 0.9;  // of the free memory that the weights may fill

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

std::optional<DType> dtype_of(ONNXTensorElementDataType number) {
  for (const auto& element : kElements) {
    if (element.number == number) return element.dtype;
  }
  return std::nullopt;
}

// A handle of the C API with the function that releases it.
template <class T>
using Handle = std::shared_ptr<T>;

class OrtGraph final : public Graph {
 public:
  OrtGraph(const GraphSpec& spec, const Dims& dims, Library library, Handle<OrtSession> session)
      : Graph(spec, dims), library_(std::move(library)), session_(std::move(session)) {
    const OrtApi* api = library_->api();
    OrtIoBinding* binding = nullptr;
    library_->check(api->CreateIoBinding(session_.get(), &binding), spec.file);
    binding_.reset(binding, api->ReleaseIoBinding);
    OrtMemoryInfo* memory = nullptr;
    library_->check(api->CreateCpuMemoryInfo(OrtDeviceAllocator, OrtMemTypeDefault, &memory), spec.file);
    memory_.reset(memory, api->ReleaseMemoryInfo);
    for (const auto& tensor : spec.outputs) outputs_.push_back(tensor.name);
  }

 protected:
  Tensors execute(const Tensors& feeds, const Sizes& /*sizes*/) override {
    const OrtApi* api = library_->api();
    std::vector<Handle<OrtValue>> values;  // alive until the run is over
    for (const auto& [name, tensor] : feeds) {
      values.push_back(value_of(tensor));
      check(api->BindInput(binding_.get(), name.c_str(), values.back().get()));
    }
    // Bound anew: a kept binding would hold the last step's shape.
    for (const auto& name : outputs_) check(api->BindOutputToDevice(binding_.get(), name.c_str(), memory_.get()));
    check(api->RunWithBinding(session_.get(), nullptr, binding_.get()));
    return results();
  }

  void bind(const Tensors& caches) override {
    const OrtApi* api = library_->api();
    api->ClearBoundInputs(binding_.get());
    api->ClearBoundOutputs(binding_.get());
    cache_values_.clear();
    std::set<std::string> updated;
    for (const auto& [past, tensor] : caches) {
      const std::string present = "present" + past.substr(std::string("past_key_values").size());
      cache_values_.push_back(value_of(tensor));
      check(api->BindInput(binding_.get(), past.c_str(), cache_values_.back().get()));
      check(api->BindOutput(binding_.get(), present.c_str(), cache_values_.back().get()));
      updated.insert(present);
    }
    outputs_.clear();
    for (const auto& tensor : spec_.outputs) {
      if (updated.count(tensor.name) == 0) outputs_.push_back(tensor.name);
    }
  }

 private:
  void check(OrtStatus* status) const { library_->check(status, spec_.file + ": ONNX Runtime cannot run it"); }

  Handle<OrtValue> value_of(const Tensor& tensor) const {
    OrtValue* value = nullptr;
    check(library_->api()->CreateTensorWithDataAsOrtValue(memory_.get(), tensor.data, tensor.nbytes(),
                                                          tensor.shape.data(), tensor.shape.size(),
                                                          element_of(tensor.dtype), &value));
    return {value, library_->api()->ReleaseValue};
  }

  Tensors results() const {
    const OrtApi* api = library_->api();
    OrtAllocator* allocator = nullptr;
    check(api->GetAllocatorWithDefaultOptions(&allocator));
    OrtValue** values = nullptr;
    size_t count = 0;
    check(api->GetBoundOutputValues(binding_.get(), allocator, &values, &count));
    Tensors found;
    const size_t first = cache_values_.size();  // bound before all others
    for (size_t i = 0; i < count; ++i) {
      const Handle<OrtValue> value(values[i], api->ReleaseValue);
      if (i >= first && i - first < outputs_.size()) found[outputs_[i - first]] = tensor_of(value);
    }
    if (values != nullptr) check(api->AllocatorFree(allocator, values));
    if (count != first + outputs_.size()) throw Refusal(spec_.file + ": ONNX Runtime returned other outputs");
    return found;
  }

  Tensor tensor_of(const Handle<OrtValue>& value) const {
    const OrtApi* api = library_->api();
    OrtTensorTypeAndShapeInfo* raw = nullptr;
    check(api->GetTensorTypeAndShape(value.get(), &raw));
    const Handle<OrtTensorTypeAndShapeInfo> info(raw, api->ReleaseTensorTypeAndShapeInfo);
    size_t rank = 0;
    ONNXTensorElementDataType number{};
    check(api->GetDimensionsCount(raw, &rank));
    check(api->GetTensorElementType(raw, &number));
    Tensor tensor;
    tensor.shape.resize(rank);
    check(api->GetDimensions(raw, tensor.shape.data(), rank));
    const auto dtype = dtype_of(number);
    if (!dtype) throw Refusal(said(spec_.file, " returned a tensor of a dtype that no contract has"));
    tensor.dtype = *dtype;
    check(api->GetTensorMutableData(value.get(), &tensor.data));
    tensor.owner = value;
    return tensor;
  }

  Library library_;
  Handle<OrtSession> session_;
  Handle<OrtIoBinding> binding_;
  Handle<OrtMemoryInfo> memory_;
  std::vector<Handle<OrtValue>> cache_values_;
  std::vector<std::string> outputs_;
};

// What a session says of its inputs or outputs.
std::vector<Opened> boundary(const OrtLibrary& library, OrtSession* session, bool inputs, const std::string& file) {
  const OrtApi* api = library.api();
  OrtAllocator* allocator = nullptr;
  library.check(api->GetAllocatorWithDefaultOptions(&allocator), file);
  size_t count = 0;
  library.check(inputs ? api->SessionGetInputCount(session, &count) : api->SessionGetOutputCount(session, &count),
                file);
  std::vector<Opened> found;
  for (size_t i = 0; i < count; ++i) {
    char* name = nullptr;
    library.check(inputs ? api->SessionGetInputName(session, i, allocator, &name)
                         : api->SessionGetOutputName(session, i, allocator, &name),
                  file);
    Opened opened{name, "", {}};
    library.check(api->AllocatorFree(allocator, name), file);
    OrtTypeInfo* raw = nullptr;
    library.check(
        inputs ? api->SessionGetInputTypeInfo(session, i, &raw) : api->SessionGetOutputTypeInfo(session, i, &raw),
        file);
    const Handle<OrtTypeInfo> type(raw, api->ReleaseTypeInfo);
    const OrtTensorTypeAndShapeInfo* info = nullptr;
    library.check(api->CastTypeInfoToTensorInfo(raw, &info), file);
    if (info == nullptr) throw Refusal(said(file, ": ", opened.name, " is no tensor; export the model again"));
    ONNXTensorElementDataType number{};
    size_t rank = 0;
    library.check(api->GetTensorElementType(info, &number), file);
    library.check(api->GetDimensionsCount(info, &rank), file);
    std::vector<int64_t> sizes(rank);
    std::vector<const char*> symbols(rank, nullptr);
    library.check(api->GetDimensions(info, sizes.data(), rank), file);
    library.check(api->GetSymbolicDimensions(info, symbols.data(), rank), file);
    const auto dtype = dtype_of(number);
    opened.dtype = dtype ? name_of(*dtype) : "another dtype";
    for (size_t d = 0; d < rank; ++d) {
      const bool named = symbols[d] != nullptr && *symbols[d] != 0;
      opened.dims.push_back(named ? Dim(std::string(symbols[d])) : Dim(sizes[d]));
    }
    found.push_back(std::move(opened));
  }
  return found;
}

class OrtProgram final : public Program {
 public:
  OrtProgram(const GraphSpec& spec, const Dims& dims, Library library, Handle<OrtSession> session)
      : spec_(spec), dims_(dims), library_(std::move(library)), session_(std::move(session)) {}

  std::unique_ptr<Graph> graph() const override { return std::make_unique<OrtGraph>(spec_, dims_, library_, session_); }

 private:
  const GraphSpec& spec_;
  const Dims& dims_;
  Library library_;
  Handle<OrtSession> session_;
};

class OrtCpu final : public Backend {
 public:
  explicit OrtCpu(const BackendOptions& options)
      : library_(OrtLibrary::get(options.library)),
        threads_(options.threads),
        level_(options.exact_activations ? "1" : "4") {}

  std::string name() const override { return "ort-cpu"; }

  void check(const Bundle& bundle) override {
    const Contract& contract = bundle.contract;
    if (contract.dtype == DType::kBFloat16) {
      throw Refusal(
          "ONNX Runtime has no bfloat16 kernels on the CPU; export with --dtype float32, or use a GPU backend");
    }
    std::set<std::tuple<std::string, int64_t>> tried;
    for (const auto& kind : contract.packed) {
      if (!tried.emplace(kind.format, kind.block).second || fuses(*library_, kind, contract.dtype, level_)) continue;
      throw Refusal(said("ort-cpu does not run ", kind.format, " weights: ONNX Runtime ", library_->version(),
                         " has no kernel for them here and would make floats of them at every step; "
                         "export with --weights int4 or int8"));
    }
  }

  Tensor to_host(const Tensor& tensor) override {
    Tensor copy = Tensor::empty(tensor.dtype, tensor.shape);
    std::memcpy(copy.data, tensor.data, tensor.nbytes());
    return copy;
  }

 protected:
  std::unique_ptr<Program> open_one(const Bundle& bundle, const std::string& graph) override {
    const GraphSpec& spec = bundle.contract.graph(graph);
    check_memory(bundle);
    const OrtApi* api = library_->api();
    OrtSessionOptions* raw = nullptr;
    library_->check(api->CreateSessionOptions(&raw), spec.file);
    const Handle<OrtSessionOptions> options(raw, api->ReleaseSessionOptions);
    library_->check(api->SetIntraOpNumThreads(raw, threads_), spec.file);
    library_->check(api->SetSessionLogSeverityLevel(raw, ORT_LOGGING_LEVEL_FATAL), spec.file);
    library_->check(api->AddSessionConfigEntry(raw, kAccuracyLevel, level_), spec.file);
    if (graph != "decoder") {  // what runs once a question need not keep threads busy until it runs again
      library_->check(api->AddSessionConfigEntry(raw, "session.intra_op.allow_spinning", "0"), spec.file);
    }
    const std::string path = (bundle.folder / spec.file).string();
    OrtSession* session = nullptr;
    library_->check(api->CreateSession(library_->env(), path.c_str(), raw, &session), "ONNX Runtime refuses " + path);
    const Handle<OrtSession> held(session, api->ReleaseSession);
    check_boundary(spec.file, spec.inputs, boundary(*library_, session, true, spec.file));
    check_boundary(spec.file, spec.outputs, boundary(*library_, session, false, spec.file));
    return std::make_unique<OrtProgram>(spec, bundle.contract.dims, library_, held);
  }

 private:
  // What the CPU provider keeps in memory: weights transposed or packed anew, float16 ones as float32.
  void check_memory(const Bundle& bundle) const {
    int64_t weights = 0, packed = 0;
    for (const auto& [name, digest] : bundle.sums) {
      const std::filesystem::path path = bundle.folder / name;
      if (path.extension() == ".safetensors") weights += static_cast<int64_t>(std::filesystem::file_size(path));
    }
    for (const auto& kind : bundle.contract.packed) packed = std::min(packed + kind.nbytes, weights);
    const int64_t needed = packed + (weights - packed) * (bundle.contract.dtype == DType::kFloat16 ? 2 : 1);
    const int64_t free = free_memory();
    if (static_cast<double>(needed) > kFreeShare * static_cast<double>(free)) {
      throw Refusal(said("the bundle's weights take ", static_cast<double>(needed) / 1e9, " GB of memory, ",
                         static_cast<double>(free) / 1e9,
                         " GB are free; free some, or export with fewer bits (--weights int4, --vision-weights int8)"));
    }
  }

  Library library_;
  int threads_;
  const char* level_;
};

}  // namespace

std::unique_ptr<Backend> make_ort(const BackendOptions& options) { return std::make_unique<OrtCpu>(options); }

}  // namespace vlmtrim
