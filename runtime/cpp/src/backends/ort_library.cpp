#include "backends/ort_library.hpp"

#include <dlfcn.h>

#include <cstdlib>
#include <map>
#include <mutex>
#include <vector>

#include "core/error.hpp"

#ifndef VLMTRIM_ONNXRUNTIME_LIBRARY
#define VLMTRIM_ONNXRUNTIME_LIBRARY ""
#endif

namespace vlmtrim {
namespace {

std::vector<std::string> candidates(const std::string& path) {
  if (!path.empty()) return {path};
  const char* named = std::getenv("VLMTRIM_ONNXRUNTIME");
  if (named != nullptr && *named != 0) return {named};
  std::vector<std::string> names{"libonnxruntime.so.1", "libonnxruntime.so"};
  const std::string built = VLMTRIM_ONNXRUNTIME_LIBRARY;
  if (!built.empty()) names.insert(names.begin(), built);
  return names;
}

}  // namespace

std::shared_ptr<OrtLibrary> OrtLibrary::get(const std::string& path) {
  static std::mutex mutex;
  static auto* const opened = new std::map<void*, std::shared_ptr<OrtLibrary>>;  // never closed: its threads may live
  const std::lock_guard<std::mutex> lock(mutex);
  std::string problem;
  for (const auto& name : candidates(path)) {
    void* const handle = dlopen(name.c_str(), RTLD_NOW | RTLD_LOCAL);
    if (handle == nullptr) {
      problem = dlerror();
      continue;
    }
    auto& known = (*opened)[handle];
    if (known) return known;
    using GetBase = const OrtApiBase* (*)();
    const auto base = reinterpret_cast<GetBase>(dlsym(handle, "OrtGetApiBase"));
    const OrtApi* api = base != nullptr ? base()->GetApi(ORT_API_VERSION) : nullptr;
    if (api == nullptr) {
      throw Refusal(
          said(name, " is no ONNX Runtime of version 1.", ORT_API_VERSION, " or later; give another library"));
    }
    OrtEnv* env = nullptr;
    auto library = std::make_shared<OrtLibrary>(api, nullptr, base()->GetVersionString());
    library->check(api->CreateEnv(ORT_LOGGING_LEVEL_FATAL, "vlmtrim", &env), "ONNX Runtime does not start");
    return known = std::make_shared<OrtLibrary>(api, env, library->version());
  }
  throw Refusal(said("ONNX Runtime's library is not found (", problem,
                     "); set VLMTRIM_ONNXRUNTIME to the path of libonnxruntime.so"));
}

void OrtLibrary::check(OrtStatus* status, const std::string& what) const {
  if (status == nullptr) return;
  std::string message = api_->GetErrorMessage(status);
  api_->ReleaseStatus(status);
  message = message.substr(0, std::min<size_t>(message.find('\n'), 300));
  throw Refusal(said(what, ": ", message));
}

}  // namespace vlmtrim
