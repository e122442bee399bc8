// LLaVA-OneVision: tiles as LLaVA-NeXT has them where a question brings one picture, of which large ones become fewer
// tokens than patches; one tile each where it brings several, and for each frame of a video.
// Mirrors runtime/processors/llava_onevision.py.
#include <algorithm>
#include <cmath>

#include "core/error.hpp"
#include "processors/families.hpp"
#include "processors/tiling.hpp"

namespace vlmtrim {
namespace {

constexpr int64_t kSide = 384,
                  kMostDown = 6;  // resolutions of settings that name none: 1 to 6 tiles in both directions
constexpr const char* kUsualRatio = "anyres_max_9";

std::vector<Size> usual_pinpoints() {
  std::vector<Size> sizes;
  for (int64_t down = 1; down <= kMostDown; ++down) {
    for (int64_t across = 1; across <= kMostDown; ++across) sizes.emplace_back(kSide * down, kSide * across);
  }
  return sizes;
}

// Tiles whose patches are the most tokens that a picture becomes, from the model's config.
int64_t most_tiles(const Folder& files) {
  const std::string name = "config.json", start = "anyres_max_";
  const Json config = files.json(name);
  const auto found = config.find("vision_aspect_ratio");
  const Json value = found == config.end() ? Json(kUsualRatio) : *found;
  const std::string text = value.is_string() ? value.get<std::string>() : "";
  const std::string digits = text.compare(0, start.size(), start) == 0 ? text.substr(start.size()) : "";
  const auto is_digit = [](char c) { return '0' <= c && c <= '9'; };
  if (digits.empty() || digits.size() > 4 || digits[0] == '0' || !std::all_of(digits.begin(), digits.end(), is_digit)) {
    throw BundleError(said((files.path() / name).string(), ": vision_aspect_ratio is ", shown(value),
                           "; expected anyres_max_ and a number of tiles"));
  }
  return std::stoll(digits);
}

// Python's a // b of positive floats.
int64_t floored(double a, double b) {
  const double quotient = (a - std::fmod(a, b)) / b, whole = std::floor(quotient);
  return static_cast<int64_t>(quotient - whole > 0.5 ? whole + 1 : whole);
}

// The two nearest patches of a token along an axis, and how much of the second it is.
struct Between {
  int64_t patches[2];
  float weights[2];
};

// As torch's interpolate (bilinear, corners not aligned) places the tokens.
std::vector<Between> along(int64_t patches, int64_t tokens) {
  const float scale = static_cast<float>(patches) / static_cast<float>(std::max<int64_t>(tokens, 1));
  std::vector<Between> found;
  for (int64_t token = 0; token < tokens; ++token) {
    // Multiplied and subtracted in one rounding, as torch's kernels do: the product is exact in float64.
    const double exact = static_cast<double>(scale) * (static_cast<double>(token) + 0.5) - 0.5;
    const float at = std::max(static_cast<float>(exact), 0.0F), low = std::floor(at), over = at - low;
    const auto first = static_cast<int64_t>(low), last = std::max<int64_t>(patches - 1, 0);
    found.push_back({{std::min(first, last), std::min(first + 1, last)}, {1 - over, over}});
  }
  return found;
}

// Tokens as weighted sums of four patches each.
struct Tokens {
  std::vector<int64_t> patches;
  std::vector<float> weights;

  int64_t count() const { return static_cast<int64_t>(weights.size()) / 4; }

