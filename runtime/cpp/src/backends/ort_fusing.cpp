#include "backends/ort_fusing.hpp"

#include <stdlib.h>

#include <filesystem>
#include <fstream>
#include <vector>

#include "backends/handmade.hpp"
#include "core/error.hpp"

namespace vlmtrim {
namespace {

using handmade::field, handmade::node, handmade::number, handmade::Stored;

constexpr int64_t kInputs = 64, kOutputs = 32;
constexpr const char* kKernel = "MatMulNBits";

Stored stored_of(const std::string& format) {
  if (format == "int8") return {3, 8};
  if (format.rfind("int4", 0) == 0) return {22, 4};
  return {0, 0};
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

// A ModelProto of y = MatMul(x, DequantizeLinear(w, scales)).
std::string multiplying(const Packed& kind, DType dtype) {
  const int64_t inputs = kind.block > 0 ? 2 * kind.block : 128;
  std::vector<int64_t> scales{kOutputs};
  if (kind.block > 0) scales = {inputs / kind.block, kOutputs};
  std::vector<std::pair<std::string, uint64_t>> layout{{"axis", 1}};
  if (kind.block > 0) layout = {{"axis", 0}, {"block_size", static_cast<uint64_t>(kind.block)}};
  const Stored packed = stored_of(kind.format), floats = handmade::stored_of(dtype);
  std::vector<std::string> dequantised{"w", "scales"};
  std::string zeros;
  if (kind.format == "int4_zero") {
    dequantised.emplace_back("zeros");
    zeros = field(5, tensor("zeros", packed, scales));
  }
  const std::string graph = field(1, node("DequantizeLinear", dequantised, "floats", layout)) +
                            field(1, node("MatMul", {"x", "floats"}, "y", {})) +
                            field(5, tensor("w", packed, {inputs, kOutputs})) +
                            field(5, tensor("scales", floats, scales)) + zeros + field(11, value("x", floats, inputs)) +
                            field(12, value("y", floats, kOutputs));
  return handmade::model(graph);
}

// The optimised graph that a session saves; empty where the model does not open.
std::string optimised(const OrtDevice& device, const std::string& bytes, const char* level,
                      const std::filesystem::path& path) {
  const OrtLibrary& library = device.library();
  const OrtApi* api = library.api();
  const Handle<OrtSessionOptions> options = device.options();
  library.check(api->SetOptimizedModelFilePath(options.get(), path.c_str()), "ONNX Runtime");
  library.check(api->AddSessionConfigEntry(options.get(), kAccuracyLevel, level), "ONNX Runtime");
  OrtSession* session = nullptr;
  OrtStatus* status = api->CreateSessionFromArray(library.env(), bytes.data(), bytes.size(), options.get(), &session);
  if (status != nullptr) {
    api->ReleaseStatus(status);
    return "";
  }
  api->ReleaseSession(session);
  std::ifstream in(path, std::ios::binary);
  return {std::istreambuf_iterator<char>(in), std::istreambuf_iterator<char>()};
}

// A ModelProto of y = MatMulInteger(x, w) between casts, w full of 127.
std::string integers() {
  const Stored floats{1, 32}, bytes{3, 8};
  const std::string shape = number(1, kInputs) + number(1, kOutputs);
  const std::string weights = shape + number(2, static_cast<uint64_t>(bytes.number)) + field(8, "w") +
                              field(9, std::string(kInputs * kOutputs, 127));
  const std::string graph = field(1, node("Cast", {"x"}, "codes", {{"to", 2}})) +
                            field(1, node("MatMulInteger", {"codes", "w"}, "sums", {})) +
                            field(1, node("Cast", {"sums"}, "y", {{"to", 1}})) + field(5, weights) +
                            field(11, value("x", floats, kInputs)) + field(12, value("y", floats, kOutputs));
  return handmade::model(graph);
}

}  // namespace

bool rounds(const Packed& kind) { return kind.format == "w8a8"; }

bool saturates(const OrtDevice& device) {
  constexpr const char* what = "ONNX Runtime";
  const OrtLibrary& library = device.library();
  const OrtApi* api = library.api();
  const std::string model = integers();
  OrtSession* made = nullptr;
  library.check(api->CreateSessionFromArray(library.env(), model.data(), model.size(), device.options().get(), &made),
                what);
  const Handle<OrtSession> session(made, api->ReleaseSession);
  const Tensor x = Tensor::of(std::vector<float>(kInputs, 255.0f), {1, kInputs});
  OrtIoBinding* raw = nullptr;
  library.check(api->CreateIoBinding(made, &raw), what);
  const Handle<OrtIoBinding> binding(raw, api->ReleaseIoBinding);
  const Handle<OrtValue> input = device.value_of(x, what);
  library.check(api->BindInput(raw, "x", input.get()), what);
  library.check(api->BindOutputToDevice(raw, "y", device.memory()), what);
  library.check(api->RunWithBinding(made, nullptr, raw), what);
  const Tensor sums = device.tensor_of(device.outputs_of(raw, what).at(0), what);
  return sums.as<float>()[0] != 255.0f * 127 * kInputs;
}

bool fuses(const OrtDevice& device, const Packed& kind, DType dtype, const char* level) {
  if (rounds(kind)) return !device.cuda();  // in MatMulInteger, of which CUDA knows signed activations alone
  if (stored_of(kind.format).number == 0) return false;
  std::string folder = (std::filesystem::temp_directory_path() / "vlmtrim-XXXXXX").string();
  if (mkdtemp(folder.data()) == nullptr) throw Refusal("no temporary folder can be made; set TMPDIR");
  const std::string graph = optimised(device, multiplying(kind, dtype), level, folder + "/optimised.onnx");
  std::error_code ignored;
  std::filesystem::remove_all(folder, ignored);
  return graph.find(kKernel) != std::string::npos;
}

}  // namespace vlmtrim
