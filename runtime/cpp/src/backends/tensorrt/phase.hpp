// One profile of an engine: its execution context, what is bound to it, and the CUDA graph of its last step.
// Mirrors Phase, Replay and Kernels in runtime/backends/tensorrt.py.
#pragma once

#include <NvInferRuntime.h>

#include <atomic>
#include <filesystem>
#include <map>
#include <memory>
#include <mutex>
#include <string>

#include "backends/tensorrt/cuda.hpp"
#include "backends/tensorrt/library.hpp"

namespace vlmtrim::VLMTRIM_LIBRARY {

// Whether decode steps are captured. The first refusal of the library ends it for all graphs, and is said once.
class Replay {
 public:
  explicit Replay(bool on) : on_(on) {}
  bool on() const { return on_; }
  // Launch plainly from now on.
  void refuse(const std::string& reason);

 private:
  std::atomic<bool> on_;
};

// What TensorRT-RTX compiled for this GPU out of one engine, kept for the next start; TensorRT needs none.
class Kernels {
 public:
  explicit Kernels(std::filesystem::path file) : file_(std::move(file)) {}
  Kernels(const Kernels&) = delete;
  Kernels& operator=(const Kernels&) = delete;
  ~Kernels();  // writes what was compiled since

#ifdef TRT_MAJOR_RTX
  // Lets a context compile into the cache and take from it.
  void use(nvinfer1::IRuntimeConfig& config);

 private:
  std::unique_ptr<nvinfer1::IRuntimeCache> cache_;
  std::string loaded_;
#else
 private:
#endif
  std::filesystem::path file_;
};

// What all contexts of a backend share.
struct Shared {
  Device& device;
  Messages& messages;
  Slot scratch;
  Replay replay;
  bool by_library;  // decode steps are replayed by the library itself
};

// How one context is made.
struct PhaseOrder {
  nvinfer1::ICudaEngine& engine;
  int32_t index;  // of the profile
  std::string profile;
  Kernels& kernels;
};

class Phase {
 public:
  // Throws Refusal where the library makes no context.
  Phase(Shared& shared, const PhaseOrder& order);

  // Shape of an input; it stays until another is set.
  void set_shape(const std::string& name, const Shape& shape);
  // Shape of an output under the shapes of the inputs.
  const Shape& output_shape(const std::string& name);
  // Address of an input or output.
  void bind(const std::string& name, void* address);
  // Queues the step: plainly where anything moved since the last one, else as a CUDA graph.
  void launch();

 private:
  void settle();
  void execute();
  std::unique_ptr<CapturedGraph> capture();
  void accept(bool accepted, const std::string& what) const;

  Shared& shared_;
  const bool decodes_;
#ifdef TRT_MAJOR_RTX
  std::unique_ptr<nvinfer1::IRuntimeConfig> config_;
#endif
  std::unique_ptr<nvinfer1::IExecutionContext> context_;
  std::map<std::string, Shape> shapes_, outputs_;
  std::map<std::string, void*> addresses_;
  void* scratch_at_ = nullptr;
  size_t scratch_size_ = 0, scratch_needed_ = 0;
  bool reshaped_ = true, moved_ = true;
  std::unique_ptr<CapturedGraph> graph_;
};

}  // namespace vlmtrim::VLMTRIM_LIBRARY
