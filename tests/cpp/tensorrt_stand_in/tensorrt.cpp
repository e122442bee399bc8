// TensorRT and TensorRT-RTX without a GPU: an engine names its ONNX file, which ONNX Runtime runs on the bytes at the
// bound addresses.
//
// Strict where the real library's documentation is: shapes must lie in the context's profile, every tensor needs an
// aligned address in live device memory, a cache and its update must share one, scratch memory must be large enough, a
// context must have run once with its shapes before it is captured, and a captured graph must not outlive them.
#include <NvInferRuntime.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <map>
#include <nlohmann/json.hpp>
#include <set>

#include "device.hpp"
#include "session.hpp"

namespace stand_in {
namespace {

using nvinfer1::Dims;
using Json = nlohmann::json;
using Shape = std::vector<int64_t>;
constexpr const char* kMagic = "fake engine ";

Dims dims_of(const Shape& shape) {
  Dims dims{};
  dims.nbDims = static_cast<int32_t>(shape.size());
  for (size_t i = 0; i < shape.size(); ++i) dims.d[i] = shape[i];
  return dims;
}

nvinfer1::DataType number_of(ONNXTensorElementDataType type) {
  switch (type) {
    case ONNX_TENSOR_ELEMENT_DATA_TYPE_INT64:
      return nvinfer1::DataType::kINT64;
    case ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT16:
      return nvinfer1::DataType::kHALF;
    case ONNX_TENSOR_ELEMENT_DATA_TYPE_BFLOAT16:
      return nvinfer1::DataType::kBF16;
    case ONNX_TENSOR_ELEMENT_DATA_TYPE_BOOL:
      return nvinfer1::DataType::kBOOL;
    case ONNX_TENSOR_ELEMENT_DATA_TYPE_INT32:
      return nvinfer1::DataType::kINT32;
    default:
      return nvinfer1::DataType::kFLOAT;
  }
}

// Whether a float array holds bits of fresh memory.
bool is_unwritten(const Array& array) {
  const bool half = array.type == ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT16;
  if (!half && array.type != ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT) return false;
  const size_t step = half ? 2 : 4;
  for (size_t at = 0; at + step <= array.bytes.size(); at += step) {
    if (std::memcmp(array.bytes.data() + at, "\xFF\xFF\xFF\xFF", step) == 0) return true;
  }
  return false;
}

#ifdef TRT_MAJOR_RTX
class Blob final : public nvinfer1::IHostMemory {
 public:
  explicit Blob(std::string bytes) : bytes_(std::move(bytes)) {}
  void* data() const noexcept override { return const_cast<char*>(bytes_.data()); }
  std::size_t size() const noexcept override { return bytes_.size(); }

 private:
  std::string bytes_;
};

// What it holds are the shapes that contexts ran with, in place of kernels.
class RuntimeCache final : public nvinfer1::IRuntimeCache {
 public:
  nvinfer1::IHostMemory* serialize() const noexcept override { return new Blob("kernels " + Json(kernels).dump()); }
  bool deserialize(void const* blob, std::size_t size) noexcept override {
    const std::string text(static_cast<const char*>(blob), size);
    if (text.rfind("kernels ", 0) != 0) return false;
    kernels = Json::parse(text.substr(8)).get<std::set<std::string>>();
    count("kernels found");
    return true;
  }

  std::set<std::string> kernels;
};

class RuntimeConfig final : public nvinfer1::IRuntimeConfig {
 public:
  void setExecutionContextAllocationStrategy(nvinfer1::ExecutionContextAllocationStrategy given) noexcept override {
    strategy = given;
  }
  nvinfer1::IRuntimeCache* createRuntimeCache() const noexcept override { return new RuntimeCache; }
  bool setRuntimeCache(nvinfer1::IRuntimeCache& given) noexcept override {
    cache = static_cast<RuntimeCache*>(&given);
    return true;
  }
  bool setCudaGraphStrategy(nvinfer1::CudaGraphStrategy given) noexcept override {
    if (given == nvinfer1::CudaGraphStrategy::kWHOLE_GRAPH_CAPTURE) count("replayed by the library");
    return true;
  }
  void setDynamicShapesKernelSpecializationStrategy(
      nvinfer1::DynamicShapesKernelSpecializationStrategy given) noexcept override {
    if (given == nvinfer1::DynamicShapesKernelSpecializationStrategy::kEAGER) count("eager");
  }

  nvinfer1::ExecutionContextAllocationStrategy strategy{};
  RuntimeCache* cache = nullptr;
};
#endif

// An engine, shared by its contexts.
struct Plan {
  explicit Plan(const Json& plan) : session(plan.at("onnx").get<std::string>()), profiles(plan.at("profiles")) {
    for (const auto& array : session.inputs()) tensors[array.name] = &array;
    for (const auto& array : session.outputs()) tensors[array.name] = &array;
  }