  // Those of a grid of patches that is resampled to `size` rows and columns; behind each row `newline`, if there is
  // one.
  void add(const PatchGrid& grid, Size size, const int64_t* newline) {
    const std::vector<Between> down = along(grid.rows, size.first), across = along(grid.columns, size.second);
    for (const Between& y : down) {
      for (const Between& x : across) {
        for (int part = 0; part < 4; ++part) {
          patches.push_back(
              grid.numbers[static_cast<size_t>(y.patches[part / 2] * grid.columns + x.patches[part % 2])]);
          weights.push_back(y.weights[part / 2] * x.weights[part % 2]);
        }
      }
      if (newline == nullptr) continue;
      patches.insert(patches.end(), 4, *newline);
      weights.insert(weights.end(), {1, 0, 0, 0});
    }
  }
};

class LlavaOneVision final : public Processor {
 public:
  LlavaOneVision(const Folder& files, const Contract& contract)
      : Processor(contract), most_(most_tiles(files)), tiling_(files, contract, usual_pinpoints()) {
    square_ = tiling_.tile();
    square_.pad_to_square = true;
    const auto [down, across] = tiling_.patches();
    most_ *= down * across;
    expect_inputs(files, contract,
                  {{"pixel_values", {-1, 3, square_.height, square_.width}},
                   {"feature_index", {-1, 4}},
                   {"feature_weights", {-1, 4}}});
    tiling_.check(files, contract,
                  [this](int64_t rows, int64_t columns) { return std::min(rows * columns, 121 * most_ / 100) + rows; });
  }

  bool takes_videos() const override { return contract_.video_token_id.has_value(); }

  Pictures prepare(const std::vector<Shown>& shown) const override {
    const bool alone = std::count_if(shown.begin(), shown.end(), [](const Shown& one) { return !one.is_video(); }) == 1;
    std::vector<Picture> tiles;
    std::vector<int64_t> first;
    for (const Shown& one : shown) {
      first.push_back(static_cast<int64_t>(tiles.size()));
      cut(one, alone, tiles);
    }
    first.push_back(static_cast<int64_t>(tiles.size()));
    check_tiles(shown.size(), first.back());
    const auto [rows, columns] = tiling_.patches();
    const int64_t newline = first.back() * rows * columns;
    Pictures made;
    Tokens tokens;
    for (size_t i = 0; i < shown.size(); ++i) {
      const int64_t before = tokens.count();
      const Size laid = shown[i].is_video() ? Size{(rows + 1) / 2, (columns + 1) / 2} : tiling_.patches();
      const int64_t whole = shown[i].is_video() ? first[i + 1] : first[i] + 1;
      for (int64_t tile = first[i]; tile < whole; ++tile) tokens.add(tiling_.squeezed(tile), laid, nullptr);
      PatchGrid grid{1, 0, {}};  // no patches, and the newline behind them
      if (alone && !shown[i].is_video()) {
        grid = tiling_.covered({shown[i].picture().height, shown[i].picture().width}, first[i]);
      }
      tokens.add(grid, this->laid(grid), &newline);
      made.tokens.push_back(tokens.count() - before);
    }
    made.inputs = {{"pixel_values", tiling_.tile().stacked(tiles)},
                   {"feature_index", Tensor::of(tokens.patches, {tokens.count(), 4})},
                   {"feature_weights", Tensor::of(tokens.weights, {tokens.count(), 4})}};
    return made;
  }

 private:
  // Tiles of a picture, or of a video, whose frames are squeezed into one each.
  void cut(const Shown& shown, bool alone, std::vector<Picture>& tiles) const {
    if (shown.is_video()) {
      for (const Picture& frame : shown.frames) {
        tiles.push_back(resized(frame, square_.width, square_.height, square_.filter));
      }
    } else if (alone) {
      tiling_.add_tiles(shown.picture(), tiles);
    } else {
      tiles.push_back(square_.framed(shown.picture()));
    }
  }

  // Rows and columns of tokens: fewer where the patches are more than those of the most tiles, by a fifth or above.
  Size laid(const PatchGrid& grid) const {
    const double ratio = std::sqrt(static_cast<double>(grid.rows * grid.columns) / static_cast<double>(most_));
    if (!(ratio > 1.1)) return {grid.rows, grid.columns};
    return {floored(static_cast<double>(grid.rows), ratio), floored(static_cast<double>(grid.columns), ratio)};
  }

  int64_t most_;  // tokens that a picture's patches become, about
  Tiling tiling_;
  ImageProcessor square_;
};

}  // namespace

std::unique_ptr<Processor> make_llava_onevision(const Folder& files, const Contract& contract) {
  return std::make_unique<LlavaOneVision>(files, contract);
}

}  // namespace vlmtrim
