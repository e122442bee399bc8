// LLaVA-NeXT: a picture becomes the tiles that its shape needs, and as many visual tokens as its part of them has.
#include <cmath>
#include <numeric>

#include "core/error.hpp"
#include "picture/settings.hpp"
#include "processors/families.hpp"

namespace vlmtrim {
namespace {

using Size = std::pair<int64_t, int64_t>;  // height, width

// Resolutions of settings that name none.
const std::vector<Size> kPinpoints{{336, 672}, {672, 336}, {672, 672}, {1008, 336}, {336, 1008}};
constexpr size_t kMostPinpoints = 256;

// Python's round(value, 7): by the shortest decimal that stands for the value.
double rounded(double value) {
  char text[64];
  std::snprintf(text, sizeof text, "%.7f", value);
  return std::strtod(text, nullptr);
}

// The pinpoint that keeps most of the picture's pixels when it is scaled into it; of equals the smallest, first.
Size best_resolution(Size size, const std::vector<Size>& pinpoints) {
  std::pair<int64_t, int64_t> most{INT64_MIN, INT64_MIN};
  Size best;
  for (const Size& target : pinpoints) {
    const double across = static_cast<double>(target.second) / static_cast<double>(size.second);
    const double down = static_cast<double>(target.first) / static_cast<double>(size.first);
    const double scale = std::min(across, down);
    const auto wide = static_cast<int64_t>(static_cast<double>(size.second) * scale);
    const auto high = static_cast<int64_t>(static_cast<double>(size.first) * scale);
    const int64_t kept = std::min(wide * high, size.first * size.second);
    const std::pair<int64_t, int64_t> merit{kept, kept - target.first * target.second};
    if (merit > most) most = merit, best = target;
  }
  return best;
}

// Largest size of the same aspect ratio within the target, rounded up.
Size fitted(Size size, Size target) {
  const double across = static_cast<double>(target.second) / static_cast<double>(size.second);
  const double down = static_cast<double>(target.first) / static_cast<double>(size.first);
  if (across < down) {
    const auto high = static_cast<int64_t>(std::ceil(static_cast<double>(size.first) * across));
    return {std::min(high, target.first), target.second};
  }
  const auto wide = static_cast<int64_t>(std::ceil(static_cast<double>(size.second) * down));
  return {target.first, std::min(wide, target.second)};
}

// Rows and columns of a grid of patches that a picture of this size does not cover at each end.
Size margins(Size grid, Size size) {
  const auto rows = static_cast<double>(grid.first), columns = static_cast<double>(grid.second);
  const auto high = static_cast<double>(size.first), wide = static_cast<double>(size.second);
  if (wide / high > columns / rows) {
    return {(grid.first - static_cast<int64_t>(rounded(high * (columns / wide)))) / 2, 0};
  }
  return {0, (grid.second - static_cast<int64_t>(rounded(wide * (rows / high)))) / 2};
}

class LlavaNext final : public Processor {
 public:
  LlavaNext(const Folder& files, const Contract& contract)
      : Processor(contract), tile_(ImageProcessor::from_folder(files)) {
    tile_.pad_to_square = false;  // do_pad means padding tiles here, nothing about the picture
    pinpoints_ = ImageSettings::read(files).pairs("image_grid_pinpoints", kMostPinpoints);
    if (pinpoints_.empty()) pinpoints_ = kPinpoints;
    if (!contract.image_grid) {
      throw BundleError(
          said((files.path() / "contract.json").string(), ": image_grid is null; llava_next needs that of a tile"));
    }
    patches_ = *contract.image_grid;
    check(files);
  }

