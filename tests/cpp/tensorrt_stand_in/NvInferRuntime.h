// A stand-in for TensorRT's header, for tests alone: the declarations that runtime/cpp uses, in a layout of their own.
// What is compiled with it works with the stand-in's library and no other.
#pragma once

#include <cuda_runtime_api.h>

#include <cstddef>
#include <cstdint>

#include "NvInferVersion.h"

#define NV_TENSORRT_VERSION (NV_TENSORRT_MAJOR * 10000 + NV_TENSORRT_MINOR * 100 + NV_TENSORRT_PATCH)

namespace nvinfer1 {

enum class DataType : int32_t { kFLOAT = 0, kHALF = 1, kINT32 = 3, kBOOL = 4, kBF16 = 7, kINT64 = 8 };
enum class TensorLocation : int32_t { kDEVICE = 0, kHOST = 1 };
enum class ExecutionContextAllocationStrategy : int32_t { kSTATIC = 0, kON_PROFILE_CHANGE = 1, kUSER_MANAGED = 2 };

struct Dims {
  static constexpr int32_t MAX_DIMS{8};
  int32_t nbDims;
  int64_t d[MAX_DIMS];
};

class ILogger {
 public:
  enum class Severity : int32_t { kINTERNAL_ERROR = 0, kERROR = 1, kWARNING = 2, kINFO = 3, kVERBOSE = 4 };
  virtual ~ILogger() = default;
  virtual void log(Severity severity, char const* message) noexcept = 0;
};

class IHostMemory {
 public:
  virtual ~IHostMemory() noexcept = default;
  virtual void* data() const noexcept = 0;
  virtual std::size_t size() const noexcept = 0;
};

class IExecutionContext {
 public:
  virtual ~IExecutionContext() noexcept = default;
  virtual bool setOptimizationProfileAsync(int32_t index, cudaStream_t stream) noexcept = 0;
  virtual bool setInputShape(char const* name, Dims const& dims) noexcept = 0;
  virtual Dims getTensorShape(char const* name) const noexcept = 0;
  virtual int32_t inferShapes(int32_t most, char const** names) noexcept = 0;
  virtual std::size_t updateDeviceMemorySizeForShapes() noexcept = 0;
  virtual void setDeviceMemoryV2(void* memory, int64_t size) noexcept = 0;
  virtual bool setTensorAddress(char const* name, void* data) noexcept = 0;
  virtual bool enqueueV3(cudaStream_t stream) noexcept = 0;
};

#ifdef TRT_MAJOR_RTX
enum class CudaGraphStrategy : int32_t { kDISABLED = 0, kWHOLE_GRAPH_CAPTURE = 1 };
enum class DynamicShapesKernelSpecializationStrategy : int32_t { kLAZY = 0, kEAGER = 1, kNONE = 2 };

class IRuntimeCache {
 public:
  virtual ~IRuntimeCache() noexcept = default;
  virtual IHostMemory* serialize() const noexcept = 0;
  virtual bool deserialize(void const* blob, std::size_t size) noexcept = 0;
};

class IRuntimeConfig {
 public:
  virtual ~IRuntimeConfig() noexcept = default;
  virtual void setExecutionContextAllocationStrategy(ExecutionContextAllocationStrategy strategy) noexcept = 0;
  virtual IRuntimeCache* createRuntimeCache() const noexcept = 0;
  virtual bool setRuntimeCache(IRuntimeCache& cache) noexcept = 0;
  virtual bool setCudaGraphStrategy(CudaGraphStrategy strategy) noexcept = 0;
  virtual void setDynamicShapesKernelSpecializationStrategy(
      DynamicShapesKernelSpecializationStrategy strategy) noexcept = 0;
};
#endif

class ICudaEngine {
 public:
  virtual ~ICudaEngine() noexcept = default;
  virtual int32_t getNbIOTensors() const noexcept = 0;
  virtual char const* getIOTensorName(int32_t index) const noexcept = 0;
  virtual TensorLocation getTensorLocation(char const* name) const noexcept = 0;
  virtual Dims getTensorShape(char const* name) const noexcept = 0;
  virtual DataType getTensorDataType(char const* name) const noexcept = 0;
  virtual int32_t getNbOptimizationProfiles() const noexcept = 0;
#ifdef TRT_MAJOR_RTX
  virtual IRuntimeConfig* createRuntimeConfig() noexcept = 0;
  virtual IExecutionContext* createExecutionContext(IRuntimeConfig* config) noexcept = 0;
#else
  virtual IExecutionContext* createExecutionContext(ExecutionContextAllocationStrategy strategy) noexcept = 0;
#endif
};

class IRuntime {
 public:
  virtual ~IRuntime() noexcept = default;
  virtual ICudaEngine* deserializeCudaEngine(void const* blob, std::size_t size) noexcept = 0;
};

}  // namespace nvinfer1
