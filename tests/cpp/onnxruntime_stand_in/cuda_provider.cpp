// A stand-in of an ONNX Runtime for CUDA: the real library of the CPU behind a C API that has the CUDA provider. Memory
// "of the GPU" can be touched while a graph runs alone: whoever reads it from the host ends the process.
#include <dlfcn.h>
#include <onnxruntime_c_api.h>
#include <sys/mman.h>

#include <cstdlib>
#include <cstring>
#include <map>
#include <mutex>
#include <set>
#include <string>
#include <vector>

#define STAND_IN extern "C" __attribute__((visibility("default")))

namespace {

const OrtApi* real = nullptr;
OrtApi ours;
std::recursive_mutex mutex;

std::map<char*, size_t> blocks;           // of the GPU, by address
std::map<const OrtValue*, char*> owners;  // values that hold a block of their own
std::set<const OrtMemoryInfo*> infos;     // of the GPU
std::map<const OrtCUDAProviderOptionsV2*, std::map<std::string, std::string>> settings;
std::map<const OrtIoBinding*, std::vector<std::pair<std::string, bool>>> outputs;  // in order; whether on the GPU
std::map<std::string, int64_t> counts;
std::string mistake;
bool starts = true;
OrtMemoryInfo* gpu = nullptr;

OrtStatus* failed(const std::string& message) { return real->CreateStatus(ORT_FAIL, message.c_str()); }

void blame(const std::string& what) {
  if (mistake.empty()) mistake = what;
}

// The block that an address is in; null for the host's.
char* block_of(const void* address) {
  auto* const place = static_cast<char*>(const_cast<void*>(address));
  auto next = blocks.upper_bound(place);
  if (next == blocks.begin()) return nullptr;
  --next;
  return place < next->first + next->second ? next->first : nullptr;
}

void must(OrtStatus* status) {
  if (status != nullptr) std::abort();
}

OrtStatus* available(char*** names, int* count) noexcept {
  *count = 2;
  *names = new char*[2]{strdup("CUDAExecutionProvider"), strdup("CPUExecutionProvider")};
  return nullptr;
}

OrtStatus* release_available(char** names, int count) noexcept {
  for (int i = 0; i < count; ++i) free(names[i]);
  delete[] names;
  return nullptr;
}

OrtStatus* create_options(OrtCUDAProviderOptionsV2** made) noexcept {
  *made = reinterpret_cast<OrtCUDAProviderOptionsV2*>(new char);
  settings[*made] = {};
  return nullptr;
}

OrtStatus* update_options(OrtCUDAProviderOptionsV2* options, const char* const* keys, const char* const* values,
                          size_t count) noexcept {
  for (size_t i = 0; i < count; ++i) settings.at(options)[keys[i]] = values[i];
  return nullptr;
}

void release_options(OrtCUDAProviderOptionsV2* options) noexcept {
  settings.erase(options);
  delete reinterpret_cast<char*>(options);
}

OrtStatus* append(OrtSessionOptions* /*options*/, const OrtCUDAProviderOptionsV2* provider) noexcept {
  if (!starts) return failed("Failed to load library libonnxruntime_providers_cuda.so with error: libcudnn.so.9");
  if (settings.at(provider)["use_tf32"] != "0") blame("float32 is computed as TF32");
  ++counts["sessions"];
  return nullptr;
}

OrtStatus* create_info(const char* name, OrtAllocatorType type, int id, OrtMemType kind,
                       OrtMemoryInfo** made) noexcept {
  const bool device = std::strcmp(name, "Cuda") == 0;
  OrtStatus* status = real->CreateMemoryInfo(device ? "Cpu" : name, type, id, kind, made);
  if (device) infos.insert(*made);
  return status;
}

void release_info(OrtMemoryInfo* info) noexcept {
  infos.erase(info);
  real->ReleaseMemoryInfo(info);
}

OrtStatus* create_value(const OrtMemoryInfo* info, void* data, size_t bytes, const int64_t* shape, size_t rank,
                        ONNXTensorElementDataType type, OrtValue** made) noexcept {
  const std::lock_guard<std::recursive_mutex> lock(mutex);
  char* const block = block_of(data);
  if ((infos.count(info) > 0) != (block != nullptr))
    blame("memory of the host is given as the GPU's, or the other way");
  if (block != nullptr && static_cast<char*>(data) + bytes > block + blocks.at(block)) blame("a tensor is too long");
  return real->CreateTensorWithDataAsOrtValue(info, data, bytes, shape, rank, type, made);
}

void release_value(OrtValue* value) noexcept {
  const std::lock_guard<std::recursive_mutex> lock(mutex);
  const auto owner = owners.find(value);
  char* const block = owner == owners.end() ? nullptr : owner->second;
  if (block != nullptr) owners.erase(owner);
  real->ReleaseValue(value);
  if (block == nullptr) return;
  munmap(block, blocks.at(block));
  blocks.erase(block);
}

void bound(const OrtIoBinding* binding, const std::string& name, bool device) {
  for (auto& [known, where] : outputs[binding]) {
    if (known != name) continue;
    where = device;
    return;
  }
  outputs[binding].emplace_back(name, device);
}

OrtStatus* bind_output(OrtIoBinding* binding, const char* name, const OrtValue* value) noexcept {
  bound(binding, name, false);  // the value is where it is
  return real->BindOutput(binding, name, value);
}

OrtStatus* bind_output_to(OrtIoBinding* binding, const char* name, const OrtMemoryInfo* info) noexcept {
  bound(binding, name, infos.count(info) > 0);
  return real->BindOutputToDevice(binding, name, info);
}

void clear_outputs(OrtIoBinding* binding) noexcept {
  outputs.erase(binding);
  real->ClearBoundOutputs(binding);
}

void release_binding(OrtIoBinding* binding) noexcept {
  outputs.erase(binding);
  real->ReleaseIoBinding(binding);
}

void protect(int how) {
  for (const auto& [block, bytes] : blocks) mprotect(block, bytes, how);
}

OrtStatus* run(OrtSession* session, const OrtRunOptions* options, const OrtIoBinding* binding) noexcept {
  const std::lock_guard<std::recursive_mutex> lock(mutex);
  protect(PROT_READ | PROT_WRITE);
  OrtStatus* status = real->RunWithBinding(session, options, binding);
  protect(PROT_NONE);
  ++counts["runs"];
  return status;
}

size_t size_of(ONNXTensorElementDataType type) {
  if (type == ONNX_TENSOR_ELEMENT_DATA_TYPE_INT64) return 8;
  if (type == ONNX_TENSOR_ELEMENT_DATA_TYPE_BOOL) return 1;
  return type == ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT || type == ONNX_TENSOR_ELEMENT_DATA_TYPE_INT32 ? 4 : 2;
}

// A value of the host moved into a block.
void move(OrtValue*& value) {
  OrtTensorTypeAndShapeInfo* info = nullptr;
  must(real->GetTensorTypeAndShape(value, &info));
  size_t rank = 0, elements = 0;
  ONNXTensorElementDataType type{};
  must(real->GetDimensionsCount(info, &rank));
  must(real->GetTensorElementType(info, &type));
  must(real->GetTensorShapeElementCount(info, &elements));
  std::vector<int64_t> shape(rank);
  must(real->GetDimensions(info, shape.data(), rank));
  real->ReleaseTensorTypeAndShapeInfo(info);
  void* data = nullptr;
  must(real->GetTensorMutableData(value, &data));
  const size_t bytes = elements * size_of(type), room = (bytes / 4096 + 1) * 4096;
  void* const made = mmap(nullptr, room, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (bytes > 0) std::memcpy(made, data, bytes);
  mprotect(made, room, PROT_NONE);
  blocks[static_cast<char*>(made)] = room;
  real->ReleaseValue(value);
  must(real->CreateTensorWithDataAsOrtValue(gpu, made, bytes, shape.data(), rank, type, &value));
  owners[value] = static_cast<char*>(made);
}

OrtStatus* bound_values(const OrtIoBinding* binding, OrtAllocator* allocator, OrtValue*** values,
                        size_t* count) noexcept {
  const std::lock_guard<std::recursive_mutex> lock(mutex);
  if (OrtStatus* status = real->GetBoundOutputValues(binding, allocator, values, count)) return status;
  const auto& known = outputs[binding];
  for (size_t i = 0; i < *count; ++i) {
    if (known.at(i).second) move((*values)[i]);
  }
  return nullptr;
}

OrtStatus* memory_of(const OrtValue* value, const OrtMemoryInfo** info) noexcept {
  const std::lock_guard<std::recursive_mutex> lock(mutex);
  void* data = nullptr;
  must(real->GetTensorMutableData(const_cast<OrtValue*>(value), &data));
  if (block_of(data) == nullptr) return real->GetTensorMemoryInfo(value, info);
  *info = gpu;
  return nullptr;
}

void device_type(const OrtMemoryInfo* info, OrtMemoryInfoDeviceType* kind) noexcept {
  *kind = info == gpu ? OrtMemoryInfoDeviceType_GPU : OrtMemoryInfoDeviceType_CPU;
}

const OrtApi* get_api(uint32_t version) noexcept {
  using GetBase = const OrtApiBase* (*)();
  void* const library = dlopen(STAND_IN_ONNXRUNTIME, RTLD_NOW | RTLD_LOCAL);
  if (library == nullptr) return nullptr;
  real = reinterpret_cast<GetBase>(dlsym(library, "OrtGetApiBase"))()->GetApi(version);
  std::memcpy(&ours, real, sizeof ours);
  must(create_info("Cuda", OrtDeviceAllocator, 0, OrtMemTypeDefault, &gpu));
  ours.GetAvailableProviders = available;
  ours.ReleaseAvailableProviders = release_available;
  ours.CreateCUDAProviderOptions = create_options;
  ours.UpdateCUDAProviderOptions = update_options;
  ours.ReleaseCUDAProviderOptions = release_options;
  ours.SessionOptionsAppendExecutionProvider_CUDA_V2 = append;
  ours.CreateMemoryInfo = create_info;
  ours.ReleaseMemoryInfo = release_info;
  ours.CreateTensorWithDataAsOrtValue = create_value;
  ours.ReleaseValue = release_value;
  ours.BindOutput = bind_output;
  ours.BindOutputToDevice = bind_output_to;
  ours.ClearBoundOutputs = clear_outputs;
  ours.ReleaseIoBinding = release_binding;
  ours.RunWithBinding = run;
  ours.GetBoundOutputValues = bound_values;
  ours.GetTensorMemoryInfo = memory_of;
  ours.MemoryInfoGetDeviceType = device_type;
  return &ours;
}

const char* version() noexcept { return "1.99.0"; }
const OrtApiBase base{get_api, version};

}  // namespace

STAND_IN const OrtApiBase* OrtGetApiBase() noexcept { return &base; }

// Begins a test: whether the provider's library opens.
STAND_IN void stand_in_begin(int opens) {
  starts = opens != 0;
  mistake.clear();
  counts.clear();
}
STAND_IN const char* stand_in_mistake() { return mistake.c_str(); }
STAND_IN int64_t stand_in_count(const char* what) {
  return std::strcmp(what, "blocks") == 0 ? static_cast<int64_t>(blocks.size()) : counts[what];
}
