#include "backends/ort.hpp"

#include <algorithm>
#include <set>
#include <tuple>

#include "backends/ort_device.hpp"
#include "backends/ort_fusing.hpp"
#include "core/error.hpp"

namespace vlmtrim {
namespace {

using Device = std::shared_ptr<OrtDevice>;

constexpr double kFreeShare = 0.9;  // of the free memory that the weights may fill

class OrtGraph final : public Graph {
 public:
  OrtGraph(const GraphSpec& spec, const Dims& dims, Device device, Handle<OrtSession> session)
      : Graph(spec, dims),
        device_(std::move(device)),
        session_(std::move(session)),
        what_(spec.file + ": ONNX Runtime cannot run it") {
    const OrtApi* api = device_->library().api();
    OrtIoBinding* binding = nullptr;
    check(api->CreateIoBinding(session_.get(), &binding));
    binding_.reset(binding, api->ReleaseIoBinding);
    for (const auto& tensor : spec.outputs) outputs_.push_back(tensor.name);
  }

 protected:
  Tensors execute(const Tensors& feeds, const Sizes& /*sizes*/) override {
    const OrtApi* api = device_->library().api();
    std::vector<Handle<OrtValue>> values;  // alive until the run is over
    for (const auto& [name, tensor] : feeds) {
      values.push_back(device_->value_of(tensor, what_));
      check(api->BindInput(binding_.get(), name.c_str(), values.back().get()));
    }
    // Bound anew: a kept binding would hold the last step's shape.
    for (const auto& name : outputs_) check(api->BindOutputToDevice(binding_.get(), name.c_str(), device_->memory()));
    check(api->RunWithBinding(session_.get(), nullptr, binding_.get()));
    return results();
  }

  void bind(const Tensors& caches) override {
    const OrtApi* api = device_->library().api();
    api->ClearBoundInputs(binding_.get());
    api->ClearBoundOutputs(binding_.get());
    cache_values_.clear();
    std::set<std::string> updated;
    for (const auto& [past, tensor] : caches) {
      const std::string present = "present" + past.substr(std::string("past_key_values").size());
      cache_values_.push_back(device_->value_of(tensor, what_));
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
  void check(OrtStatus* status) const { device_->library().check(status, what_); }

  Tensors results() const {
    const auto values = device_->outputs_of(binding_.get(), what_);
    const size_t first = cache_values_.size();  // bound before all others
    if (values.size() != first + outputs_.size()) throw Refusal(spec_.file + ": ONNX Runtime returned other outputs");
    Tensors found;
    for (size_t i = first; i < values.size(); ++i) found[outputs_[i - first]] = device_->tensor_of(values[i], what_);
    return found;
  }

  Device device_;
  Handle<OrtSession> session_;
  std::string what_;
  Handle<OrtIoBinding> binding_;
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
  OrtProgram(const GraphSpec& spec, const Dims& dims, Device device, Handle<OrtSession> session)
      : spec_(spec), dims_(dims), device_(std::move(device)), session_(std::move(session)) {}

  std::unique_ptr<Graph> graph() const override { return std::make_unique<OrtGraph>(spec_, dims_, device_, session_); }

 private:
  const GraphSpec& spec_;
  const Dims& dims_;
  Device device_;
  Handle<OrtSession> session_;
};

class OrtBackend final : public Backend {
 public:
  OrtBackend(const BackendOptions& options, bool cuda)
      : device_(std::make_shared<OrtDevice>(OrtLibrary::get(options.library), cuda)),
        threads_(options.threads),
        level_(options.exact_activations ? "1" : "4") {}

  std::string name() const override { return device_->cuda() ? "ort-cuda" : "ort-cpu"; }

  void check(const Bundle& bundle) override {
    const Contract& contract = bundle.contract;
    device_->start();
    if (!device_->cuda() && contract.dtype == DType::kBFloat16) {
      throw Refusal(
          "ONNX Runtime has no bfloat16 kernels on the CPU; export with --dtype float32, or use a GPU backend");
    }
    std::set<std::tuple<std::string, int64_t>> tried;
    for (const auto& kind : contract.packed) {
      if (!tried.emplace(kind.format, kind.block).second || fuses(*device_, kind, contract.dtype, level_)) continue;
      throw Refusal(said(name(), " does not run ", kind.format, " weights: ONNX Runtime ", device_->library().version(),
                         " has no kernel for them here and would ",
                         rounds(kind) ? "multiply by them on the CPU" : "make floats of them",
                         " at every step; export with --weights int4 or int8"));
    }
    const auto& packed = contract.packed;
    if (std::none_of(packed.begin(), packed.end(), rounds) || !saturates(*device_)) return;
    for (const auto& kind : packed) {
      if (rounds(kind)) unsigned_.insert(kind.part == "tower" ? "vision.onnx" : "decoder.onnx");
    }
  }

  Tensors make_caches(const Contract& contract) override {
    if (!device_->cuda()) return Backend::make_caches(contract);
    Tensors caches;
    for (const auto& group : contract.groups) {
      const Tensor zeros = Tensor::zeros(contract.dtype, {1, group.kv_heads, group.capacity, group.head_size});
      for (const int64_t layer : group.layers) {
        for (const char* kind : {"key", "value"}) caches[past_name(layer, kind)] = device_->to_device(zeros);
      }
    }
    return caches;
  }

  Tensor to_host(const Tensor& tensor) override { return device_->to_host(tensor); }

 protected:
  std::unique_ptr<Program> open_one(const Bundle& bundle, const std::string& graph) override {
    const GraphSpec& spec = bundle.contract.graph(graph);
    if (!device_->cuda()) check_memory(bundle);
    const OrtLibrary& library = device_->library();
    const OrtApi* api = library.api();
    const Handle<OrtSessionOptions> options = device_->options();
    library.check(api->SetIntraOpNumThreads(options.get(), threads_), spec.file);
    library.check(api->AddSessionConfigEntry(options.get(), kAccuracyLevel, level_), spec.file);
    if (unsigned_.count(spec.file) != 0) {
      library.check(api->AddSessionConfigEntry(options.get(), kUnsigned, "1"), spec.file);
    }
    if (graph != "decoder") {  // what runs once a question need not keep threads busy until it runs again
      library.check(api->AddSessionConfigEntry(options.get(), "session.intra_op.allow_spinning", "0"), spec.file);
    }
    const std::string path = (bundle.folder / spec.file).string();
    OrtSession* session = nullptr;
    library.check(api->CreateSession(library.env(), path.c_str(), options.get(), &session),
                  "ONNX Runtime refuses " + path);
    const Handle<OrtSession> held(session, api->ReleaseSession);
    check_boundary(spec.file, spec.inputs, boundary(library, session, true, spec.file));
    check_boundary(spec.file, spec.outputs, boundary(library, session, false, spec.file));
    return std::make_unique<OrtProgram>(spec, bundle.contract.dims, device_, held);
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

  Device device_;
  int threads_;
  const char* level_;
  std::set<std::string> unsigned_;  // files of graphs whose integers are multiplied unsigned
};

}  // namespace

std::unique_ptr<Backend> make_ort_cpu(const BackendOptions& options) {
  return std::make_unique<OrtBackend>(options, false);
}
std::unique_ptr<Backend> make_ort_cuda(const BackendOptions& options) {
  return std::make_unique<OrtBackend>(options, true);
}

}  // namespace vlmtrim
