#include "backends/tensorrt/library.hpp"

#include <dlfcn.h>

#include <algorithm>
#include <cstdlib>

#ifndef VLMTRIM_TENSORRT_LIBRARY
#define VLMTRIM_TENSORRT_LIBRARY ""
#endif

namespace vlmtrim::VLMTRIM_LIBRARY {
namespace {

#ifdef TRT_MAJOR_RTX
constexpr const char* kVariable = "VLMTRIM_TENSORRT_RTX";
constexpr const char* kFile = "libtensorrt_rtx.so";
#else
constexpr const char* kVariable = "VLMTRIM_TENSORRT";
constexpr const char* kFile = "libnvinfer.so";
#endif

std::vector<std::string> candidates(const std::string& path) {
  if (!path.empty()) return {path};
  const char* named = std::getenv(kVariable);
  if (named != nullptr && *named != 0) return {named};
  std::vector<std::string> names{said(kFile, ".", NV_TENSORRT_MAJOR), kFile};
  const std::string built = VLMTRIM_TENSORRT_LIBRARY;
  if (!built.empty()) names.insert(names.begin(), built);
  return names;
}

// Never closed: its threads may live.
void* open_library(const std::string& path) {
  std::string problem;
  for (const auto& name : candidates(path)) {
    void* const handle = dlopen(name.c_str(), RTLD_NOW | RTLD_LOCAL);
    if (handle != nullptr) return handle;
    problem = dlerror();
  }
  throw Refusal(said("the library of ", kName, " is not found (", problem, "); set ", kVariable, " to the path of ",
                     kFile, ".", NV_TENSORRT_MAJOR));
}

template <class Function>
Function symbol(void* handle, const char* name) {
  const auto found = reinterpret_cast<Function>(dlsym(handle, name));
  if (found == nullptr) throw Refusal(said("the library of ", kName, " has no ", name, "; give another one"));
  return found;
}

int32_t number(void* handle, const char* name) { return symbol<int32_t (*)()>(handle, name)(); }

}  // namespace

void Messages::log(Severity severity, const char* message) noexcept {
  if (severity > Severity::kERROR) return;
  const std::lock_guard<std::mutex> lock(mutex_);
  held_.emplace_back(message);
}

std::string Messages::last(size_t count) const {
  const std::lock_guard<std::mutex> lock(mutex_);
  std::string list;
  for (size_t i = held_.size() - std::min(count, held_.size()); i < held_.size(); ++i) {
    list += (list.empty() ? "" : "; ") + held_[i];
  }
  return list.empty() ? "no reason given" : list;
}

void Messages::clear() {
  const std::lock_guard<std::mutex> lock(mutex_);
  held_.clear();
}

Library::Library(const std::string& path) {
  void* const handle = open_library(path);
  const int32_t major = number(handle, "getInferLibMajorVersion"), minor = number(handle, "getInferLibMinorVersion");
  version_ = said(major, ".", minor, ".", number(handle, "getInferLibPatchVersion"), ".",
                  number(handle, "getInferLibBuildVersion"));
  // Classes only grow within a major version, so the headers may be older than the library, and not newer.
  if (major != NV_TENSORRT_MAJOR || minor < NV_TENSORRT_MINOR) {
    throw Refusal(said(kName, " ", version_, " is here, this program is made for ", NV_TENSORRT_MAJOR, ".",
                       NV_TENSORRT_MINOR, " and later ones of ", NV_TENSORRT_MAJOR, "; give its library in ",
                       kVariable));
  }
  const auto create = symbol<void* (*)(void*, int32_t)>(handle, "createInferRuntime_INTERNAL");
  nvinfer1::ILogger* const logger = &messages_;
  runtime_.reset(static_cast<nvinfer1::IRuntime*>(create(logger, NV_TENSORRT_VERSION)));
  if (!runtime_) throw Refusal(said(kName, " ", version_, " does not start: ", messages_.last(3)));
}

}  // namespace vlmtrim::VLMTRIM_LIBRARY
