#include "processors/tiling.hpp"

#include <cmath>
#include <cstdio>
#include <cstdlib>

#include "core/error.hpp"

namespace vlmtrim {
namespace {

constexpr size_t kMostPinpoints = 256;  // LLaVA-OneVision's 36 are the most of any checkpoint

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

}  // namespace

Tiling::Tiling(const Folder& files, const Contract& contract, std::vector<Size> usual)
    : tile_(ImageProcessor::from_folder(files)),
      pinpoints_(ImageSettings::read(files).pairs("image_grid_pinpoints", kMostPinpoints)) {
  tile_.pad_to_square = false;  // do_pad means padding tiles here, nothing about the picture
  if (pinpoints_.empty()) pinpoints_ = std::move(usual);
  if (!contract.image_grid) {
    throw BundleError(said((files.path() / "contract.json").string(), ": image_grid is null; ", contract.family,
                           " needs that of a tile"));
  }
  patches_ = *contract.image_grid;
}

void Tiling::add_tiles(const Picture& picture, std::vector<Picture>& tiles) const {
  const Size size{picture.height, picture.width}, target = best_resolution(size, pinpoints_);
  const Size inner = fitted(size, target);
  Picture canvas(static_cast<int>(target.second), static_cast<int>(target.first));
  const Picture scaled = resized(picture, static_cast<int>(inner.second), static_cast<int>(inner.first), tile_.filter);
  paste(canvas, scaled, (canvas.width - scaled.width) / 2, (canvas.height - scaled.height) / 2);
  tiles.push_back(resized(picture, tile_.width, tile_.height, tile_.filter));
  for (int top = 0; top < canvas.height; top += tile_.height) {
    for (int left = 0; left < canvas.width; left += tile_.width) {
      tiles.push_back(cropped(canvas, left, top, tile_.width, tile_.height));
    }
  }
}

PatchGrid Tiling::squeezed(int64_t tile) const {
  const auto [rows, columns] = patches_;
  PatchGrid grid{rows, columns, {}};
  for (int64_t patch = 0; patch < rows * columns; ++patch) grid.numbers.push_back(tile * rows * columns + patch);
  return grid;
}

PatchGrid Tiling::covered(Size size, int64_t first) const {
  const auto [rows, columns] = patches_;
  const auto [height, width] = best_resolution(size, pinpoints_);
  const int64_t across = width / tile_.width;
  const Size whole{height / tile_.height * rows, across * columns}, margin = margins(whole, size);
  PatchGrid grid{whole.first - 2 * margin.first, whole.second - 2 * margin.second, {}};
  for (int64_t y = margin.first; y < whole.first - margin.first; ++y) {
    for (int64_t x = margin.second; x < whole.second - margin.second; ++x) {
      const int64_t tile = first + 1 + y / rows * across + x / columns;
      grid.numbers.push_back(tile * rows * columns + y % rows * columns + x % columns);
    }
  }
  return grid;
}

void Tiling::check(const Folder& files, const Contract& contract,
                   const std::function<int64_t(int64_t, int64_t)>& most) const {
  const auto [rows, columns] = patches_;
  const int64_t down = tile_.height, across = tile_.width;
  bool whole = contract.dims.count("T") > 0;
  int64_t tokens = 0;
  for (const auto& [height, width] : pinpoints_) {
    whole = whole && height % down == 0 && width % across == 0;
    tokens = std::max(tokens, most(height / down * rows, width / across * columns));
  }
  if (whole && rows * columns + tokens == contract.image_tokens) return;
  throw BundleError(said(files.path().string(), ": tiles of ", down, " x ", across,
                         " pixels (preprocessor_config.json) do not fit the model, whose config has other "
                         "image_grid_pinpoints; take both files from one checkpoint and export again"));
}

}  // namespace vlmtrim
