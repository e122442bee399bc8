// What the stand-ins of CUDA and TensorRT share, and what tests ask of them.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>
#include <functional>
#include <string>

namespace stand_in {

// Queues a piece of work, or records it where the stream is captured; it runs when the host waits.
STAND_IN_API void submit(std::function<void()> work);
STAND_IN_API bool capturing();
// Whether a range lies in one live allocation of the device.
STAND_IN_API bool is_on_device(const void* address, size_t nbytes);
// A mistake of the program under test.
STAND_IN_API void blame(const std::string& mistake);
STAND_IN_API void count(const std::string& what);
// Whether launches are accepted while the stream is captured.
STAND_IN_API bool launches_in_capture();

}  // namespace stand_in

extern "C" {
// A new device of so many bytes; mistakes and counts begin anew. `capture`: 0 works, 1 CUDA refuses it, 2 the library.
STAND_IN_API void stand_in_begin(int major, int minor, size_t memory, int capture);
STAND_IN_API int64_t stand_in_count(const char* what);
// What cudaGetDeviceCount returns, and the driver's version.
STAND_IN_API void stand_in_driver(int error, int version);
// The first mistake; "" where there is none.
STAND_IN_API const char* stand_in_mistake();
}
