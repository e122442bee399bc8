#include "backends/handmade.hpp"

namespace vlmtrim::handmade {
namespace {

std::string varint(uint64_t value) {
  std::string out;
  for (; value > 0x7F; value >>= 7) out += static_cast<char>((value & 0x7F) | 0x80);
  return out + static_cast<char>(value);
}

}  // namespace

Stored stored_of(DType dtype) {
  switch (dtype) {
    case DType::kFloat32:
      return {1, 32};
    case DType::kFloat16:
      return {10, 16};
    case DType::kBFloat16:
      return {16, 16};
    case DType::kInt64:
      return {7, 64};
    case DType::kInt32:
      return {6, 32};
    case DType::kBool:
      return {9, 8};
  }
  return {0, 0};
}

std::string number(uint64_t field, uint64_t value) { return varint(field << 3) + varint(value); }

std::string field(uint64_t number, const std::string& data) {
  return varint(number << 3 | 2) + varint(data.size()) + data;
}

std::string node(const char* op, const std::vector<std::string>& inputs, const char* output,
                 const std::vector<std::pair<std::string, uint64_t>>& attributes) {
  std::string made;
  for (const auto& input : inputs) made += field(1, input);
  made += field(2, output) + field(4, op);
  for (const auto& [name, v] : attributes) made += field(5, field(1, name) + number(3, v) + number(20, 2));
  return made;
}

std::string model(const std::string& graph) {
  return number(1, 11) + field(7, graph + field(2, "graph")) + field(8, field(1, "") + number(2, 24));
}

std::string identity(DType dtype) {
  const std::string kind = field(2, field(1, number(1, static_cast<uint64_t>(stored_of(dtype).number))));
  return model(field(1, node("Identity", {"x"}, "y", {})) + field(11, field(1, "x") + kind) +
               field(12, field(1, "y") + kind));
}

}  // namespace vlmtrim::handmade
