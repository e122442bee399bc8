// Whether an ONNX Runtime multiplies by packed weights as they are, tried on a model of one matrix.
// Mirrors runtime/backends/fusing.py.
#pragma once

#include "backends/ort_device.hpp"
#include "core/contract.hpp"

namespace vlmtrim {

// What activations are multiplied in: rounded to 8 bits ("4"), or as they are ("1").
constexpr const char* kAccuracyLevel = "session.qdq_matmulnbits_accuracy_level";

bool fuses(const OrtDevice& device, const Packed& kind, DType dtype, const char* level);

}  // namespace vlmtrim
