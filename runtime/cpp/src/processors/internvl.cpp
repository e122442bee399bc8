// InternVL3: a picture is stretched to a grid of tiles; the whole of it comes last, where there is more than one. Every
// frame of a video is one tile, behind its number in words. Mirrors runtime/processors/internvl.py.
#include <algorithm>
#include <cmath>

#include "core/error.hpp"
#include "picture/settings.hpp"
#include "processors/families.hpp"

namespace vlmtrim {
namespace {

constexpr int64_t kMostTiles = 12;    // max_patches of settings that name none
constexpr int64_t kFrames = 8;        // num_frames, likewise
constexpr int64_t kLargestGrid = 64;  // tiles of any checkpoint

struct Grid {
  int across, down;
  int64_t tiles() const { return int64_t{across} * down; }
};

// Columns and rows, `least` to `most` tiles of `tile` pixels, that are nearest to a picture's proportions. Of grids
// that are equally near the largest counts whose tiles have less than twice the picture's pixels; where none of them
// has, the smallest.
Grid best_grid(const Picture& picture, double tile, int64_t least, int64_t most) {
  if (most == 1) return {1, 1};
  std::vector<Grid> grids;
  for (int across = 1; across <= most; ++across) {
    for (int down = 1; down <= most; ++down) {
      const int64_t count = int64_t{across} * down;
      if (least <= count && count <= most) grids.push_back({across, down});
    }
  }
  if (grids.empty()) return {1, 1};
  std::stable_sort(grids.begin(), grids.end(), [](Grid a, Grid b) { return a.tiles() < b.tiles(); });
  const double wide = picture.width, high = picture.height;
  const auto distance = [&](Grid grid) { return std::abs(wide / high - static_cast<double>(grid.across) / grid.down); };
  double nearest = distance(grids.front());
  for (const Grid grid : grids) nearest = std::min(nearest, distance(grid));
  std::vector<Grid> equal;
  for (const Grid grid : grids) {
    if (distance(grid) == nearest) equal.push_back(grid);
  }
  for (size_t i = equal.size() - 1; i > 0; --i) {
    if (wide * high > 0.5 * tile * static_cast<double>(equal[i].tiles())) return equal[i];
  }
  return equal.front();
}

class InternVl final : public Processor {
 public:
  InternVl(const Folder& files, const Contract& contract)
      : Processor(contract), tile_(ImageProcessor::from_folder(files)) {
    tile_.pad_to_square = false;
    const ImageSettings settings = ImageSettings::read(files);
    most_ = settings.integer("max_patches", 1, kLargestGrid, kMostTiles);
    least_ = settings.integer("min_patches", 1, kLargestGrid, 1);
    if (!contract.image_grid) {
      throw BundleError(
          said((files.path() / "contract.json").string(), ": image_grid is null; internvl needs that of a tile"));
    }
    each_ = contract.image_grid->first * contract.image_grid->second;
    expect_inputs(files, contract, {{"pixel_values", {-1, 3, tile_.height, tile_.width}}});
    const int64_t most = most_ + (most_ > 1 ? 1 : 0);
    if (most * each_ > contract.image_tokens || contract.dims.count("T") == 0) {
      settings.refuse(said("max_patches is ", most_, ", up to ", most,
                           " tiles a picture; the bundle takes pictures of ", contract.image_tokens, " tokens, ", each_,
                           " of them a tile: export the model again"));
    }
    const auto marks = special_tokens(files, {{"start_image_token", "<img>"},
                                              {"context_image_token", "<IMG_CONTEXT>"},
                                              {"end_image_token", "</img>"},
                                              {"video_token", "<video>"}});
    start_ = marks[0], mark_ = marks[1], end_ = marks[2];
    const ImageSettings films = ImageSettings::of_videos(files);
    frame_ = {films.resample(), films.normalisation()};
    films.integer("num_frames", 1, kMostFrames, kFrames);
  }

  bool takes_videos() const override { return true; }

  Pictures prepare(const std::vector<Shown>& shown) const override {
    check_frames(shown);
    std::vector<Picture> tiles;
    std::vector<const Normalisation*> values;
    Pictures made;
    for (const Shown& one : shown) {
      const size_t before = tiles.size();
      if (one.is_video()) {
        for (const Picture& frame : one.frames) tiles.push_back(squeezed(frame, frame_.filter));
      } else {
        add_tiles(one.picture(), tiles);
      }
      values.resize(tiles.size(), one.is_video() ? &frame_.values : &tile_.values);
      const auto count = static_cast<int64_t>(tiles.size() - before);
      made.tokens.push_back(count * each_);
      made.words.push_back(one.is_video() ? told(count) : between(count * each_));
    }
    check_tiles(shown.size(), static_cast<int64_t>(tiles.size()));
    Tensor pixels = Tensor::empty(DType::kFloat32, {static_cast<int64_t>(tiles.size()), 3, tile_.height, tile_.width});
    float* target = pixels.as<float>();
    for (size_t i = 0; i < tiles.size(); ++i, target += int64_t{3} * tile_.height * tile_.width) {
      values[i]->apply(tiles[i], target);
    }
    made.inputs["pixel_values"] = pixels;
    return made;
  }

 private:
  // The stretched picture's tiles row by row, then the squeezed picture where they are several.
  void add_tiles(const Picture& picture, std::vector<Picture>& tiles) const {
    const Grid grid = best_grid(picture, static_cast<double>(tile_.width) * tile_.height, least_, most_);
    if (grid.tiles() > 1) {
      const Picture whole = resized(picture, grid.across * tile_.width, grid.down * tile_.height, tile_.filter);
      for (int row = 0; row < grid.down; ++row) {
        for (int column = 0; column < grid.across; ++column) {
          tiles.push_back(cropped(whole, column * tile_.width, row * tile_.height, tile_.width, tile_.height));
        }
      }
    }
    tiles.push_back(squeezed(picture, tile_.filter));
  }

  Picture squeezed(const Picture& picture, int filter) const {
    return resized(picture, tile_.width, tile_.height, filter);
  }

  // So many tokens between their marks.
  std::string between(int64_t tokens) const {
    std::string words = start_;
    for (int64_t i = 0; i < tokens; ++i) words += mark_;
    return words + end_;
  }

  // What the prompt says of a video of so many frames.
  std::string told(int64_t frames) const {
    std::string words;
    for (int64_t number = 1; number <= frames; ++number) {
      words += said(number > 1 ? "\n" : "", "Frame", number, ": ", between(each_));
    }
    return words;
  }

  ImageProcessor tile_;
  FrameSettings frame_;
  int64_t most_, least_, each_;  // tiles of a picture; tokens of a tile
  std::string start_, mark_, end_;
};

}  // namespace

std::unique_ptr<Processor> make_internvl(const Folder& files, const Contract& contract) {
  return std::make_unique<InternVl>(files, contract);
}

}  // namespace vlmtrim