  OnnxSession session;
  Json profiles;
  std::map<std::string, const Array*> tensors;
};

class Context final : public nvinfer1::IExecutionContext {
 public:
  Context(std::shared_ptr<const Plan> plan, std::set<std::string>* kernels)
      : plan_(std::move(plan)), kernels_(kernels), state_(std::make_shared<State>()) {}

  bool setOptimizationProfileAsync(int32_t index, cudaStream_t stream) noexcept override {
    profile_ = &plan_->profiles.at(static_cast<size_t>(index));
    return stream != nullptr;
  }

  bool setInputShape(char const* name, Dims const& dims) noexcept override {
    const Shape shape(dims.d, dims.d + dims.nbDims);
    const Json& limits = profile_->at(name);
    if (limits.at(0).size() != shape.size()) return false;
    for (size_t i = 0; i < shape.size(); ++i) {
      if (shape[i] < limits.at(0).at(i).get<int64_t>() || shape[i] > limits.at(2).at(i).get<int64_t>()) return false;
    }
    shapes_[name] = shape;
    inferred_.clear();
    settled_ = false;
    ++state_->generation;
    return true;
  }

  int32_t inferShapes(int32_t most, char const** names) noexcept override {
    int32_t missing = 0;
    for (const auto& input : plan_->session.inputs()) {
      if (shapes_.count(input.name) > 0) continue;
      if (missing < most) names[missing] = input.name.c_str();
      ++missing;
    }
    return missing;
  }

  Dims getTensorShape(char const* name) const noexcept override { return dims_of(shape(name)); }

  std::size_t updateDeviceMemorySizeForShapes() noexcept override {
    needed_ = 0;
    for (const auto& [name, shape] : shapes_) {
      if (name.rfind("past", 0) == 0) continue;
      size_t count = 4;
      for (const int64_t size : shape) count *= static_cast<size_t>(size);
      needed_ += count;
    }
    return needed_;
  }

  void setDeviceMemoryV2(void* memory, int64_t size) noexcept override {
    if (!is_on_device(memory, static_cast<size_t>(size))) blame("the scratch memory is not on the device");
    scratch_ = memory;
    scratch_size_ = static_cast<size_t>(size);
  }

  bool setTensorAddress(char const* name, void* data) noexcept override {
    if (plan_->tensors.count(name) == 0 || data == nullptr || reinterpret_cast<uintptr_t>(data) % 256 != 0) {
      blame(std::string("a bad address of ") + name);
    }
    addresses_[name] = data;
    return true;
  }

  bool enqueueV3(cudaStream_t stream) noexcept override {
    const char* missing = nullptr;
    if (stream == nullptr || profile_ == nullptr || inferShapes(1, &missing) > 0) blame("a launch before its shapes");
    if (scratch_size_ < needed_) blame("the scratch memory is too small for these shapes");
    const bool captured = capturing();
    if (captured && !settled_) blame("captured before a plain run with these shapes");
    if (captured && !launches_in_capture()) return false;
    settled_ = true;
    if (kernels_ != nullptr) kernels_->insert(Json(shapes_).dump());
    submit(work(captured));
    return true;
  }

 private:
  struct State {
    int64_t generation = 0;
  };

  // What shapes are found with: zeros, and visual tokens in front of others. A selection cannot keep as many of one
  // place.
  Array made_up(const Array& input) const {
    Array array{input.name, input.type, shapes_.at(input.name), {}};
    array.bytes.assign(array.nbytes(), 0);
    const auto positions = shapes_.find("position_ids");  // not of every piece of a chain
    const int64_t tokens = positions == shapes_.end() ? 1 : positions->second.back();
    auto* numbers = reinterpret_cast<int64_t*>(array.bytes.data());
    for (size_t i = 0; i < array.bytes.size() / sizeof(int64_t); ++i) {
      if (input.name == "visual_positions") numbers[i] = static_cast<int64_t>(i) % array.shape.back();
      if (input.name == "last_index") numbers[i] = tokens - 1;
    }
    return array;
  }

  const Shape& shape(const std::string& name) const {
    const auto given = shapes_.find(name);
    if (given != shapes_.end()) return given->second;
    if (inferred_.empty()) {
      std::vector<Array> feeds;
      for (const auto& input : plan_->session.inputs()) feeds.push_back(made_up(input));
      for (const auto& output : plan_->session.run(feeds)) inferred_[output.name] = output.shape;
    }
    return inferred_.at(name);
  }

