// CUDA's runtime API without a GPU: device memory is host memory, and the stream does nothing until the host waits.
//
// Strict on purpose. Fresh memory holds NaN; addresses must lie in one live allocation of the right kind; guards around
// every allocation are checked at each wait; page-locked memory is read when a copy runs, not when it is queued.
#include <algorithm>
#include <cstring>
#include <map>
#include <memory>
#include <mutex>
#include <vector>

#include "device.hpp"

namespace {

constexpr size_t kGuard = 512;
constexpr unsigned char kPattern = 0xA5, kGarbage = 0xFF;
using Work = std::vector<std::function<void()>>;

// An allocation with guards before and behind it, aligned to 256 bytes.
class Block {
 public:
  explicit Block(size_t nbytes) : nbytes_(nbytes), whole_(nbytes + 2 * kGuard + 256, kPattern) {
    const auto address = reinterpret_cast<uintptr_t>(whole_.data() + kGuard);
    start_ = kGuard + (256 - address % 256) % 256;
    std::memset(data(), kGarbage, nbytes);
  }
  unsigned char* data() { return whole_.data() + start_; }
  size_t nbytes() const { return nbytes_; }
  bool holds(const void* address, size_t size) {
    const auto* at = static_cast<const unsigned char*>(address);
    return data() <= at && at + size <= data() + nbytes_;
  }
  bool intact() const {
    const auto untouched = [](unsigned char byte) { return byte == kPattern; };
    const auto from = whole_.begin() + static_cast<ptrdiff_t>(start_);
    return std::all_of(whole_.begin(), from, untouched) &&
           std::all_of(from + static_cast<ptrdiff_t>(nbytes_), whole_.end(), untouched);
  }

 private:
  size_t nbytes_, start_;
  std::vector<unsigned char> whole_;
};

using Blocks = std::map<void*, std::unique_ptr<Block>>;

struct Machine {
  std::recursive_mutex mutex;
  int major = 8, minor = 9, capture = 0, found = cudaSuccess, driver = 13000;
  size_t memory = size_t{1} << 32;
  Blocks device, host;
  std::vector<std::unique_ptr<Block>> freed;  // kept, so that a stale address reads NaN instead of ending the process
  Work queue;
  std::unique_ptr<Work> captured;
  std::map<std::string, int64_t> counts;
  std::string mistake;
};

Machine& machine() {
  static auto* const made = new Machine;
  return *made;
}

using Lock = std::lock_guard<std::recursive_mutex>;

bool holds(Blocks& blocks, const void* address, size_t nbytes) {
  for (auto& [start, block] : blocks) {
    if (block->holds(address, nbytes)) return true;
  }
  return false;
}

void need(bool condition, const char* mistake) {
  if (!condition) stand_in::blame(mistake);
}

void drain() {
  Machine& here = machine();
  Work work;
  work.swap(here.queue);
  for (const auto& step : work) step();
  for (auto* blocks : {&here.device, &here.host}) {
    for (auto& [start, block] : *blocks) need(block->intact(), "memory beyond an allocation was written");
  }
}

cudaError_t allocate(Blocks& blocks, void** address, size_t nbytes) {
  need(!stand_in::capturing(), "memory was allocated while a stream is captured");
  auto block = std::make_unique<Block>(nbytes);
  *address = block->data();
  blocks[*address] = std::move(block);
  return cudaSuccess;
}

void free_block(Blocks& blocks, void* address) {
  if (address == nullptr) return;
  drain();
  const auto found = blocks.find(address);
  if (found == blocks.end()) return stand_in::blame("what was freed is no allocation");
  std::memset(found->second->data(), kGarbage, found->second->nbytes());
  machine().freed.push_back(std::move(found->second));
  blocks.erase(found);
}

size_t used() {
  size_t sum = 0;
  for (const auto& [start, block] : machine().device) sum += block->nbytes();
  return sum;
}

}  // namespace

namespace stand_in {

void submit(std::function<void()> work) {
  const Lock lock(machine().mutex);
  (machine().captured ? *machine().captured : machine().queue).push_back(std::move(work));
}

bool capturing() {
  const Lock lock(machine().mutex);
  return machine().captured != nullptr;
}

bool is_on_device(const void* address, size_t nbytes) {
  const Lock lock(machine().mutex);
  return holds(machine().device, address, nbytes);
}

void blame(const std::string& mistake) {
  const Lock lock(machine().mutex);
  if (machine().mistake.empty()) machine().mistake = mistake;
}

void count(const std::string& what) {
  const Lock lock(machine().mutex);
  ++machine().counts[what];
}

bool launches_in_capture() { return machine().capture != 2; }

}  // namespace stand_in

