// Qwen3-VL: as Qwen2-VL for still pictures; the tower's learned grid of positions is resampled to each picture's grid.
// Every two frames of a video stand in the prompt as a picture does, behind their time in words.
// Mirrors runtime/processors/qwen3_vl.py.
#include <algorithm>
#include <cmath>
#include <cstdio>

#include "core/error.hpp"
#include "processors/families.hpp"
#include "processors/qwen_vl.hpp"

namespace vlmtrim {
namespace {

constexpr int64_t kUsualPositions = 2304, kMostPositions = 1 << 20;  // of the learned grid
constexpr const char *kStart = "<|vision_start|>", *kImage = "<|image_pad|>", *kEnd = "<|vision_end|>";
constexpr int64_t kMostPixelsSeen = INT32_MAX;
constexpr int64_t kLeastOfAll = 128 * 32 * 32, kMostOfAll = 768 * 32 * 32;  // of settings that name none
constexpr int64_t kMostTokens = 768;  // of two frames, where settings have cap_pixels_per_frame
constexpr int64_t kLeastFrames = 4, kMostSampled = 768;

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
    inputs["grid_index"] = inputs["grid_weights"] = {-1, merge_ * merge_, 4};
    expect_inputs(files, contract, inputs);
    const ImageSettings settings = ImageSettings::of_videos(files);
    const auto size = settings.sides("size", {}, kMostPixelsSeen);
    const auto shortest = size.find("shortest_edge"), longest = size.find("longest_edge");
    if (shortest != size.end()) least_of_all_ = shortest->second;
    if (longest != size.end()) most_of_all_ = longest->second;
    capped_ = settings.boolean("cap_pixels_per_frame", false);
    settings.integer("min_frames", 1, kMostPixelsSeen, kLeastFrames);
    settings.integer("max_frames", 1, kMostPixelsSeen, kMostSampled);
    frame_ = {settings.resample(), settings.normalisation()};
  }

  bool takes_videos() const override { return true; }

  Pictures prepare(const std::vector<Shown>& shown) const override {
    Pictures made = QwenVl::prepare(shown);
    const Tensor& places = made.inputs.at("patch_positions");
    const Shape shape{places.shape[0], places.shape[1], 4};
    Tensor index = Tensor::empty(DType::kInt64, shape), weights = Tensor::empty(DType::kFloat32, shape);
    const int64_t* place = places.as<int64_t>();
    int64_t* corner = index.as<int64_t>();
    float* weight = weights.as<float>();
    for (size_t i = 0; i < made.tokens.size(); ++i) {
      const std::vector<Taps> rows = along(made.grids[i][0] * merge_), columns = along(made.grids[i][1] * merge_);
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
    if (std::none_of(shown.begin(), shown.end(), [](const Shown& one) { return one.is_video(); })) return made;
    for (size_t i = 0; i < shown.size(); ++i) made.words.push_back(words(shown[i], made.tokens[i]));
    return made;
  }

  // Two frames of a video have the positions of a picture: their time is in words.
  Positions positions(const std::vector<int64_t>& ids, int64_t start, const Pictures* pictures) const override {
    if (pictures == nullptr) return QwenVl::positions(ids, start, nullptr);
    Pictures each;
    for (const auto& grid : pictures->grids) {
      for (size_t frame = 2; frame < grid.size(); ++frame) each.grids.push_back({grid[0], grid[1], 0});
    }
    return QwenVl::positions(ids, start, &each);
  }

 protected:
  float interval(double /*fps*/) const override { return 0; }

  // The pixels of all frames count together; where an odd one is repeated behind that count, they are still no more
  // than the bundle takes.
  Size frame_size(const Picture& frame, int64_t count) const override {
    const int64_t side = patch_ * merge_, pixels = side * side, full = (count + together_ - 1) / together_;
    const int64_t shown = std::max(count, together_), room = contract_.image_tokens * together_ * pixels;
    const double scale = std::max(static_cast<double>(side) / std::min(frame.width, frame.height), 1.0);
    const Size given{static_cast<int64_t>(frame.height * scale), static_cast<int64_t>(frame.width * scale)};
    int64_t most = std::min(most_of_all_, room);
    if (capped_) {
      const auto floor = static_cast<int64_t>(static_cast<double>(least_of_all_) * 1.05);
      most = std::min(std::max(std::min(kMostTokens * pixels, most / shown), floor) * shown, room);
    }
    const double groups = std::nearbyint(static_cast<double>(shown) / static_cast<double>(together_));
    const int64_t counted = static_cast<int64_t>(groups) * together_;
    Size found = fitting_size(given, {side, std::min(least_of_all_, most), most, shown, counted});
    if (found.first * found.second * full * together_ > room) {
      found = fitting_size(given, {side, 0, room, full * together_, full * together_});
    }
    check_tokens(frame, found.first * found.second / pixels, full);
    return found;
  }

 private:
  // What the prompt says of a picture or a video, its image tokens among it.
  std::string words(const Shown& one, int64_t tokens) const {
    const auto marks = [](int64_t count) {
      std::string text;
      for (int64_t i = 0; i < count; ++i) text += kImage;
      return text;
    };
    if (!one.is_video()) return marks(tokens);
    const std::vector<double> seconds = one.seconds();
    const auto group = static_cast<size_t>(together_);
    const auto count = static_cast<int64_t>((seconds.size() + group - 1) / group);
    std::string told;
    for (size_t first = 0; first < seconds.size(); first += group) {
      const double last = seconds[std::min(first + group, seconds.size()) - 1];
      char time[64];
      std::snprintf(time, sizeof time, "<%.1f seconds>", (seconds[first] + last) / 2);
      told += said(time, kStart, marks(tokens / count), kEnd);
    }
    return told;
  }

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

  int64_t side_;                                                   // of the learned grid
  int64_t least_of_all_ = kLeastOfAll, most_of_all_ = kMostOfAll;  // pixels of all frames
  bool capped_ = false;
};

}  // namespace

std::unique_ptr<Processor> make_qwen3_vl(const Folder& files, const Contract& contract) {
  return std::make_unique<Qwen3Vl>(files, contract);
}

}  // namespace vlmtrim
