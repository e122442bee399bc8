// Whether an ONNX Runtime multiplies by packed weights as they are, tried on a model of one matrix.
// Mirrors runtime/backends/fusing.py.
#pragma once

#include "backends/ort_device.hpp"
#include "core/contract.hpp"

namespace vlmtrim {

// What activations are multiplied in: rounded to 8 bits ("4"), or as they are ("1").
constexpr const char* kAccuracyLevel = "session.qdq_matmulnbits_accuracy_level";
// MatMulInteger by unsigned weights, with kernels that are slower where both are right.
constexpr const char* kUnsigned = "session.x64quantprecision";

bool fuses(const OrtDevice& device, const Packed& kind, DType dtype, const char* level);
// Whether sums of products by signed integers are wrong on this processor: without VNNI, x86 kernels add up pairs of
// products in 16 bits, which do not hold the largest.
bool saturates(const OrtDevice& device);
// Whether the graphs of such weights round activations to 8 bits, whatever the level is.
bool rounds(const Packed& kind);

}  // namespace vlmtrim
