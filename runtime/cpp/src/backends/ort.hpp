// ONNX Runtime on the CPU, and on a GPU by its CUDA provider. Mirrors runtime/backends/ort.py.
#pragma once

#include <memory>

#include "backends/backend.hpp"

namespace vlmtrim {

// Both throw Refusal where no library of ONNX Runtime is found, or one without the provider.
std::unique_ptr<Backend> make_ort_cpu(const BackendOptions& options);
std::unique_ptr<Backend> make_ort_cuda(const BackendOptions& options);

}  // namespace vlmtrim
