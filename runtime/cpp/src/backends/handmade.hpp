// Small ONNX models written by hand, field by field. Mirrors runtime/backends/handmade.py.
#pragma once

#include <cstdint>
#include <string>
#include <utility>
#include <vector>

#include "core/contract.hpp"

namespace vlmtrim::handmade {

// ONNX's number of a dtype (onnx.TensorProto.DataType), and its bits.
struct Stored {
  int number, bits;
};
Stored stored_of(DType dtype);

// An integer, and bytes, under the number of a field.
std::string number(uint64_t field, uint64_t value);
std::string field(uint64_t number, const std::string& data);

// A NodeProto whose attributes are integers.
std::string node(const char* op, const std::vector<std::string>& inputs, const char* output,
                 const std::vector<std::pair<std::string, uint64_t>>& attributes);
// A ModelProto of the fields of a graph, opset 24.
std::string model(const std::string& graph);
// A ModelProto of y = Identity(x), of any shape.
std::string identity(DType dtype);

}  // namespace vlmtrim::handmade
