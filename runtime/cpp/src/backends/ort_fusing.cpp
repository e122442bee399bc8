#include "backends/ort_fusing.hpp"

#include <stdlib.h>

#include <filesystem>
#include <fstream>
#include <vector>

#include "core/error.hpp"

namespace vlmtrim {
namespace {

constexpr int64_t kOutputs = 32;
constexpr const char* kKernel = "MatMulNBits";

// ONNX's numbers of dtypes (onnx.TensorProto.DataType), and their bits.
struct Stored {
  int number, bits;
};

Stored stored_of(const std::string& format) {
  if (format == "int8") return {3, 8};
  if (format.rfind("int4", 0) == 0) return {22, 4};
  return {0, 0};
}

Stored stored_of(DType dtype) {
  if (dtype == DType::kFloat32) return {1, 32};
  return dtype == DType::kFloat16 ? Stored{10, 16} : Stored{16, 16};
}

std::string varint(uint64_t value) {
  std::string out;
  for (; value > 0x7F; value >>= 7) out += static_cast<char>((value & 0x7F) | 0x80);
  return out + static_cast<char>(value);
}

std::string number(uint64_t field, uint64_t value) { return varint(field << 3) + varint(value); }
std::string field(uint64_t number, const std::string& data) {
  return varint(number << 3 | 2) + varint(data.size()) + data;
}

std::string tensor(const std::string& name, Stored type, const std::vector<int64_t>& shape) {
  std::string made;
  int64_t count = 1;
  for (const int64_t size : shape) {
    made += number(1, static_cast<uint64_t>(size));
    count *= size;
  }
  std::string ones;
  const std::string one("\x00\x00\x80\x3f", 4);  // a float of 1; as integers, whatever it is
  for (int64_t i = 0; i < count * type.bits / 32; ++i) ones += one;
  return made + number(2, static_cast<uint64_t>(type.number)) + field(8, name) + field(9, ones);
}

std::string value(const std::string& name, Stored type, int64_t width) {
  const std::string dims = field(1, number(1, 1)) + field(1, number(1, static_cast<uint64_t>(width)));
  const std::string kind = field(1, number(1, static_cast<uint64_t>(type.number)) + field(2, dims));
  return field(1, name) + field(2, kind);
}

std::string node(const char* op, const std::vector<std::string>& inputs, const char* output,
                 const std::vector<std::pair<std::string, uint64_t>>& attributes) {
  std::string made;
  for (const auto& input : inputs) made += field(1, input);
  made += field(2, output) + field(4, op);
  for (const auto& [name, v] : attributes) made += field(5, field(1, name) + number(3, v) + number(20, 2));
  return made;
}

// A ModelProto of y = MatMul(x, DequantizeLinear(w, scales)).
std::string model(const Packed& kind, DType dtype) {
  const int64_t inputs = kind.block > 0 ? 2 * kind.block : 128;
  std::vector<int64_t> scales{kOutputs};
  if (kind.block > 0) scales = {inputs / kind.block, kOutputs};
  std::vector<std::pair<std::string, uint64_t>> layout{{"axis", 1}};
  if (kind.block > 0) layout = {{"axis", 0}, {"block_size", static_cast<uint64_t>(kind.block)}};
  const Stored packed = stored_of(kind.format), floats = stored_of(dtype);
  std::vector<std::string> dequantised{"w", "scales"};
  std::string zeros;
  if (kind.format == "int4_zero") {
    dequantised.emplace_back("zeros");
    zeros = field(5, tensor("zeros", packed, scales));
  }
  const std::string graph = field(1, node("DequantizeLinear", dequantised, "floats", layout)) +
                            field(1, node("MatMul", {"x", "floats"}, "y", {})) + field(2, "probe") +
                            field(5, tensor("w", packed, {inputs, kOutputs})) +
                            field(5, tensor("scales", floats, scales)) + zeros + field(11, value("x", floats, inputs)) +
                            field(12, value("y", floats, kOutputs));
  return number(1, 11) + field(7, graph) + field(8, field(1, "") + number(2, 24));
}

// The optimised graph that a session saves; empty where the model does not open.
std::string optimised(const OrtLibrary& library, const std::string& bytes, const char* level,
                      const std::filesystem::path& path) {
  const OrtApi* api = library.api();
  OrtSessionOptions* options = nullptr;
  library.check(api->CreateSessionOptions(&options), "ONNX Runtime");
  const std::shared_ptr<OrtSessionOptions> held(options, api->ReleaseSessionOptions);
  library.check(api->SetSessionLogSeverityLevel(options, ORT_LOGGING_LEVEL_FATAL), "ONNX Runtime");
  library.check(api->SetOptimizedModelFilePath(options, path.c_str()), "ONNX Runtime");
  library.check(api->AddSessionConfigEntry(options, kAccuracyLevel, level), "ONNX Runtime");
  OrtSession* session = nullptr;
  OrtStatus* status = api->CreateSessionFromArray(library.env(), bytes.data(), bytes.size(), options, &session);
  if (status != nullptr) {
    api->ReleaseStatus(status);
    return "";
  }
  api->ReleaseSession(session);
  std::ifstream in(path, std::ios::binary);
  return {std::istreambuf_iterator<char>(in), std::istreambuf_iterator<char>()};
}

}  // namespace

bool fuses(const OrtLibrary& library, const Packed& kind, DType dtype, const char* level) {
  if (stored_of(kind.format).number == 0) return false;
  std::string folder = (std::filesystem::temp_directory_path() / "vlmtrim-XXXXXX").string();
  if (mkdtemp(folder.data()) == nullptr) throw Refusal("no temporary folder can be made; set TMPDIR");
  const std::string graph = optimised(library, model(kind, dtype), level, folder + "/optimised.onnx");
  std::error_code ignored;
  std::filesystem::remove_all(folder, ignored);
  return graph.find(kKernel) != std::string::npos;
}

}  // namespace vlmtrim
