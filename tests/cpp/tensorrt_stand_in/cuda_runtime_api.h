// A stand-in for CUDA's header, for tests alone: the declarations that runtime/cpp uses. See cuda.cpp.
#pragma once

#include <stddef.h>

#define STAND_IN_API __attribute__((visibility("default")))

struct CUstream_st;
struct CUgraph_st;
struct CUgraphExec_st;
typedef struct CUstream_st* cudaStream_t;
typedef struct CUgraph_st* cudaGraph_t;
typedef struct CUgraphExec_st* cudaGraphExec_t;

enum cudaError_t {
  cudaSuccess = 0,
  cudaErrorInvalidValue = 1,
  cudaErrorMemoryAllocation = 2,
  cudaErrorInsufficientDriver = 35,
  cudaErrorNoDevice = 100,
  cudaErrorStreamCaptureInvalidated = 901
};
enum cudaMemcpyKind { cudaMemcpyHostToDevice = 1, cudaMemcpyDeviceToHost = 2 };
enum cudaStreamCaptureMode { cudaStreamCaptureModeThreadLocal = 1 };

struct cudaDeviceProp {
  char name[256];
  int major, minor;
};

constexpr unsigned cudaStreamNonBlocking = 1, cudaHostAllocDefault = 0;

extern "C" {
STAND_IN_API const char* cudaGetErrorName(cudaError_t error);
STAND_IN_API const char* cudaGetErrorString(cudaError_t error);
STAND_IN_API cudaError_t cudaGetLastError();
STAND_IN_API cudaError_t cudaGetDeviceCount(int* count);
STAND_IN_API cudaError_t cudaDriverGetVersion(int* version);
STAND_IN_API cudaError_t cudaRuntimeGetVersion(int* version);
STAND_IN_API cudaError_t cudaSetDevice(int device);
STAND_IN_API cudaError_t cudaGetDeviceProperties(cudaDeviceProp* properties, int device);
STAND_IN_API cudaError_t cudaMemGetInfo(size_t* free, size_t* total);
STAND_IN_API cudaError_t cudaMalloc(void** address, size_t nbytes);
STAND_IN_API cudaError_t cudaFree(void* address);
STAND_IN_API cudaError_t cudaHostAlloc(void** address, size_t nbytes, unsigned flags);
STAND_IN_API cudaError_t cudaFreeHost(void* address);
STAND_IN_API cudaError_t cudaMemsetAsync(void* address, int value, size_t nbytes, cudaStream_t stream);
STAND_IN_API cudaError_t cudaMemcpyAsync(void* to, const void* from, size_t nbytes, cudaMemcpyKind kind,
                                         cudaStream_t stream);
STAND_IN_API cudaError_t cudaStreamCreateWithFlags(cudaStream_t* stream, unsigned flags);
STAND_IN_API cudaError_t cudaStreamDestroy(cudaStream_t stream);
STAND_IN_API cudaError_t cudaStreamSynchronize(cudaStream_t stream);
STAND_IN_API cudaError_t cudaStreamBeginCapture(cudaStream_t stream, cudaStreamCaptureMode mode);
STAND_IN_API cudaError_t cudaStreamEndCapture(cudaStream_t stream, cudaGraph_t* graph);
STAND_IN_API cudaError_t cudaGraphInstantiate(cudaGraphExec_t* made, cudaGraph_t graph, unsigned long long flags);
STAND_IN_API cudaError_t cudaGraphLaunch(cudaGraphExec_t graph, cudaStream_t stream);
STAND_IN_API cudaError_t cudaGraphExecDestroy(cudaGraphExec_t graph);
STAND_IN_API cudaError_t cudaGraphDestroy(cudaGraph_t graph);
}
