// SmolVLM, Idefics3: a picture becomes square tiles, row by row, and itself squeezed into one; the prompt says which is
// which. Every frame of a video is one tile, behind its time in words. Mirrors runtime/processors/idefics3.py and
// smolvlm.py.
#include <cmath>
#include <cstdio>

#include "core/error.hpp"
#include "picture/settings.hpp"
#include "processors/families.hpp"

namespace vlmtrim {
namespace {

constexpr int64_t kLongestEdge = 1456, kTile = 364;  // pixels, of settings that name none
constexpr double kFps = 1;                           // frames a second of a film, likewise
constexpr int64_t kFrames = 64;                      // and at most
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

// Width and height whose longer one is `longest`, the other even, unless the ratio leaves nothing of it.
std::pair<int, int> longest_to(const Picture& picture, int longest) {
  const double ratio = static_cast<double>(picture.width) / picture.height;
  const bool wide = picture.width >= picture.height;
  int shorter = down(wide ? longest / ratio : longest * ratio);
  shorter = std::max(shorter + shorter % 2, 1);
  return wide ? std::pair{longest, shorter} : std::pair{shorter, longest};
}

// A number below 10,000 in English words, as num2words has it: forty-two, one thousand, one hundred and one.
std::string spelled(size_t number) {
  static const char* const kUnits[] = {"zero",     "one",     "two",     "three",     "four",     "five",    "six",
                                       "seven",    "eight",   "nine",    "ten",       "eleven",   "twelve",  "thirteen",
                                       "fourteen", "fifteen", "sixteen", "seventeen", "eighteen", "nineteen"};
  static const char* const kTens[] = {"twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety"};
  if (number >= 1000) {
    const size_t rest = number % 1000;
    const char* const joint = rest == 0 ? "" : rest < 100 ? " and " : ", ";
    return said(kUnits[number / 1000], " thousand", joint, rest == 0 ? "" : spelled(rest));
  }
  if (number >= 100) {
    return said(kUnits[number / 100], " hundred", number % 100 == 0 ? "" : " and " + spelled(number % 100));
  }
  if (number < 20) return kUnits[number];
  return said(kTens[number / 10 - 2], number % 10 == 0 ? "" : said("-", kUnits[number % 10]));
}

// Hours, minutes and seconds, and days before them, as Python writes a length of time.
std::string length_of_time(int64_t seconds) {
  char text[64];
  const int64_t days = seconds / 86400, rest = seconds % 86400;
  std::snprintf(text, sizeof text, "%d:%02d:%02d", static_cast<int>(rest / 3600), static_cast<int>(rest / 60 % 60),
                static_cast<int>(rest % 60));
  return days == 0 ? text : said(days, days == 1 ? " day, " : " days, ", text);
}

// Minutes and seconds of a moment.
std::string moment(double seconds) {
  const double rest = std::fmod(seconds, 60);
  char text[64];
  std::snprintf(text, sizeof text, "%02d:%02d", static_cast<int>(std::nearbyint((seconds - rest) / 60)),
                static_cast<int>(rest));
  return text;
}

class SmolVlm : public Processor {
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
    check_frames(shown);
    std::vector<Picture> scaled;  // of pictures that are cut into tiles
    std::vector<Grid> grids;
    int64_t total = 0;
    for (const Shown& one : shown) {
      if (one.is_video()) {
        total += static_cast<int64_t>(one.frames.size());
        continue;
      }
      scaled.push_back(framed(one.picture()));
      grids.push_back(tiled(scaled.back()));
      total += grids.back().tiles();
    }
    check_tiles(shown.size(), total);
    Pictures made;
    Tensor pixels = Tensor::empty(DType::kFloat32, {total, 3, side_, side_});
    float* target = pixels.as<float>();
    size_t still = 0;
    for (const Shown& one : shown) {
      if (one.is_video()) {
        for (const Picture& frame : one.frames) put(squeezed(frame), frame_.values, target);
        made.tokens.push_back(each_ * static_cast<int64_t>(one.frames.size()));
        made.words.push_back(told(one));
        continue;
      }
      put_tiles(scaled[still], grids[still], target);
      made.tokens.push_back(each_ * grids[still].tiles());
      made.words.push_back(words(grids[still]));
      ++still;
    }
    made.inputs["pixel_values"] = pixels;
    return made;
  }