  // What runs when the host waits: nothing of this context is read then but its generation.
  std::function<void()> work(bool captured) const {
    std::map<std::string, Shape> shapes;
    for (const auto& [name, tensor] : plan_->tensors) shapes[name] = shape(name);
    return [plan = plan_, shapes, addresses = addresses_, scratch = scratch_, needed = needed_, state = state_,
            generation = state_->generation, captured] {
      if (captured && generation != state->generation) blame("a graph was launched that other shapes outdated");
      if (!is_on_device(scratch, needed)) return blame("the scratch memory was freed");
      std::memset(scratch, 0xAB, needed);
      std::vector<Array> feeds;
      for (const auto& input : plan->session.inputs()) {
        Array array{input.name, input.type, shapes.at(input.name), {}};
        const auto address = addresses.find(input.name);
        if (address == addresses.end() || !is_on_device(address->second, array.nbytes())) {
          return blame(input.name + " is not on the device");
        }
        const auto* data = static_cast<const char*>(address->second);
        array.bytes.assign(data, data + array.nbytes());
        if (is_unwritten(array)) return blame(input.name + " is not written");
        feeds.push_back(std::move(array));
      }
      for (const auto& array : plan->session.run(feeds)) {
        const auto address = addresses.find(array.name);
        if (address == addresses.end() || !is_on_device(address->second, array.nbytes())) {
          return blame(array.name + " is not on the device");
        }
        if (array.name.rfind("present", 0) == 0 &&
            address->second != addresses.at("past_key_values" + array.name.substr(7))) {
          blame(array.name + " does not update its input");
        }
        std::copy(array.bytes.begin(), array.bytes.end(), static_cast<char*>(address->second));
      }
    };
  }

  std::shared_ptr<const Plan> plan_;
  std::set<std::string>* kernels_;
  std::shared_ptr<State> state_;
  const Json* profile_ = nullptr;
  std::map<std::string, Shape> shapes_;
  mutable std::map<std::string, Shape> inferred_;
  std::map<std::string, void*> addresses_;
  void* scratch_ = nullptr;
  size_t scratch_size_ = 0, needed_ = 0;
  bool settled_ = false;
};

class Engine final : public nvinfer1::ICudaEngine {
 public:
  explicit Engine(const Json& plan) : plan_(std::make_shared<Plan>(plan)) {}

  int32_t getNbIOTensors() const noexcept override { return static_cast<int32_t>(plan_->tensors.size()); }
  char const* getIOTensorName(int32_t index) const noexcept override {
    return std::next(plan_->tensors.begin(), index)->first.c_str();
  }
  nvinfer1::TensorLocation getTensorLocation(char const*) const noexcept override {
    return nvinfer1::TensorLocation::kDEVICE;
  }
  Dims getTensorShape(char const* name) const noexcept override { return dims_of(plan_->tensors.at(name)->shape); }
  nvinfer1::DataType getTensorDataType(char const* name) const noexcept override {
    return number_of(plan_->tensors.at(name)->type);
  }
  int32_t getNbOptimizationProfiles() const noexcept override { return static_cast<int32_t>(plan_->profiles.size()); }
#ifdef TRT_MAJOR_RTX
  nvinfer1::IRuntimeConfig* createRuntimeConfig() noexcept override { return new RuntimeConfig; }
  nvinfer1::IExecutionContext* createExecutionContext(nvinfer1::IRuntimeConfig* config) noexcept override {
    const auto* given = static_cast<RuntimeConfig*>(config);
    return made(given->strategy, given->cache != nullptr ? &given->cache->kernels : nullptr);
  }
#else
  nvinfer1::IExecutionContext* createExecutionContext(
      nvinfer1::ExecutionContextAllocationStrategy strategy) noexcept override {
    return made(strategy, nullptr);
  }
#endif

 private:
  nvinfer1::IExecutionContext* made(nvinfer1::ExecutionContextAllocationStrategy strategy,
                                    std::set<std::string>* kernels) const {
    if (strategy != nvinfer1::ExecutionContextAllocationStrategy::kUSER_MANAGED) blame("a context allocates memory");
    count("contexts");
    return new Context(plan_, kernels);
  }

  std::shared_ptr<const Plan> plan_;
};

class Runtime final : public nvinfer1::IRuntime {
 public:
  explicit Runtime(nvinfer1::ILogger& logger) : logger_(logger) {}

  nvinfer1::ICudaEngine* deserializeCudaEngine(void const* blob, std::size_t size) noexcept override {
    const std::string text(static_cast<const char*>(blob), size);
    if (text.rfind(kMagic, 0) == 0) return new Engine(Json::parse(text.substr(std::strlen(kMagic))));
    logger_.log(nvinfer1::ILogger::Severity::kERROR, "not an engine");
    return nullptr;
  }

 private:
  nvinfer1::ILogger& logger_;
};

}  // namespace
}  // namespace stand_in

extern "C" {
STAND_IN_API int32_t getInferLibMajorVersion() { return NV_TENSORRT_MAJOR; }
STAND_IN_API int32_t getInferLibMinorVersion() { return NV_TENSORRT_MINOR; }
STAND_IN_API int32_t getInferLibPatchVersion() { return NV_TENSORRT_PATCH; }
STAND_IN_API int32_t getInferLibBuildVersion() { return NV_TENSORRT_BUILD; }
STAND_IN_API void* createInferRuntime_INTERNAL(void* logger, int32_t version) {
  if (version != NV_TENSORRT_VERSION) return nullptr;
  nvinfer1::IRuntime* const made = new stand_in::Runtime(*static_cast<nvinfer1::ILogger*>(logger));
  return made;
}
}
