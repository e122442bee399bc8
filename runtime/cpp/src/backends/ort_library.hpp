// ONNX Runtime's library, opened while the program runs, so that one binary serves any version of it: the C API only
// grows, and is asked for by the number that this code was written against.
#pragma once

#include <onnxruntime_c_api.h>

#include <memory>
#include <string>

namespace vlmtrim {

// The library and its environment, shared by all sessions of a process.
class OrtLibrary {
 public:
  // `path`: of the library; empty tries $VLMTRIM_ONNXRUNTIME, then the path known at build, then the system's.
  // Throws Refusal where none opens.
  static std::shared_ptr<OrtLibrary> get(const std::string& path);

  OrtLibrary(const OrtApi* api, OrtEnv* env, std::string version)
      : api_(api), env_(env), version_(std::move(version)) {}
  const OrtApi* api() const { return api_; }
  const OrtEnv* env() const { return env_; }
  const std::string& version() const { return version_; }

  // Throws Refusal with the first line of what went wrong, behind `what`.
  void check(OrtStatus* status, const std::string& what) const;

 private:
  const OrtApi* api_;
  OrtEnv* env_;
  std::string version_;
};

}  // namespace vlmtrim