 protected:
  FrameSettings frame_;
  std::map<std::string, int64_t> frame_size_;  // that frames have before they are squeezed into tiles

 private:
  // The picture at the size at which it is cut into tiles.
  Picture framed(const Picture& picture) const {
    const auto [width, height] = longest_to(picture, longest_);
    const Picture scaled = resized(picture, width, height, filter_);
    if (!splits_) return resized(scaled, side_, side_, filter_);
    const auto [wide, high] = whole_tiles(width, height);
    return resized(scaled, wide, high, filter_);
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

  void put(const Picture& tile, const Normalisation& values, float*& target) const {
    values.apply(tile, target);
    target += int64_t{3} * side_ * side_;
  }

  void put_tiles(const Picture& scaled, Grid grid, float*& target) const {
    for (int row = 0; row < grid.rows; ++row) {
      for (int column = 0; column < grid.columns; ++column) {
        put(cropped(scaled, column * side_, row * side_, side_, side_), values_, target);
      }
    }
    put(resized(scaled, side_, side_, filter_), values_, target);
  }

  // A frame scaled, then made one tile.
  Picture squeezed(const Picture& frame) const {
    const auto longest = frame_size_.find("longest_edge");
    const auto [width, height] = longest == frame_size_.end() ? std::pair{static_cast<int>(frame_size_.at("width")),
                                                                          static_cast<int>(frame_size_.at("height"))}
                                                              : longest_to(frame, static_cast<int>(longest->second));
    return resized(resized(frame, width, height, frame_.filter), side_, side_, frame_.filter);
  }

  // What the prompt says of a video.
  std::string told(const Shown& video) const {
    const std::vector<double> seconds = video.seconds();
    std::string text = said("You are provided the following series of ", spelled(seconds.size()), " frames from a ",
                            length_of_time(static_cast<int64_t>(seconds.back())), " [H:MM:SS] video.\n");
    for (const double second : seconds) text += said("\nFrame from ", moment(second), ":", words({0, 0}));
    return text + "\n\n";
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

class SmolVlm2 final : public SmolVlm {
 public:
  SmolVlm2(const Folder& files, const Contract& contract) : SmolVlm(files, contract) {
    const ImageSettings settings = ImageSettings::of_videos(files), sampling = settings.part("video_sampling");
    const double fps = settings.number("fps", kSlowest, kFastest, kFps);
    sampling.number("fps", kSlowest, kFastest, fps);
    const int64_t most = settings.integer("num_frames", 1, kMostFrames, kFrames);
    sampling.integer("max_frames", 1, kMostFrames, most);
    frame_size_ = settings.sides("size", {"height", "width"});
    if (frame_size_.empty()) frame_size_ = sampling.sides("video_size", {"height", "width"});
    if (frame_size_.empty()) frame_size_["longest_edge"] = kLongestEdge;
    const bool plain = frame_size_.size() == 2 && frame_size_.count("height") + frame_size_.count("width") == 2;
    if (frame_size_.count("longest_edge") == 0 && !plain) {
      std::string sides;
      for (const auto& [name, side] : frame_size_) sides += said(sides.empty() ? "" : ", ", "'", name, "': ", side);
      settings.refuse(said("size of frames is {", sides, "}; expected a longest_edge, or height and width"));
    }
    frame_ = {settings.resample(kLanczos), settings.normalisation()};
  }

  bool takes_videos() const override { return true; }
};

}  // namespace

std::unique_ptr<Processor> make_idefics3(const Folder& files, const Contract& contract) {
  return std::make_unique<SmolVlm>(files, contract);
}

std::unique_ptr<Processor> make_smolvlm(const Folder& files, const Contract& contract) {
  return std::make_unique<SmolVlm2>(files, contract);
}

}  // namespace vlmtrim
