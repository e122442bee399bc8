// TensorRT and TensorRT-RTX, which share one API: vision, embedding and decoder chained on the device.
// Mirrors runtime/backends/tensorrt.py.
//
// Every engine has an execution context per profile: decode where it admits the step, else prefill. All contexts
// compute in one scratch memory, one after the other on one stream. Caches lie in one allocation per group and are
// input and output at one address. A decode step that repeats the shapes and addresses of the one before is replayed as
// a CUDA graph; live windows come in buckets so that it does.
#include <fcntl.h>
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <set>

#include "backends/backend.hpp"
#include "backends/tensorrt/phase.hpp"
#include "core/user_cache.hpp"
#include "engines/fingerprint.hpp"

namespace vlmtrim::VLMTRIM_LIBRARY {
namespace {

using Turn = std::lock_guard<std::recursive_mutex>;
using Engine = std::shared_ptr<nvinfer1::ICudaEngine>;

struct Element {
  DType dtype;
  nvinfer1::DataType number;
};
constexpr Element kElements[] = {
    {DType::kFloat32, nvinfer1::DataType::kFLOAT}, {DType::kFloat16, nvinfer1::DataType::kHALF},
    {DType::kBFloat16, nvinfer1::DataType::kBF16}, {DType::kInt64, nvinfer1::DataType::kINT64},
    {DType::kInt32, nvinfer1::DataType::kINT32},   {DType::kBool, nvinfer1::DataType::kBOOL}};

std::string dtype_name(nvinfer1::DataType number) {
  for (const auto& element : kElements) {
    if (element.number == number) return name_of(element.dtype);
  }
  return "another dtype";
}

Tensor device_tensor(const std::shared_ptr<Memory>& memory, size_t offset, DType dtype, Shape shape) {
  Tensor made{dtype, std::move(shape), memory, static_cast<char*>(memory->address) + offset};
  made.on_device = true;
  return made;
}

// A deserialised engine with a phase per profile. Outputs hold until the graph's next run.
class TrtGraph final : public Graph {
 public:
  TrtGraph(const GraphSpec& spec, const Dims& dims, Shared& shared, const Profiles& profiles,
           const std::set<std::string>& names, const Engine& engine, Kernels& kernels)
      : Graph(spec, dims), shared_(shared), profiles_(profiles), names_(names), engine_(engine) {
    const Turn turn(shared.device.turn());
    for (size_t i = 0; i < profiles.size(); ++i) {
      const PhaseOrder order{*engine, static_cast<int32_t>(i), profiles[i].first, kernels};
      phases_.push_back(std::make_unique<Phase>(shared, order));
    }
    for (const auto* tensors : {&spec.inputs, &spec.outputs}) {
      for (const auto& tensor : *tensors) {
        slots_.emplace(tensor.name, Slot(shared.device, "io", most_bytes(tensor)));
      }
    }
    for (const auto& tensor : spec.outputs) free_outputs_.push_back(&tensor);
  }

 protected:
  Tensors execute(const Tensors& feeds, const Sizes& sizes) override {
    const Turn turn(shared_.device.turn());
    Phase& phase = *phases_[choose_profile(profiles_, sizes, spec_.file)];
    for (const auto& [name, value] : feeds) {
      if (names_.count(name) > 0) phase.set_shape(name, value.shape);
    }
    for (const auto& [name, value] : feeds) {
      if (names_.count(name) == 0) continue;
      phase.bind(name, value.on_device ? value.data : slots_.at(name).load(value));
    }
    Tensors results;
    for (const TensorSpec* tensor : free_outputs_) {
      const Shape& shape = phase.output_shape(tensor->name);
      Slot& slot = slots_.at(tensor->name);
      phase.bind(tensor->name, slot.fit(static_cast<size_t>(elements_of(shape)) * bytes_of(tensor->dtype)));
      results[tensor->name] = device_tensor(slot.memory(), 0, tensor->dtype, shape);
    }
    phase.launch();
    return results;
  }

  void bind(const Tensors& caches) override {
    const Turn turn(shared_.device.turn());
    caches_ = caches;  // keeps their memory alive
    std::set<std::string> bound;
    for (const auto& [past, cache] : caches) {
      const std::string present = "present" + past.substr(std::string("past_key_values").size());
      bound.insert(present);
      for (const auto& phase : phases_) {
        phase->set_shape(past, cache.shape);
        phase->bind(past, cache.data);
        phase->bind(present, cache.data);
      }
    }
    free_outputs_.clear();
    for (const auto& tensor : spec_.outputs) {
      if (bound.count(tensor.name) == 0) free_outputs_.push_back(&tensor);
    }
  }