extern "C" {

void stand_in_begin(int major, int minor, size_t memory, int capture) {
  const Lock lock(machine().mutex);
  Machine& here = machine();
  here.major = major;
  here.minor = minor;
  here.memory = memory;
  here.capture = capture;
  here.found = cudaSuccess;
  here.driver = 13000;
  here.counts.clear();
  here.mistake.clear();
  here.freed.clear();
}

void stand_in_driver(int error, int version) {
  machine().found = error;
  machine().driver = version;
}

int64_t stand_in_count(const char* what) {
  const Lock lock(machine().mutex);
  return std::string(what) == "bytes" ? static_cast<int64_t>(used()) : machine().counts[what];
}

const char* stand_in_mistake() { return machine().mistake.c_str(); }

const char* cudaGetErrorName(cudaError_t error) {
  return error == cudaErrorMemoryAllocation ? "cudaErrorMemoryAllocation" : "cudaErrorOfTheStandIn";
}
const char* cudaGetErrorString(cudaError_t) { return "as the test asked for"; }
cudaError_t cudaGetLastError() { return cudaSuccess; }

cudaError_t cudaGetDeviceCount(int* count) {
  *count = 1;
  return static_cast<cudaError_t>(machine().found);
}

cudaError_t cudaDriverGetVersion(int* version) {
  *version = machine().driver;
  return cudaSuccess;
}

cudaError_t cudaRuntimeGetVersion(int* version) {
  *version = 13000;
  return cudaSuccess;
}

cudaError_t cudaSetDevice(int device) { return device == 0 ? cudaSuccess : cudaErrorInvalidValue; }

cudaError_t cudaGetDeviceProperties(cudaDeviceProp* properties, int device) {
  need(device == 0, "there is one device");
  std::strcpy(properties->name, "Fake GPU");
  properties->major = machine().major;
  properties->minor = machine().minor;
  return cudaSuccess;
}

cudaError_t cudaMemGetInfo(size_t* free, size_t* total) {
  const Lock lock(machine().mutex);
  *total = machine().memory;
  *free = machine().memory - used();
  return cudaSuccess;
}

cudaError_t cudaMalloc(void** address, size_t nbytes) {
  const Lock lock(machine().mutex);
  if (nbytes > machine().memory - std::min(used(), machine().memory)) return cudaErrorMemoryAllocation;
  stand_in::count("cudaMalloc");
  return allocate(machine().device, address, nbytes);
}

cudaError_t cudaFree(void* address) {
  const Lock lock(machine().mutex);
  free_block(machine().device, address);
  return cudaSuccess;
}

cudaError_t cudaHostAlloc(void** address, size_t nbytes, unsigned) {
  const Lock lock(machine().mutex);
  return allocate(machine().host, address, nbytes);
}

cudaError_t cudaFreeHost(void* address) {
  const Lock lock(machine().mutex);
  free_block(machine().host, address);
  return cudaSuccess;
}

cudaError_t cudaMemsetAsync(void* address, int value, size_t nbytes, cudaStream_t) {
  need(stand_in::is_on_device(address, nbytes), "memory that is not on the device is set");
  stand_in::submit([=] { std::memset(address, value, nbytes); });
  return cudaSuccess;
}

cudaError_t cudaMemcpyAsync(void* to, const void* from, size_t nbytes, cudaMemcpyKind kind, cudaStream_t) {
  const Lock lock(machine().mutex);
  need(!stand_in::capturing(), "a copy is no part of a captured step");
  const bool up = kind == cudaMemcpyHostToDevice;
  stand_in::count(up ? "copies in" : "copies out");
  need(stand_in::is_on_device(up ? to : from, nbytes), "a copy reads or writes outside of the device's memory");
  need(!up || holds(machine().host, from, nbytes), "a copy reads memory that is not page-locked");
  stand_in::submit([=] { std::memcpy(to, from, nbytes); });
  return cudaSuccess;
}

cudaError_t cudaStreamCreateWithFlags(cudaStream_t* stream, unsigned) {
  *stream = reinterpret_cast<cudaStream_t>(&machine());
  return cudaSuccess;
}

cudaError_t cudaStreamDestroy(cudaStream_t) { return cudaSuccess; }

cudaError_t cudaStreamSynchronize(cudaStream_t) {
  const Lock lock(machine().mutex);
  need(!stand_in::capturing(), "a captured stream cannot be waited for");
  stand_in::count("waits");
  drain();
  return cudaSuccess;
}

cudaError_t cudaStreamBeginCapture(cudaStream_t, cudaStreamCaptureMode) {
  const Lock lock(machine().mutex);
  machine().captured = std::make_unique<Work>();
  return cudaSuccess;
}

cudaError_t cudaStreamEndCapture(cudaStream_t, cudaGraph_t* graph) {
  const Lock lock(machine().mutex);
  auto recorded = std::move(machine().captured);
  if (machine().capture == 1) return cudaErrorStreamCaptureInvalidated;
  *graph = reinterpret_cast<cudaGraph_t>(recorded.release());
  return cudaSuccess;
}

cudaError_t cudaGraphInstantiate(cudaGraphExec_t* made, cudaGraph_t graph, unsigned long long) {
  stand_in::count("graphs");
  *made = reinterpret_cast<cudaGraphExec_t>(new Work(*reinterpret_cast<Work*>(graph)));
  return cudaSuccess;
}

cudaError_t cudaGraphLaunch(cudaGraphExec_t graph, cudaStream_t) {
  const Lock lock(machine().mutex);
  stand_in::count("replays");
  const Work& steps = *reinterpret_cast<Work*>(graph);
  machine().queue.insert(machine().queue.end(), steps.begin(), steps.end());
  return cudaSuccess;
}

cudaError_t cudaGraphExecDestroy(cudaGraphExec_t graph) {
  delete reinterpret_cast<Work*>(graph);
  return cudaSuccess;
}

cudaError_t cudaGraphDestroy(cudaGraph_t graph) {
  delete reinterpret_cast<Work*>(graph);
  return cudaSuccess;
}
}
