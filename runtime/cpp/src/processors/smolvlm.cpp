// SmolVLM, Idefics3: a picture becomes square tiles, row by row, and itself squeezed into one; the prompt says which is
// which. Mirrors runtime/processors/smolvlm.py.
#include <cmath>

#include "core/error.hpp"
#include "picture/settings.hpp"
#include "processors/families.hpp"

namespace vlmtrim {
namespace {

constexpr int64_t kLongestEdge = 1456, kTile = 364;  // pixels, of settings that name none
constexpr const char *kImage = "<image>", *kAround = "<fake_token_around_image>", *kWhole = "<global-img>";

struct Grid {
  int rows, columns;  // of tiles; zeros where the picture is one tile as it is
  int64_t tiles() const { return int64_t{rows} * columns + 1; }
};

// Whole number that a quotient of pixels is cut to, or raised to, in Python's arithmetic.
int down(double value) { return static_cast<int>(value); }
int up(int64_t value, int64_t step) {
  return static_cast<int>(std::ceil(static_cast<double>(value) / static_cast<double>(step)));
}

class SmolVlm final : public Processor {
 public:
  SmolVlm(const Folder& files, const Contract& contract) : Processor(contract) {
    const ImageSettings settings = ImageSettings::read(files);
    auto size = settings.sides("size", {"height", "width"}),
         tile = settings.sides("max_image_size", {"height", "width"});
    if (size.empty()) size["longest_edge"] = kLongestEdge;
    if (tile.empty()) tile["longest_edge"] = kTile;
    if (size.count("longest_edge") == 0 || tile.count("longest_edge") == 0) {
      settings.refuse("size and max_image_size need a longest_edge both");
    }
    if (!settings.boolean("do_resize", true))
      settings.refuse("do_resize is false; tiles are made of pictures of a size");
    longest_ = static_cast<int>(size["longest_edge"]);
    side_ = static_cast<int>(tile["longest_edge"]);
    splits_ = settings.boolean("do_image_splitting", true);
    filter_ = settings.resample(kLanczos);
    values_ = settings.normalisation();
    if (!contract.image_grid || contract.dims.count("T") == 0) {
      throw BundleError(
          said((files.path() / "contract.json").string(), ": smolvlm needs an image_grid, that of a tile, and dims.T"));
    }
    each_ = contract.image_grid->first * contract.image_grid->second;
    expect_inputs(files, contract, {{"pixel_values", {-1, 3, side_, side_}}});
    const int64_t across = splits_ ? up(longest_, side_) : 1, most = contract.image_tokens / each_;
    if ((across > 1 && across * across + 1 > most) || most < 1) {
      settings.refuse(said("size.longest_edge ", longest_, " makes ", across * across + 1, " tiles of ", side_,
                           " pixels, the bundle takes ", most,
                           " a picture; give a smaller longest_edge and export again"));
    }
  }

  Pictures prepare(const std::vector<Shown>& shown) const override {
    std::vector<Picture> scaled;
    std::vector<Grid> grids;
    int64_t total = 0;
    for (const Shown& one : shown) {
      scaled.push_back(framed(one.picture()));
      grids.push_back(tiled(scaled.back()));
      total += grids.back().tiles();
    }
    check_tiles(shown.size(), total);
    Pictures made;
    Tensor pixels = Tensor::empty(DType::kFloat32, {total, 3, side_, side_});
    float* target = pixels.as<float>();
    const auto put = [&](const Picture& tile) {
      values_.apply(tile, target);
      target += int64_t{3} * side_ * side_;
    };
    for (size_t i = 0; i < shown.size(); ++i) {
      const Grid grid = grids[i];
      for (int row = 0; row < grid.rows; ++row) {
        for (int column = 0; column < grid.columns; ++column) {
          put(cropped(scaled[i], column * side_, row * side_, side_, side_));
        }
      }
      put(resized(scaled[i], side_, side_, filter_));
      made.tokens.push_back(each_ * grid.tiles());
      made.words.push_back(words(grid));
    }
    made.inputs["pixel_values"] = pixels;
    return made;
  }

 private:
  // The picture at the size at which it is cut into tiles.
  Picture framed(const Picture& picture) const {
    const auto [width, height] = longest_to(picture.width, picture.height);
    const Picture scaled = resized(picture, width, height, filter_);
    if (!splits_) return resized(scaled, side_, side_, filter_);
    const auto [wide, high] = whole_tiles(width, height);
    return resized(scaled, wide, high, filter_);
  }

  // Width and height whose longer one is the longest edge, the other even, unless the ratio leaves nothing of it.
  std::pair<int, int> longest_to(int width, int height) const {
    const double ratio = static_cast<double>(width) / height;
    int shorter = down(width >= height ? longest_ / ratio : longest_ * ratio);
    shorter = std::max(shorter + shorter % 2, 1);
    return width >= height ? std::pair{longest_, shorter} : std::pair{shorter, longest_};
  }

  // Width and height in whole tiles; the shorter one follows from the longer one's, by the ratio.
  std::pair<int, int> whole_tiles(int width, int height) const {
    const double ratio = static_cast<double>(width) / height;
    const int longer = up(std::max(width, height), side_) * side_;
    const int shorter = up(down(width >= height ? longer / ratio : longer * ratio), side_) * side_;
    return width >= height ? std::pair{longer, shorter} : std::pair{shorter, longer};
  }

  Grid tiled(const Picture& scaled) const {
    const Grid grid{scaled.height / side_, scaled.width / side_};
    return grid.rows * grid.columns > 1 ? grid : Grid{0, 0};
  }

  // What the prompt says of a picture of these tiles.
  std::string words(Grid grid) const {
    std::string marks, said_;
    for (int64_t i = 0; i < each_; ++i) marks += kImage;
    for (int row = 1; row <= grid.rows; ++row) {
      for (int column = 1; column <= grid.columns; ++column) {
        said_ += said(kAround, "<row_", row, "_col_", column, ">", marks);
      }
      said_ += '\n';
    }
    if (grid.rows > 0) said_ += '\n';
    return said_ + said(kAround, kWhole, marks, kAround);
  }

  int longest_, side_, filter_;
  bool splits_;
  Normalisation values_;
  int64_t each_;  // tokens of a tile
};

}  // namespace

std::unique_ptr<Processor> make_smolvlm(const Folder& files, const Contract& contract) {
  return std::make_unique<SmolVlm>(files, contract);
}

}  // namespace vlmtrim
