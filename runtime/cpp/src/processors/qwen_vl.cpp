#include "processors/qwen_vl.hpp"

#include <algorithm>
#include <cmath>

#include "core/error.hpp"
#include "processors/families.hpp"

namespace vlmtrim {
namespace {

constexpr int64_t kMostPixelsSeen = INT32_MAX, kLargestPatch = 256, kMostTogether = 16;
constexpr int64_t kMostElongated = 200;  // long side / short side

// Tokens along a side of an attention window; 0 where the vision graph takes none.
int64_t window_side(const Contract& contract) {
  const TensorSpec* windows = contract.graph("vision").input("window_tokens");
  if (windows == nullptr || windows->shape.empty() || !windows->shape.back().name.empty()) return 0;
  return static_cast<int64_t>(std::sqrt(static_cast<double>(windows->shape.back().size)));
}

class Qwen25Vl final : public QwenVl {
 public:
  Qwen25Vl(const Folder& files, const Contract& contract) : QwenVl(files, contract) {
    expect_inputs(files, contract, shapes());
  }
};

class Qwen2Vl final : public QwenVl {
 public:
  Qwen2Vl(const Folder& files, const Contract& contract) : QwenVl(files, contract) {
    expect_inputs(files, contract, shapes());
  }

 protected:
  // Frames are one position apart whatever their distance.
  float interval(double /*fps*/) const override { return 1; }
};

}  // namespace

Size fitting_size(Size size, const Limits& limits) {
  const auto [high, wide] = size;
  const auto [side, least, most, frames, counted] = limits;
  if (std::max(high, wide) > kMostElongated * std::min(high, wide)) {
    throw Refusal(said("the picture is ", wide, " x ", high, " pixels; the model takes pictures up to ", kMostElongated,
                       " times as long as wide: crop it"));
  }
  const auto step = static_cast<double>(side), all = static_cast<double>(frames * high * wide);
  const auto multiple = [side = side](double tokens) { return static_cast<int64_t>(tokens) * side; };
  Size fitting{multiple(std::nearbyint(static_cast<double>(high) / step)),
               multiple(std::nearbyint(static_cast<double>(wide) / step))};
  const int64_t pixels = counted * fitting.first * fitting.second;
  if (pixels > most) {
    const double shrink = std::sqrt(all / static_cast<double>(most));
    const auto shrunk = [&](int64_t length) {
      return std::max(limits.side, multiple(std::floor(static_cast<double>(length) / shrink / step)));
    };
    fitting = {shrunk(high), shrunk(wide)};
  } else if (pixels < least) {
    const double grow = std::sqrt(static_cast<double>(least) / all);
    const auto grown = [&](int64_t length) { return multiple(std::ceil(static_cast<double>(length) * grow / step)); };
    fitting = {grown(high), grown(wide)};
  }
  return fitting;
}

QwenVl::QwenVl(const Folder& files, const Contract& contract) : Processor(contract), window_(window_side(contract)) {
  const ImageSettings settings = ImageSettings::read(files);
  patch_ = settings.integer("patch_size", 1, kLargestPatch, 14);
  merge_ = settings.integer("merge_size", 1, kMostTogether, 2);
  together_ = settings.integer("temporal_patch_size", 1, kMostTogether, 2);
  const auto size = settings.sides("size", {}, kMostPixelsSeen);
  const auto either = [&](const char* name, int64_t other) {
    const auto found = size.find(name);
    return found == size.end() ? other : found->second;
  };
  least_ = settings.integer("min_pixels", 1, kMostPixelsSeen, either("shortest_edge", 56 * 56));
  most_ = settings.integer("max_pixels", 1, kMostPixelsSeen, either("longest_edge", 28 * 28 * 1280));
  filter_ = settings.resample();
  values_ = settings.normalisation();
  frame_ = {filter_, values_};
  const std::string where = (files.path() / "config.json").string() + ": vision_config.tokens_per_second";
  tokens_per_second_ = number(vision_config(files).value("tokens_per_second", Json(4)), where, 1e-3, 1e3);
}

std::map<std::string, Shape> QwenVl::shapes() const {
  const int64_t patches = merge_ * merge_;
  std::map<std::string, Shape> shapes{{"pixel_values", {-1, patches, 3 * together_ * patch_ * patch_}},
                                      {"patch_positions", {-1, patches, 2}},
                                      {"frame_ids", {-1}}};
  if (window_ > 0) {
    shapes["window_tokens"] = {-1, window_ * window_};
    shapes["window_slots"] = {-1};
  }
  return shapes;
}

Json QwenVl::vision_config(const Folder& files) {
  const Json config = files.json("config.json"), found = config.value("vision_config", Json());
  if (found.is_object()) return found;
  const std::string where = (files.path() / "config.json").string();
  throw BundleError(said(where, ": vision_config is ", shown(found), "; expected an object"));
}

float QwenVl::interval(double fps) const {
  return static_cast<float>(tokens_per_second_) * static_cast<float>(static_cast<double>(together_) / fps);
}

Pictures QwenVl::prepare(const std::vector<Shown>& shown) const {
  std::vector<std::vector<Picture>> fitted;
  std::vector<Grid> grids;  // of the frames, each of which is `together_` of a video
  Pictures made;
  int64_t total = 0;
  const int64_t side = patch_ * merge_, group = merge_ * merge_, values = 3 * together_ * patch_ * patch_;
  for (const Shown& one : shown) {
    const int64_t count = (static_cast<int64_t>(one.frames.size()) + together_ - 1) / together_;
    fitted.emplace_back();
    const auto [height, width] =
        one.is_video() ? frame_size(one.picture(), static_cast<int64_t>(one.frames.size())) : size(one.picture(), 1);
    for (const Picture& frame : one.frames) {
      fitted.back().push_back(
          resized(frame, static_cast<int>(width), static_cast<int>(height), one.is_video() ? frame_.filter : filter_));
    }
    const Picture& first = fitted.back().front();
    const Grid grid{first.height / side, first.width / side};
    made.grids.push_back({grid.rows, grid.columns});
    const float step = one.is_video() ? interval(*one.fps) : 0;
    for (int64_t frame = 0; frame < count; ++frame) {
      made.grids.back().push_back(static_cast<int64_t>(static_cast<double>(frame) * static_cast<double>(step)));
      grids.push_back(grid);
    }
    made.tokens.push_back(count * grid.rows * grid.columns);
    total += made.tokens.back();
  }
  Tensor pixels = Tensor::empty(DType::kFloat32, {total, group, values});
  Tensor places = Tensor::empty(DType::kInt64, {total, group, 2});
  float* pixel = pixels.as<float>();
  int64_t* place = places.as<int64_t>();
  std::vector<int64_t> numbers;
  size_t number = 0;
  for (size_t i = 0; i < shown.size(); ++i) {
    const auto& frames = fitted[i];
    const Normalisation& of_values = shown[i].is_video() ? frame_.values : values_;
    for (size_t first = 0; first < frames.size(); first += static_cast<size_t>(together_), ++number) {
      const Grid grid = grids[number];
      add_patches(frames, first, grid, of_values, pixel);
      add_places(grid, place);
      numbers.insert(numbers.end(), static_cast<size_t>(grid.rows * grid.columns), static_cast<int64_t>(number));
    }
  }
  made.inputs = {{"pixel_values", pixels}, {"patch_positions", places}, {"frame_ids", Tensor::of(numbers, {total})}};
  if (window_ > 0) add_windows(grids, total, made.inputs);
  return made;
}

Positions QwenVl::positions(const std::vector<int64_t>& ids, int64_t start, const Pictures* pictures) const {
  const size_t count = ids.size();
  Positions found{Tensor::empty(DType::kInt64, {3, 1, static_cast<int64_t>(count)}), start};
  int64_t* axes[3];
  for (size_t axis = 0; axis < 3; ++axis) axes[axis] = found.ids.as<int64_t>() + axis * count;
  size_t picture = 0;
  int64_t position = start, last = start - 1;
  for (size_t token = 0; token < count;) {
    if (pictures == nullptr || ids[token] != contract_.image_token_id) {
      for (auto* axis : axes) axis[token] = position;
      last = std::max(last, position);
      ++position;
      ++token;
      continue;
    }
    const auto& grid = pictures->grids.at(picture++);
    const int64_t rows = grid[0], columns = grid[1];
    for (size_t frame = 2; frame < grid.size(); ++frame) {
      for (int64_t cell = 0; cell < rows * columns && token < count; ++cell, ++token) {
        axes[0][token] = position + grid[frame];
        axes[1][token] = position + cell / columns;
        axes[2][token] = position + cell % columns;
        last = std::max({last, axes[0][token], axes[1][token], axes[2][token]});
      }
    }
    position += std::max(rows, columns);
  }
  found.after = last + 1;
  return found;
}

// (height, width) that tokens fill; `frames` of them share what the bundle takes of one picture.
Size QwenVl::size(const Picture& picture, int64_t frames) const {
  const int64_t side = patch_ * merge_, share = contract_.image_tokens / frames;
  const int64_t most = std::min(most_, std::max<int64_t>(share, 1) * side * side);
  const Size found = fitting_size({picture.height, picture.width}, {side, std::min(least_, most), most});
  check_tokens(picture, found.first / side * (found.second / side), frames);
  return found;
}

Size QwenVl::frame_size(const Picture& frame, int64_t count) const {
  return size(frame, (count + together_ - 1) / together_);
}

void QwenVl::check_tokens(const Picture& picture, int64_t tokens, int64_t frames) const {
  const int64_t share = contract_.image_tokens / frames;
  if (tokens <= share) return;
  const std::string of = frames > 1 ? said("one of ", frames, " frames") : "a picture";
  throw Refusal(said("a picture of ", picture.width, " x ", picture.height, " pixels makes ", tokens,
                     " visual tokens at least, the bundle takes ", share, " of ", of,
                     "; crop it, give fewer frames, or export with more --image-tokens"));
}

// [tokens, patches of a token, channel, frame, row, column] of the frames from `first` on that share tokens; where they
// end, the last one is repeated: a picture is all of them.
void QwenVl::add_patches(const std::vector<Picture>& frames, size_t first, Grid grid, const Normalisation& values,
                         float*& target) const {
  const int64_t wide = frames[first].width, area = wide * frames[first].height;
  std::vector<std::vector<float>> wholes;
  for (size_t i = first; i < std::min(first + static_cast<size_t>(together_), frames.size()); ++i) {
    values.apply(frames[i], wholes.emplace_back(static_cast<size_t>(3 * area)).data());
  }
  const int64_t side = patch_ * merge_;
  for (int64_t token = 0; token < grid.rows * grid.columns; ++token) {
    const int64_t top = token / grid.columns * side, left = token % grid.columns * side;
    for (int64_t part = 0; part < merge_ * merge_; ++part) {
      const int64_t y = top + part / merge_ * patch_, x = left + part % merge_ * patch_;
      for (int64_t channel = 0; channel < 3; ++channel) {
        for (int64_t row = 0; row < together_ * patch_; ++row, target += patch_) {
          const auto& whole = wholes[std::min(static_cast<size_t>(row / patch_), wholes.size() - 1)];
          std::copy_n(whole.data() + channel * area + (y + row % patch_) * wide + x, patch_, target);
        }
      }
    }
  }
}

// Row and column of every patch.
void QwenVl::add_places(Grid grid, int64_t*& target) const {
  for (int64_t token = 0; token < grid.rows * grid.columns; ++token) {
    for (int64_t part = 0; part < merge_ * merge_; ++part) {
      *target++ = token / grid.columns * merge_ + part / merge_;
      *target++ = token % grid.columns * merge_ + part % merge_;
    }
  }
}

// window_tokens [V, side^2], padded with -1, and window_slots [M]: where each token is in it.
void QwenVl::add_windows(const std::vector<Grid>& grids, int64_t total, Tensors& inputs) const {
  std::vector<int64_t> table, slots(static_cast<size_t>(total));
  int64_t first = 0;
  for (const Grid& grid : grids) {
    const int64_t high = (grid.rows + window_ - 1) / window_, wide = (grid.columns + window_ - 1) / window_;
    for (int64_t window = 0; window < high * wide; ++window) {
      const int64_t top = window / wide * window_, left = window % wide * window_;
      for (int64_t cell = 0; cell < window_ * window_; ++cell) {
        const int64_t row = top + cell / window_, column = left + cell % window_;
        const bool inside = row < grid.rows && column < grid.columns;
        const int64_t token = inside ? first + row * grid.columns + column : -1;
        if (inside) slots[static_cast<size_t>(token)] = static_cast<int64_t>(table.size());
        table.push_back(token);
      }
    }
    first += grid.rows * grid.columns;
  }
  const int64_t area = window_ * window_;
  inputs["window_tokens"] = Tensor::of(table, {static_cast<int64_t>(table.size()) / area, area});
  inputs["window_slots"] = Tensor::of(slots, {total});
}

std::unique_ptr<Processor> make_qwen2_vl(const Folder& files, const Contract& contract) {
  return std::make_unique<Qwen2Vl>(files, contract);
}

std::unique_ptr<Processor> make_qwen2_5_vl(const Folder& files, const Contract& contract) {
  return std::make_unique<Qwen25Vl>(files, contract);
}

}  // namespace vlmtrim
