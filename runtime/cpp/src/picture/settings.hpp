// The settings of a checkpoint's image processor: every value by type and range, by name.
// Mirrors runtime/image_settings.py.
#pragma once

#include <array>
#include <map>
#include <optional>
#include <string>
#include <vector>

#include "core/reading.hpp"
#include "core/tensor.hpp"
#include "picture/picture.hpp"

namespace vlmtrim {

using Channels = std::array<double, 3>;

// What becomes of 0..255 values: a factor, then mean and deviation of each channel.
struct Normalisation {
  std::optional<double> scale;
  std::optional<std::pair<Channels, Channels>> mean_std;

  // RGB [height, width, 3] -> float32 [3, height, width], by transformers' steps; `target` has room for them.
  void apply(const Picture& picture, float* target) const;
};

// How frames of a video are scaled, and what becomes of their values.
struct FrameSettings {
  int filter = kBicubic;
  Normalisation values;
};

class ImageSettings {
 public:
  // preprocessor_config.json, or the image_processor part of processor_config.json. Throws BundleError, as all do.
  static ImageSettings read(const Folder& files);

  // As transformers finds them: the video_processor part of processor_config.json, else video_preprocessor_config.json,
  // else those of pictures.
  static ImageSettings of_videos(const Folder& files);
  // Settings inside these; none where there are none.
  ImageSettings part(const char* key) const;

  [[noreturn]] void refuse(const std::string& problem) const;
  int64_t integer(const char* key, int64_t low, int64_t high, std::optional<int64_t> fallback = std::nullopt) const;
  double number(const char* key, double low, double high, double fallback) const;
  bool boolean(const char* key, bool fallback) const;
  // Sides in pixels by name; a plain number is each of `plain`.
  std::map<std::string, int64_t> sides(const char* key, const std::vector<std::string>& plain,
                                       int64_t most = 4096) const;
  // (height, width) of each of at most `most` sizes.
  std::vector<std::pair<int64_t, int64_t>> pairs(const char* key, size_t most) const;
  int resample(int fallback = kBicubic) const;
  Normalisation normalisation() const;

 private:
  ImageSettings(Json raw, std::string where) : raw_(std::move(raw)), where_(std::move(where)) {}
  const Json* find(const char* key) const;  // nullptr where it is missing or null
  Channels channels(const char* key, double low) const;

  Json raw_;
  std::string where_;
};

// The steps of transformers' CLIP, SigLIP and LLaVA image processors (Pillow backend): bit-equal results.
struct ImageProcessor {
  int height = 0, width = 0;
  std::optional<int64_t> shortest_edge;
  bool crop = false, pad_to_square = false;
  int filter = kBicubic;
  Normalisation values;

  static ImageProcessor from_folder(const Folder& files);
  // RGB picture -> float32 [3, height, width] at `target`.
  void apply(const Picture& picture, float* target) const { values.apply(framed(picture), target); }
  // Of every picture, [n, 3, height, width].
  Tensor stacked(const std::vector<const Picture*>& pictures) const;
  Tensor stacked(const std::vector<Picture>& pictures) const;
  // The part of the picture that the model sees.
  Picture framed(const Picture& picture) const;

 private:
  Picture padded(const Picture& picture) const;
};

// Throws BundleError where the vision graph takes other inputs than the settings make; a dim of -1 is symbolic.
void expect_inputs(const Folder& files, const Contract& contract, const std::map<std::string, Shape>& shapes);

}  // namespace vlmtrim
