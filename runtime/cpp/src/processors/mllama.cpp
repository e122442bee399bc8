// Llama-3.2-Vision: a picture is fitted to a canvas of tiles; a token sees the pictures that its text follows.
#include <cmath>

#include "core/error.hpp"
#include "crossing.hpp"
#include "picture/settings.hpp"
#include "processors/families.hpp"

namespace vlmtrim {
namespace {

constexpr int64_t kMostTiles = 64;

using Canvas = std::pair<int64_t, int64_t>;  // rows, columns of tiles

class Mllama final : public Processor {
 public:
  Mllama(const Folder& files, const Contract& contract) : Processor(contract) {
    const ImageSettings settings = ImageSettings::read(files);
    auto size = settings.sides("size", {"height", "width"});
    tile_ = size["height"];
    if (tile_ == 0 || size["width"] != tile_) {
      settings.refuse("size gives no square tile; expected height and width of one");
    }
    tiles_ = settings.integer("max_image_tiles", 1, kMostTiles);
    filter_ = settings.resample(kBilinear);
    values_ = settings.normalisation();
    expect_inputs(files, contract,
                  {{"pixel_values", {-1, tiles_, 3, tile_, tile_}},
                   {"aspect_ratio_ids", {-1}},
                   {"aspect_ratio_mask", {-1, tiles_}}});
    if (contract.image_tokens % tiles_ != 0) {
      settings.refuse(
          said("max_image_tiles is ", tiles_, ", of which ", contract.image_tokens, " features cannot be made"));
    }
    for (int64_t rows = 1; rows <= tiles_; ++rows) {
      for (int64_t columns = 1; rows * columns <= tiles_; ++columns) canvases_.emplace_back(rows, columns);
    }
  }

  Pictures prepare(const std::vector<Shown>& shown) const override {
    const auto count = static_cast<int64_t>(shown.size());
    Tensor pixels = Tensor::zeros(DType::kFloat32, {count, tiles_, 3, tile_, tile_});
    std::vector<int64_t> ids, mask;
    for (int64_t i = 0; i < count; ++i) {
      const Picture& picture = shown[static_cast<size_t>(i)].picture();
      const size_t number = canvas_of(picture);
      const auto [rows, columns] = canvases_[number];
      std::vector<float> whole(static_cast<size_t>(3 * rows * columns * tile_ * tile_));
      values_.apply(on_canvas(picture, canvases_[number]), whole.data());
      cut(whole, canvases_[number], pixels.as<float>() + i * tiles_ * 3 * tile_ * tile_);
      ids.push_back(static_cast<int64_t>(number) + 1);
      for (int64_t tile = 0; tile < tiles_; ++tile) mask.push_back(tile < rows * columns ? 1 : 0);
    }
    return {{{"pixel_values", pixels},
             {"aspect_ratio_ids", Tensor::of(ids, {count})},
             {"aspect_ratio_mask", Tensor::of(mask, {count, tiles_})}},
            std::vector<int64_t>(shown.size(), 1),
            {},
            {}};
  }

  std::vector<int64_t> image_numbers(const Pictures& pictures, const View& view) const override {
    const std::vector<int64_t> mask = integers_of(pictures.inputs.at("aspect_ratio_mask"));
    const auto each = static_cast<size_t>(contract_.image_tokens / tiles_);
    std::vector<int64_t> numbers;
    for (size_t i = 0; i < mask.size(); ++i) {
      const int64_t picture = view.pictures + static_cast<int64_t>(i) / tiles_;
      numbers.insert(numbers.end(), each, mask[i] > 0 ? picture : kPadding);
    }
    return numbers;
  }

  // A token sees the last picture that begins at or before it, with those that its mark directly follows.
  std::vector<int64_t> seen_images(const std::vector<int64_t>& ids, View& view, bool brings) const override {
    std::vector<int64_t> seen;
    for (const int64_t id : ids) {
      const bool mark = brings && id == contract_.image_token_id;
      if (mark) {
        if (!view.at_mark) view.first = view.pictures;
        view.end = ++view.pictures;
      }
      view.at_mark = mark;
      seen.push_back(view.end > 0 ? view.first : kSeesNothing[0]);
      seen.push_back(view.end > 0 ? view.end : kSeesNothing[1]);
    }
    return seen;
  }

 private:
  // Number of the canvas: the least enlargement, else the least reduction; of equals the smaller area.
  size_t canvas_of(const Picture& picture) const {
    std::vector<double> scales;
    double enlarged = INFINITY, reduced = 0;
    for (const auto& [rows, columns] : canvases_) {
      const double scale = std::min(static_cast<double>(rows * tile_) / picture.height,
                                    static_cast<double>(columns * tile_) / picture.width);
      if (scale >= 1) enlarged = std::min(enlarged, scale);
      reduced = std::max(reduced, scale);
      scales.push_back(scale);
    }
    const double best = std::isinf(enlarged) ? reduced : enlarged;
    size_t found = canvases_.size();
    for (size_t i = 0; i < canvases_.size(); ++i) {
      const auto area = [&](size_t n) { return canvases_[n].first * canvases_[n].second; };
      if (scales[i] == best && (found == canvases_.size() || area(i) < area(found))) found = i;
    }
    return found;
  }

  // The picture in the top left corner of its canvas, never smaller than a tile allows, never stretched.
  Picture on_canvas(const Picture& picture, Canvas canvas) const {
    const int64_t height = canvas.first * tile_, width = canvas.second * tile_;
    const int64_t high = std::min(std::max<int64_t>(picture.height, tile_), height);
    const int64_t wide = std::min(std::max<int64_t>(picture.width, tile_), width);
    const double by_height = static_cast<double>(high) / picture.height;
    const double by_width = static_cast<double>(wide) / picture.width;
    int64_t inner_height = high, inner_width = wide;
    if (by_width < by_height) {
      inner_height = std::min(std::max<int64_t>(static_cast<int64_t>(picture.height * by_width), 1), high);
    } else {
      inner_width = std::min(std::max<int64_t>(static_cast<int64_t>(picture.width * by_height), 1), wide);
    }
    Picture black(static_cast<int>(width), static_cast<int>(height));
    paste(black, resized(picture, static_cast<int>(inner_width), static_cast<int>(inner_height), filter_), 0, 0);
    return black;
  }

  // [3, height, width] -> [tiles, 3, H, H], row by row.
  void cut(const std::vector<float>& whole, Canvas canvas, float* target) const {
    const int64_t width = canvas.second * tile_, height = canvas.first * tile_;
    for (int64_t tile = 0; tile < canvas.first * canvas.second; ++tile) {
      const int64_t top = tile / canvas.second * tile_, left = tile % canvas.second * tile_;
      for (int64_t channel = 0; channel < 3; ++channel) {
        for (int64_t y = 0; y < tile_; ++y, target += tile_) {
          std::copy_n(whole.data() + (channel * height + top + y) * width + left, tile_, target);
        }
      }
    }
  }

  int64_t tile_ = 0, tiles_ = 0;
  int filter_ = kBilinear;
  Normalisation values_;
  std::vector<Canvas> canvases_;
};

}  // namespace

std::unique_ptr<Processor> make_mllama(const Folder& files, const Contract& contract) {
  return std::make_unique<Mllama>(files, contract);
}

}  // namespace vlmtrim
