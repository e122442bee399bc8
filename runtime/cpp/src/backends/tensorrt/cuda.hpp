// One GPU through CUDA's runtime API: memory, one stream, CUDA graphs. Mirrors runtime/backends/cuda.py.
//
// Everything is queued on one stream, in order, under one lock: sessions of several threads take turns. The host waits
// in Device::wait only; what a queued copy reads or writes on the host must stay as it is until then.
#pragma once

#include <cuda_runtime_api.h>

#include <functional>
#include <memory>
#include <mutex>
#include <string>
#include <utility>

#include "core/error.hpp"
#include "core/tensor.hpp"

namespace vlmtrim {

constexpr size_t kAddressAlignment = 256;  // bytes; TensorRT asks it of every address

// A CUDA call failed.
class CudaError : public Refusal {
 public:
  CudaError(const std::string& message, cudaError_t code) : Refusal(message), code(code) {}
  cudaError_t code;
};

// Memory on the device, freed with the last reference to it.
struct Memory {
  explicit Memory(size_t nbytes);  // throws CudaError
  Memory(const Memory&) = delete;
  Memory& operator=(const Memory&) = delete;
  ~Memory();

  void* address = nullptr;
  size_t nbytes = 0;
};

// Page-locked host memory, which copies may read and write while the host goes on.
struct Pinned {
  explicit Pinned(size_t nbytes);  // throws CudaError
  Pinned(const Pinned&) = delete;
  Pinned& operator=(const Pinned&) = delete;
  ~Pinned();

  char* data = nullptr;
  size_t nbytes = 0;
};

// Launches, captured once: the same kernels on the same addresses.
class CapturedGraph {
 public:
  explicit CapturedGraph(cudaGraph_t graph);  // throws CudaError
  CapturedGraph(const CapturedGraph&) = delete;
  CapturedGraph& operator=(const CapturedGraph&) = delete;
  ~CapturedGraph();

  cudaGraphExec_t handle = nullptr;
};

// The first GPU that is visible, and a stream on it.
class Device {
 public:
  Device();  // throws Refusal where the driver or a GPU is missing
  Device(const Device&) = delete;
  Device& operator=(const Device&) = delete;
  ~Device();

  const std::string& name() const { return name_; }
  std::pair<int, int> capability() const { return capability_; }
  cudaStream_t stream() const { return stream_; }
  // Held by whoever queues.
  std::recursive_mutex& turn() { return turn_; }
  // How often the host waited, so that users of host memory know whether their copies are done.
  int64_t waits() const { return waits_; }

  // Throws Refusal where it does not fit; `use` says for what.
  std::shared_ptr<Memory> allocate(size_t nbytes, const std::string& use) const;
  // These queue.
  void zero(void* address, size_t nbytes) const;
  void copy_in(void* address, const void* source, size_t nbytes) const;
  void launch(const CapturedGraph& graph) const;
  // Copies from the device and waits.
  void read(void* target, const void* address, size_t nbytes);
  // Until all that is queued is done.
  void wait();
  // What `launch` queues, as a graph; nothing of it runs. Throws CudaError where it cannot be captured.
  std::unique_ptr<CapturedGraph> capture(const std::function<bool()>& launch) const;

 private:
  std::recursive_mutex turn_;
  std::string name_;
  std::pair<int, int> capability_;
  cudaStream_t stream_ = nullptr;
  int64_t waits_ = 0;
  std::unique_ptr<Pinned> small_;
};

// Device memory for one tensor of a graph: reused by every step, replaced by a larger one where it is too small.
//
// It grows at least twofold and never beyond `limit` bytes, so that decoding does not allocate; what was in it is lost.
class Slot {
 public:
  Slot(Device& device, std::string use, size_t limit = SIZE_MAX)
      : device_(device), use_(std::move(use)), limit_(limit) {}

  const std::shared_ptr<Memory>& memory() const { return memory_; }
  // Address of at least `nbytes` bytes, never null.
  void* fit(size_t nbytes);
  // Queues a copy of a tensor of the host into the slot unless it holds the same bytes; returns the address.
  void* load(const Tensor& tensor);

 private:
  Device& device_;
  std::string use_;
  size_t limit_;
  std::shared_ptr<Memory> memory_;
  std::unique_ptr<Pinned> pinned_;
  size_t held_ = SIZE_MAX;  // bytes of the last tensor that was loaded
  int64_t loaded_at_ = -1;
};

}  // namespace vlmtrim