 private:
  size_t most_bytes(const TensorSpec& tensor) const {
    size_t most = bytes_of(tensor.dtype);
    for (const auto& dim : tensor.shape) {
      const auto limits = dims_.find(dim.name);
      if (!dim.name.empty() && limits == dims_.end()) return SIZE_MAX;
      const auto size = static_cast<size_t>(dim.name.empty() ? dim.size : limits->second.second);
      if (__builtin_mul_overflow(most, size, &most)) return SIZE_MAX;
    }
    return most;
  }

  Shared& shared_;
  const Profiles& profiles_;
  const std::set<std::string>& names_;
  Engine engine_;
  std::vector<std::unique_ptr<Phase>> phases_;
  std::map<std::string, Slot> slots_;
  std::vector<const TensorSpec*> free_outputs_;
  Tensors caches_;
};

class TrtProgram final : public Program {
 public:
  TrtProgram(const GraphSpec& spec, const Dims& dims, Shared& shared, Profiles profiles, Engine engine,
             std::set<std::string> names, std::filesystem::path kernels)
      : spec_(spec),
        dims_(dims),
        shared_(shared),
        profiles_(std::move(profiles)),
        kernels_(std::move(kernels)),
        engine_(std::move(engine)),
        names_(std::move(names)) {}

  std::unique_ptr<Graph> graph() const override {
    return std::make_unique<TrtGraph>(spec_, dims_, shared_, profiles_, names_, engine_, kernels_);
  }

 private:
  const GraphSpec& spec_;
  const Dims& dims_;
  Shared& shared_;
  Profiles profiles_;
  mutable Kernels kernels_;  // under the device's lock
  Engine engine_;
  std::set<std::string> names_;
};

// A file's bytes, mapped: engines are as large as the weights.
class Mapped {
 public:
  explicit Mapped(const std::filesystem::path& path) : size_(std::filesystem::file_size(path)) {
    const int file = open(path.c_str(), O_RDONLY | O_CLOEXEC);
    void* const found =
        file < 0 ? MAP_FAILED : mmap(nullptr, std::max<size_t>(size_, 1), PROT_READ, MAP_PRIVATE, file, 0);
    if (file >= 0) close(file);
    if (found == MAP_FAILED) throw Refusal(said(path.string(), " cannot be read"));
    data_ = found;
  }
  Mapped(const Mapped&) = delete;
  Mapped& operator=(const Mapped&) = delete;
  ~Mapped() { munmap(data_, std::max<size_t>(size_, 1)); }
  const void* data() const { return data_; }
  size_t size() const { return size_; }

 private:
  size_t size_;
  void* data_ = nullptr;
};

class TrtBackend final : public Backend {
 public:
  explicit TrtBackend(const BackendOptions& options)
      : library_(options.tensorrt),
        shared_{device_, library_.messages(), Slot(device_, "activations"), Replay(captures(options.cuda_graphs)),
                options.cuda_graphs == "auto" && kReplaysItself} {}

  std::string name() const override { return kName; }

  void check(const Bundle& bundle) override {
    for (const auto& whole : bundle.contract.wholes()) {
      for (const auto& graph : bundle.contract.chain(whole)) find_fingerprint(bundle, graph, here());
    }
  }

  // In buckets, so that the shapes of decode steps repeat.
  int64_t window(int64_t length, int64_t capacity) const override { return bucket(length, capacity); }

  // One allocation a group; each cache begins at a multiple of 256 bytes.
  Tensors make_caches(const Contract& contract) override {
    const Turn turn(device_.turn());
    Tensors caches;
    for (const auto& group : contract.groups) {
      const Shape shape{1, group.kv_heads, group.capacity, group.head_size};
      const auto size = static_cast<size_t>(group.nbytes(1, contract.dtype)) / (2 * group.layers.size());
      const size_t each = (size + kAddressAlignment - 1) / kAddressAlignment * kAddressAlignment;
      const auto memory = device_.allocate(2 * each * group.layers.size(), "caches");
      device_.zero(memory->address, memory->nbytes);
      size_t offset = 0;
      for (const int64_t layer : group.layers) {
        for (const char* kind : {"key", "value"}) {
          caches[past_name(layer, kind)] = device_tensor(memory, offset, contract.dtype, shape);
          offset += each;
        }
      }
    }
    return caches;
  }

