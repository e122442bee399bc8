#include "backends/tensorrt/phase.hpp"

#include <cstdio>

#include "core/user_cache.hpp"
#include "engines/profiles.hpp"

namespace vlmtrim::VLMTRIM_LIBRARY {

void Replay::refuse(const std::string& reason) {
  if (!on_.exchange(false)) return;
  std::fprintf(stderr, "no CUDA graphs: %s; decode steps are launched kernel by kernel\n", reason.c_str());
}

#ifdef TRT_MAJOR_RTX
void Kernels::use(nvinfer1::IRuntimeConfig& config) {
  if (!cache_) {
    cache_.reset(config.createRuntimeCache());
    const std::string data = read_kept(file_);
    if (cache_ && !data.empty() && cache_->deserialize(data.data(), data.size())) loaded_ = data;
  }
  if (cache_) config.setRuntimeCache(*cache_);
}

Kernels::~Kernels() {
  if (!cache_) return;
  const std::unique_ptr<nvinfer1::IHostMemory> compiled(cache_->serialize());
  if (!compiled) return;
  const std::string data(static_cast<const char*>(compiled->data()), compiled->size());
  if (data != loaded_) keep_for_later(file_, data);
}
#else
Kernels::~Kernels() = default;
#endif

Phase::Phase(Shared& shared, const PhaseOrder& order) : shared_(shared), decodes_(order.profile == kDecode) {
  constexpr auto kStrategy = nvinfer1::ExecutionContextAllocationStrategy::kUSER_MANAGED;
#ifdef TRT_MAJOR_RTX
  config_.reset(order.engine.createRuntimeConfig());
  if (config_) {
    config_->setExecutionContextAllocationStrategy(kStrategy);
    order.kernels.use(*config_);
    if (decodes_ && shared.by_library) {
      config_->setCudaGraphStrategy(nvinfer1::CudaGraphStrategy::kWHOLE_GRAPH_CAPTURE);
    }
    if (decodes_ && shared.replay.on()) {
      // What is captured stays: it must not be the kernels that only bridge the time of compiling.
      config_->setDynamicShapesKernelSpecializationStrategy(
          nvinfer1::DynamicShapesKernelSpecializationStrategy::kEAGER);
    }
    context_.reset(order.engine.createExecutionContext(config_.get()));
  }
#else
  context_.reset(order.engine.createExecutionContext(kStrategy));
#endif
  if (!context_ || !context_->setOptimizationProfileAsync(order.index, shared.device.stream())) {
    throw Refusal(said(kName, " cannot make a context for ", order.profile, ": ", shared.messages.last(3)));
  }
}

void Phase::set_shape(const std::string& name, const Shape& shape) {
  const auto known = shapes_.find(name);
  if (known != shapes_.end() && known->second == shape) return;
  nvinfer1::Dims dims{};
  const bool fits = shape.size() <= static_cast<size_t>(nvinfer1::Dims::MAX_DIMS);
  dims.nbDims = fits ? static_cast<int32_t>(shape.size()) : 0;
  for (size_t i = 0; fits && i < shape.size(); ++i) dims.d[i] = shape[i];
  accept(fits && context_->setInputShape(name.c_str(), dims), said(name, " of shape ", said_of(shape)));
  shapes_[name] = shape;
  reshaped_ = true;
}

const Shape& Phase::output_shape(const std::string& name) {
  settle();
  Shape& shape = outputs_[name];
  if (shape.empty()) {
    const nvinfer1::Dims dims = context_->getTensorShape(name.c_str());
    accept(dims.nbDims >= 0, "the shape of " + name);
    shape.assign(dims.d, dims.d + dims.nbDims);
    for (const int64_t size : shape) accept(size >= 0, said(name, ", whose shape depends on the data"));
  }
  return shape;
}

void Phase::settle() {
  if (!reshaped_) return;
  reshaped_ = false;
  moved_ = true;
  outputs_.clear();
  const char* missing = "";
  const int32_t count = context_->inferShapes(1, &missing);
  accept(count == 0, said("a step without the shape of ", count > 0 ? missing : "an input"));
  scratch_needed_ = context_->updateDeviceMemorySizeForShapes();
}

void Phase::bind(const std::string& name, void* address) {
  auto& known = addresses_[name];
  if (known == address) return;
  accept(context_->setTensorAddress(name.c_str(), address), "the address of " + name);
  known = address;
  moved_ = true;
}

// The plain run comes first because the library settles on shapes in it; the graph belongs to the last step alone,
// since the library may keep what depends on shapes in memory that the next shapes overwrite.
void Phase::launch() {
  settle();
  void* const scratch = shared_.scratch.fit(scratch_needed_);
  const size_t size = shared_.scratch.memory()->nbytes;
  if (scratch != scratch_at_ || size != scratch_size_) {
    scratch_at_ = scratch;
    scratch_size_ = size;
    context_->setDeviceMemoryV2(scratch, static_cast<int64_t>(size));
    moved_ = true;
  }
  if (moved_) {
    moved_ = false;
    graph_.reset();
    return execute();
  }
  if (!graph_ && decodes_ && shared_.replay.on()) graph_ = capture();
  graph_ ? shared_.device.launch(*graph_) : execute();
}

void Phase::execute() { accept(context_->enqueueV3(shared_.device.stream()), "a launch"); }

std::unique_ptr<CapturedGraph> Phase::capture() {
  try {
    return shared_.device.capture([this] { return context_->enqueueV3(shared_.device.stream()); });
  } catch (const CudaError& error) {
    shared_.replay.refuse(error.what());
    return nullptr;
  }
}

void Phase::accept(bool accepted, const std::string& what) const {
  if (!accepted) throw Refusal(said("TensorRT refuses ", what, ": ", shared_.messages.last(2)));
}

}  // namespace vlmtrim::VLMTRIM_LIBRARY
