// ONNX Runtime on the CPU. Mirrors runtime/backends/ort.py.
#pragma once

#include <memory>

#include "backends/backend.hpp"

namespace vlmtrim {

// Throws Refusal where no library of ONNX Runtime is found.
std::unique_ptr<Backend> make_ort(const BackendOptions& options);

}  // namespace vlmtrim
