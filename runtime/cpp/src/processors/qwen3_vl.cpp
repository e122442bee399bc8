// Qwen3-VL: as Qwen2-VL; the tower's learned grid of positions is resampled to each picture's grid.
// Mirrors runtime/processors/qwen3_vl.py.
#include <algorithm>
#include <cmath>

#include "core/error.hpp"
#include "processors/families.hpp"
#include "processors/qwen_vl.hpp"

namespace vlmtrim {
namespace {

constexpr int64_t kUsualPositions = 2304, kMostPositions = 1 << 20;  // of the learned grid

// The two nearest places of the learned grid along an axis, and how much each counts.
struct Taps {
  int64_t places[2];
  float weights[2];
};

class Qwen3Vl final : public QwenVl {
 public:
  Qwen3Vl(const Folder& files, const Contract& contract) : QwenVl(files, contract) {
    const std::string where = (files.path() / "config.json").string() + ": vision_config.num_position_embeddings";
    const Json positions = vision_config(files).value("num_position_embeddings", Json(kUsualPositions));
    const double count = number(positions, where, 1, kMostPositions);
    side_ = static_cast<int64_t>(std::sqrt(std::floor(count)));
    auto inputs = shapes();
    inputs["grid_index"] = inputs["grid_weights"] = {-1, merge() * merge(), 4};
    expect_inputs(files, contract, inputs);
  }

  // In the prompt their frames stand behind words.
  bool takes_videos() const override { return false; }

  Pictures prepare(const std::vector<Shown>& shown) const override {
    Pictures made = QwenVl::prepare(shown);
    const Tensor& places = made.inputs.at("patch_positions");
    const Shape shape{places.shape[0], places.shape[1], 4};
    Tensor index = Tensor::empty(DType::kInt64, shape), weights = Tensor::empty(DType::kFloat32, shape);
    const int64_t* place = places.as<int64_t>();
    int64_t* corner = index.as<int64_t>();
    float* weight = weights.as<float>();
    for (size_t i = 0; i < made.tokens.size(); ++i) {
      const std::vector<Taps> rows = along(made.grids[i][0] * merge()), columns = along(made.grids[i][1] * merge());
      for (int64_t patch = 0; patch < made.tokens[i] * shape[1]; ++patch, place += 2) {
        const Taps &row = rows[static_cast<size_t>(place[0])], &column = columns[static_cast<size_t>(place[1])];
        for (int part = 0; part < 4; ++part) {
          *corner++ = row.places[part / 2] * side_ + column.places[part % 2];
          *weight++ = row.weights[part / 2] * column.weights[part % 2];
        }
      }
    }
    made.inputs["grid_index"] = index;
    made.inputs["grid_weights"] = weights;
    return made;
  }

 private:
  // Of every patch along an axis of so many: bilinear, corners aligned.
  std::vector<Taps> along(int64_t patches) const {
    std::vector<Taps> found;
    for (int64_t patch = 0; patch < patches; ++patch) {
      const float source = static_cast<float>(patch) * static_cast<float>(side_ - 1) /
                           static_cast<float>(std::max<int64_t>(patches - 1, 1));
      const float low = std::floor(source);
      Taps taps{};
      for (int tap = 0; tap < 2; ++tap) {
        const float distance = std::abs(source - low - static_cast<float>(tap));
        taps.places[tap] = std::clamp<int64_t>(static_cast<int64_t>(low) + tap, 0, side_ - 1);
        taps.weights[tap] = std::max(1 - distance, 0.0F);
      }
      found.push_back(taps);
    }
    return found;
  }

  int64_t side_;  // of the learned grid
};

}  // namespace

std::unique_ptr<Processor> make_qwen3_vl(const Folder& files, const Contract& contract) {
  return std::make_unique<Qwen3Vl>(files, contract);
}

}  // namespace vlmtrim
