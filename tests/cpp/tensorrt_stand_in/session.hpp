// An ONNX file on ONNX Runtime, on arrays of bytes.
#pragma once

#include <onnxruntime_c_api.h>

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "backends/ort_library.hpp"

namespace stand_in {

struct Array {
  std::string name;
  ONNXTensorElementDataType type;
  std::vector<int64_t> shape;  // -1 where it is open
  std::vector<char> bytes;

  size_t nbytes() const;
};

class OnnxSession {
 public:
  explicit OnnxSession(const std::string& path);
  const std::vector<Array>& inputs() const { return inputs_; }
  const std::vector<Array>& outputs() const { return outputs_; }
  // Outputs in their order, of inputs in theirs.
  std::vector<Array> run(const std::vector<Array>& inputs) const;

 private:
  Array described(bool input, size_t index) const;

  std::shared_ptr<vlmtrim::OrtLibrary> library_;
  std::shared_ptr<OrtSession> session_;
  std::vector<Array> inputs_, outputs_;
};

}  // namespace stand_in
