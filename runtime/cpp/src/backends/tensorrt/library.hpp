// TensorRT's or TensorRT-RTX's library, opened while the program runs, so that a program starts where there is none.
// The classes come from the headers that this is compiled with, so the library must be of their version.
//
// This and phase.hpp and tensorrt.cpp are compiled once for each of the two libraries, in a namespace of its own.
#pragma once

#include <NvInferRuntime.h>

#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include "core/error.hpp"

namespace vlmtrim::VLMTRIM_LIBRARY {

#ifdef TRT_MAJOR_RTX
constexpr const char* kName = "tensorrt-rtx";
#else
constexpr const char* kName = "tensorrt";
#endif

// Keeps errors for the message of a refusal.
class Messages final : public nvinfer1::ILogger {
 public:
  void log(Severity severity, const char* message) noexcept override;
  // The last few; "no reason given" where there is none.
  std::string last(size_t count) const;
  void clear();

 private:
  mutable std::mutex mutex_;
  std::vector<std::string> held_;
};

class Library {
 public:
  // `path`: of the library; empty tries $VLMTRIM_TENSORRT or $VLMTRIM_TENSORRT_RTX, then the path known at build, then
  // the system's. Throws Refusal where none opens, or one of another version.
  explicit Library(const std::string& path);

  // As the engines' fingerprints have it: major.minor.patch.build.
  const std::string& version() const { return version_; }
  Messages& messages() { return messages_; }
  nvinfer1::IRuntime& runtime() { return *runtime_; }

 private:
  Messages messages_;
  std::string version_;
  std::unique_ptr<nvinfer1::IRuntime> runtime_;
};

}  // namespace vlmtrim::VLMTRIM_LIBRARY
