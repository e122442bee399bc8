#include "backends/tensorrt/cuda.hpp"

#include <algorithm>
#include <cstring>

namespace vlmtrim {
namespace {

constexpr size_t kSmall = 1 << 20;  // bytes up to which results come down through page-locked memory

std::string said_of(cudaError_t error) { return said(cudaGetErrorName(error), " - ", cudaGetErrorString(error)); }

void check(cudaError_t error, const char* function) {
  if (error != cudaSuccess) throw CudaError(said(function, " failed: ", said_of(error)), error);
}

std::string version(int number) { return said(number / 1000, ".", number % 1000 / 10); }

void find_gpu() {
  int count = 0;
  const cudaError_t error = cudaGetDeviceCount(&count);
  if (error == cudaErrorInsufficientDriver) {
    int installed = 0, needed = 0;
    check(cudaDriverGetVersion(&installed), "cudaDriverGetVersion");
    check(cudaRuntimeGetVersion(&needed), "cudaRuntimeGetVersion");
    if (installed == 0) throw Refusal("no NVIDIA driver is loaded here; install one until nvidia-smi lists the GPU");
    throw Refusal(said("the NVIDIA driver supports CUDA ", version(installed), ", this library is made for ",
                       version(needed), ": update the driver, or build the library with CUDA ", version(installed)));
  }
  if (error == cudaErrorNoDevice || (error == cudaSuccess && count == 0)) {
    throw Refusal(
        "the NVIDIA driver finds no GPU; check nvidia-smi, CUDA_VISIBLE_DEVICES and, in a container, --gpus all");
  }
  if (error != cudaSuccess) throw Refusal("CUDA does not start here: " + said_of(error));
}

double gigabytes(size_t bytes) { return static_cast<double>(bytes / 10000000) / 100; }

}  // namespace

Memory::Memory(size_t bytes) : nbytes(bytes) {
  check(cudaMalloc(&address, std::max(bytes, kAddressAlignment)), "cudaMalloc");
}

Memory::~Memory() { cudaFree(address); }

Pinned::Pinned(size_t bytes) : nbytes(bytes) {
  void* made = nullptr;
  check(cudaHostAlloc(&made, bytes, cudaHostAllocDefault), "cudaHostAlloc");
  data = static_cast<char*>(made);
}

Pinned::~Pinned() { cudaFreeHost(data); }

CapturedGraph::CapturedGraph(cudaGraph_t graph) {
  check(cudaGraphInstantiate(&handle, graph, 0), "cudaGraphInstantiate");
}

CapturedGraph::~CapturedGraph() { cudaGraphExecDestroy(handle); }

Device::Device() {
  find_gpu();
  check(cudaSetDevice(0), "cudaSetDevice");
  cudaDeviceProp properties{};
  check(cudaGetDeviceProperties(&properties, 0), "cudaGetDeviceProperties");
  name_ = properties.name;
  capability_ = {properties.major, properties.minor};
  check(cudaStreamCreateWithFlags(&stream_, cudaStreamNonBlocking), "cudaStreamCreateWithFlags");
}

Device::~Device() {
  small_.reset();
  cudaStreamDestroy(stream_);
}

std::shared_ptr<Memory> Device::allocate(size_t nbytes, const std::string& use) const {
  try {
    return std::make_shared<Memory>(nbytes);
  } catch (const CudaError& error) {
    if (error.code != cudaErrorMemoryAllocation) throw;
    cudaGetLastError();  // the next call would report it again
    size_t free = 0, total = 0;
    check(cudaMemGetInfo(&free, &total), "cudaMemGetInfo");
    throw Refusal(said(name_, " has ", gigabytes(free), " of ", gigabytes(total), " GB free, ", gigabytes(nbytes),
                       " GB more are needed for ", use,
                       "; export with a smaller --max-seq-len or --max-batch, or end what else uses the GPU"));
  }
}

void Device::zero(void* address, size_t nbytes) const {
  if (nbytes > 0) check(cudaMemsetAsync(address, 0, nbytes, stream_), "cudaMemsetAsync");
}

void Device::copy_in(void* address, const void* source, size_t nbytes) const {
  if (nbytes == 0) return;
  check(cudaMemcpyAsync(address, source, nbytes, cudaMemcpyHostToDevice, stream_), "cudaMemcpyAsync");
}

void Device::launch(const CapturedGraph& graph) const {
  check(cudaGraphLaunch(graph.handle, stream_), "cudaGraphLaunch");
}

void Device::read(void* target, const void* address, size_t nbytes) {
  if (nbytes == 0) return;
  if (nbytes <= kSmall && !small_) small_ = std::make_unique<Pinned>(kSmall);
  void* const landing = nbytes > kSmall ? target : small_->data;
  check(cudaMemcpyAsync(landing, address, nbytes, cudaMemcpyDeviceToHost, stream_), "cudaMemcpyAsync");
  wait();
  if (landing != target) std::memcpy(target, landing, nbytes);
}

void Device::wait() {
  check(cudaStreamSynchronize(stream_), "cudaStreamSynchronize");
  ++waits_;
}

std::unique_ptr<CapturedGraph> Device::capture(const std::function<bool()>& launch) const {
  // Thread-local: a memory call of another thread must not spoil the capture.
  check(cudaStreamBeginCapture(stream_, cudaStreamCaptureModeThreadLocal), "cudaStreamBeginCapture");
  const bool launched = launch();
  cudaGraph_t graph = nullptr;
  const cudaError_t error = cudaStreamEndCapture(stream_, &graph);
  if (error != cudaSuccess) {
    cudaGetLastError();
    throw CudaError("the capture failed: " + said_of(error), error);
  }
  const std::shared_ptr<CUgraph_st> held(graph, cudaGraphDestroy);
  if (!launched) throw CudaError("the library does not launch while a stream is captured", error);
  return std::make_unique<CapturedGraph>(graph);
}

void* Slot::fit(size_t nbytes) {
  if (memory_ && memory_->nbytes >= nbytes) return memory_->address;
  size_t size = memory_ ? std::max(nbytes, 2 * memory_->nbytes) : nbytes;
  size = (std::max(size, kAddressAlignment) + kAddressAlignment - 1) / kAddressAlignment * kAddressAlignment;
  size = std::max(nbytes, std::min(size, limit_));
  if (memory_) device_.wait();  // a queued step may still use what is freed here
  memory_.reset();
  held_ = SIZE_MAX;
  memory_ = device_.allocate(size, use_);
  return memory_->address;
}

void* Slot::load(const Tensor& tensor) {
  const size_t size = tensor.nbytes();
  void* const address = fit(size);
  if (!pinned_ || pinned_->nbytes < size) {
    device_.wait();
    pinned_ = std::make_unique<Pinned>(memory_->nbytes);
    held_ = SIZE_MAX;
  }
  if (size == held_ && std::memcmp(pinned_->data, tensor.data, size) == 0) return address;
  if (loaded_at_ == device_.waits()) device_.wait();  // the copy of the last one may still read the staging memory
  std::memcpy(pinned_->data, tensor.data, size);
  device_.copy_in(address, pinned_->data, size);
  held_ = size;
  loaded_at_ = device_.waits();
  return address;
}

}  // namespace vlmtrim