  Tensor to_host(const Tensor& tensor) override {
    if (!tensor.on_device) return tensor;
    const Turn turn(device_.turn());
    Tensor copy = Tensor::empty(tensor.dtype, tensor.shape);
    device_.read(copy.data, tensor.data, tensor.nbytes());
    return copy;
  }

 protected:
  bool chained() const override { return true; }

  std::unique_ptr<Program> open_one(const Bundle& bundle, const std::string& graph) override {
    const GraphSpec& spec = bundle.contract.graph(graph);
    const std::string file = graph + ".engine";
    Profiles profiles = find_fingerprint(bundle, graph, here()).profiles;
    const Engine engine = load(bundle, file);
    std::set<std::string> names;
    for (int32_t i = 0; i < engine->getNbIOTensors(); ++i) names.insert(engine->getIOTensorName(i));
    check_form(bundle, file, *engine, names, profiles.size());
    check_tensors(spec, file, *engine, names);
    auto kernels = user_cache() / "tensorrt-rtx" / (kernels_key(bundle, graph, device_.name()) + ".cache");
    return std::make_unique<TrtProgram>(spec, bundle.contract.dims, shared_, std::move(profiles), engine,
                                        std::move(names), std::move(kernels));
  }

 private:
#ifdef TRT_MAJOR_RTX
  static constexpr bool kReplaysItself = true;
#else
  static constexpr bool kReplaysItself = false;
#endif

  static bool captures(const std::string& how) {
    if (how != "auto" && how != "capture" && how != "off") {
      throw Refusal(said("cuda_graphs is ", shown(how), "; give one of auto, capture, off"));
    }
    return how == "capture" || (how == "auto" && !kReplaysItself);
  }

  Place here() const { return {kName, library_.version(), device_.capability()}; }

  Engine load(const Bundle& bundle, const std::string& file) {
    const Mapped data(bundle.files().file(file));
    library_.messages().clear();
    const Engine engine(library_.runtime().deserializeCudaEngine(data.data(), data.size()));
    if (engine) return engine;
    const auto [major, minor] = device_.capability();
    throw Refusal(said(kName, " ", library_.version(), " does not load ", file, " on ", device_.name(),
                       " (compute capability ", major, ".", minor, "): ", library_.messages().last(3),
                       "; build it again with: ", build_command(bundle, kName)));
  }

  static void check_form(const Bundle& bundle, const std::string& file, const nvinfer1::ICudaEngine& engine,
                         const std::set<std::string>& names, size_t profiles) {
    std::string on_host;
    for (const auto& name : names) {
      if (engine.getTensorLocation(name.c_str()) == nvinfer1::TensorLocation::kDEVICE) continue;
      on_host += (on_host.empty() ? "" : ", ") + name;
    }
    const int32_t found = engine.getNbOptimizationProfiles();
    if (on_host.empty() && found == static_cast<int32_t>(profiles)) return;
    throw Refusal(said(file, " does not match engines.json (", found, " profiles, on the host: [", on_host,
                       "]); build it again with: ", build_command(bundle, kName)));
  }

  // The library leaves out inputs that the graph does not use.
  static void check_tensors(const GraphSpec& spec, const std::string& file, const nvinfer1::ICudaEngine& engine,
                            const std::set<std::string>& names) {
    for (const auto* promised : {&spec.inputs, &spec.outputs}) {
      std::vector<TensorSpec> wanted;
      std::vector<Opened> there;
      for (const auto& tensor : *promised) {
        const bool found = names.count(tensor.name) > 0;
        if (found || promised == &spec.outputs) wanted.push_back(tensor);
        if (!found) continue;
        Opened opened{tensor.name, dtype_name(engine.getTensorDataType(tensor.name.c_str())), {}};
        const nvinfer1::Dims dims = engine.getTensorShape(tensor.name.c_str());
        for (int32_t i = 0; i < dims.nbDims; ++i) opened.dims.emplace_back(dims.d[i] < 0 ? -1 : dims.d[i]);
        there.push_back(std::move(opened));
      }
      check_boundary(file, wanted, there);
    }
    for (const auto& name : names) {
      if (spec.input(name) == nullptr && spec.output(name) == nullptr) {
        throw Refusal(said(file, " has ", name, ", which the contract does not name"));
      }
    }
  }

  Device device_;  // before the library, whose start takes longer than finding no GPU
  Library library_;
  Shared shared_;
};

const bool kAdded = add_backend(kName, [](const BackendOptions& options) -> std::unique_ptr<Backend> {
  return std::make_unique<TrtBackend>(options);
});

}  // namespace
}  // namespace vlmtrim::VLMTRIM_LIBRARY