  Pictures prepare(const std::vector<Picture>& pictures) const override {
    std::vector<Picture> tiles;
    std::vector<int64_t> first;
    for (const auto& picture : pictures) {
      first.push_back(static_cast<int64_t>(tiles.size()));
      add_tiles(picture, tiles);
    }
    const auto total = static_cast<int64_t>(tiles.size());
    check_tiles(pictures.size(), total);
    Pictures made;
    std::vector<int64_t> index;
    for (size_t i = 0; i < pictures.size(); ++i) {
      const size_t before = index.size();
      add_features({pictures[i].height, pictures[i].width}, first[i], total * patches_.first * patches_.second, index);
      made.tokens.push_back(static_cast<int64_t>(index.size() - before));
    }
    Tensor pixels = Tensor::empty(DType::kFloat32, {total, 3, tile_.height, tile_.width});
    const int64_t each = int64_t{3} * tile_.height * tile_.width;
    for (int64_t i = 0; i < total; ++i) tile_.apply(tiles[static_cast<size_t>(i)], pixels.as<float>() + i * each);
    made.inputs["pixel_values"] = pixels;
    made.inputs["feature_index"] = Tensor::of(index, {static_cast<int64_t>(index.size())});
    return made;
  }

 private:
  // The squeezed picture, then the tiles of the scaled and padded one, row by row.
  void add_tiles(const Picture& picture, std::vector<Picture>& tiles) const {
    const Size size{picture.height, picture.width}, target = best_resolution(size, pinpoints_);
    const Size inner = fitted(size, target);
    Picture canvas(static_cast<int>(target.second), static_cast<int>(target.first));
    const Picture scaled =
        resized(picture, static_cast<int>(inner.second), static_cast<int>(inner.first), tile_.filter);
    paste(canvas, scaled, (canvas.width - scaled.width) / 2, (canvas.height - scaled.height) / 2);
    tiles.push_back(resized(picture, tile_.width, tile_.height, tile_.filter));
    for (int top = 0; top < canvas.height; top += tile_.height) {
      for (int left = 0; left < canvas.width; left += tile_.width) {
        tiles.push_back(cropped(canvas, left, top, tile_.width, tile_.height));
      }
    }
  }

  // The patch that each token of a picture is, whose tiles start at number `first`: the squeezed tile, then the rows.
  void add_features(Size size, int64_t first, int64_t newline, std::vector<int64_t>& index) const {
    const auto [rows, columns] = patches_;
    const int64_t each = rows * columns;
    for (int64_t patch = 0; patch < each; ++patch) index.push_back(first * each + patch);
    const auto [height, width] = best_resolution(size, pinpoints_);
    const int64_t across = width / tile_.width;
    const Size grid{height / tile_.height * rows, across * columns}, margin = margins(grid, size);
    for (int64_t y = margin.first; y < grid.first - margin.first; ++y) {
      for (int64_t x = margin.second; x < grid.second - margin.second; ++x) {
        const int64_t tile = first + 1 + y / rows * across + x / columns;
        index.push_back(tile * each + y % rows * columns + x % columns);
      }
      index.push_back(newline);
    }
  }

  void check(const Folder& files) const {
    const auto [rows, columns] = patches_;
    const int64_t down = tile_.height, across = tile_.width;
    expect_inputs(files, contract_, {{"pixel_values", {-1, 3, down, across}}, {"feature_index", {-1}}});
    bool whole = contract_.dims.count("T") > 0;
    int64_t most = 0;
    for (const auto& [height, width] : pinpoints_) {
      whole = whole && height % down == 0 && width % across == 0;
      most = std::max(most, height / down * rows * (width / across * columns + 1));
    }
    if (whole && rows * columns + most == contract_.image_tokens) return;
    throw BundleError(said(files.path().string(), ": tiles of ", down, " x ", across,
                           " pixels (preprocessor_config.json) do not fit the model, whose config has other "
                           "image_grid_pinpoints; take both files from one checkpoint and export again"));
  }

  ImageProcessor tile_;
  std::vector<Size> pinpoints_;
  Size patches_;
};

}  // namespace

std::unique_ptr<Processor> make_llava_next(const Folder& files, const Contract& contract) {
  return std::make_unique<LlavaNext>(files, contract);
}

}  // namespace vlmtrim
