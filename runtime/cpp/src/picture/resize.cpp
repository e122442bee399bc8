// Separable resampling in fixed-point arithmetic, equal to Pillow 13's to the bit: weights of 22 bits, sums rounded and
// cut to 8 bits after each pass.
#include <algorithm>
#include <cmath>
#include <cstring>

#include "core/error.hpp"
#include "picture/picture.hpp"

namespace vlmtrim {
namespace {

constexpr int kBits = 32 - 8 - 2;
constexpr double kPi = 3.14159265358979323846;

double sinc(double x) {
  if (x == 0) return 1;
  x *= kPi;
  return std::sin(x) / x;
}

double weight(int filter, double x) {
  const double away = std::fabs(x);
  switch (filter) {
    case kLanczos:
      return -3 <= x && x < 3 ? sinc(x) * sinc(x / 3) : 0;
    case kBilinear:
      return away < 1 ? 1 - away : 0;
    case kBicubic:
      if (away < 1) return ((-0.5 + 2) * away - (-0.5 + 3)) * away * away + 1;
      return away < 2 ? (((away - 5) * away + 8) * away - 4) * -0.5 : 0;
    case kBox:
      return x > -0.5 && x <= 0.5 ? 1 : 0;
    default: {  // Hamming
      if (away >= 1) return 0;
      const double turned = away * kPi;
      return away == 0 ? 1 : std::sin(turned) / turned * (0.54F + 0.46F * std::cos(turned));
    }
  }
}

double reach(int filter) { return filter == kLanczos ? 3 : filter == kBicubic ? 2 : filter == kBox ? 0.5 : 1; }

// What each output pixel of a line is made of: `count` pixels from `first` on, with weights.
struct Line {
  int first, count;
  const int32_t* weights;
};

class Lines {
 public:
  Lines(int in, float from, float to, int out, int filter) {
    const double scale = static_cast<double>(to - from) / out, stretch = std::max(scale, 1.0);
    const double support = reach(filter) * stretch, inverse = 1.0 / stretch;
    const size_t most = static_cast<size_t>(std::ceil(support)) * 2 + 1;
    weights_.resize(most * static_cast<size_t>(out));
    std::vector<double> exact(most);
    for (int i = 0; i < out; ++i) {
      const double centre = from + (i + 0.5) * scale;
      const int first = std::max(static_cast<int>(centre - support + 0.5), 0);
      const int count = std::min(static_cast<int>(centre + support + 0.5), in) - first;
      double sum = 0;
      for (int j = 0; j < count; ++j) {
        exact[static_cast<size_t>(j)] = weight(filter, (j + first - centre + 0.5) * inverse);
        sum += exact[static_cast<size_t>(j)];
      }
      int32_t* fixed = weights_.data() + most * static_cast<size_t>(i);
      for (int j = 0; j < count; ++j) {
        const double part = sum != 0 ? exact[static_cast<size_t>(j)] / sum : exact[static_cast<size_t>(j)];
        fixed[j] = static_cast<int32_t>((part < 0 ? -0.5 : 0.5) + part * (1 << kBits));
      }
      lines_.push_back({first, count, fixed});
    }
  }

  const Line& operator[](int i) const { return lines_[static_cast<size_t>(i)]; }
  int first_used() const { return lines_.front().first; }
  int end_used() const { return lines_.back().first + lines_.back().count; }

 private:
  std::vector<int32_t> weights_;
  std::vector<Line> lines_;
};

uint8_t clipped(int32_t sum) { return static_cast<uint8_t>(std::clamp(sum >> kBits, 0, 255)); }

// Rows from `top` to `bottom` of a picture, scaled along x.
Picture across(const Picture& in, const Lines& lines, int width, int top, int bottom) {
  Picture out(width, bottom - top);
  for (int y = top; y < bottom; ++y) {
    const uint8_t* row = in.row(y);
    uint8_t* made = out.row(y - top);
    for (int x = 0; x < width; ++x) {
      const Line& line = lines[x];
      const uint8_t* pixel = row + 3 * static_cast<ptrdiff_t>(line.first);
      int32_t red = 1 << (kBits - 1), green = red, blue = red;
      for (int i = 0; i < line.count; ++i, pixel += 3) {
        red += pixel[0] * line.weights[i];
        green += pixel[1] * line.weights[i];
        blue += pixel[2] * line.weights[i];
      }
      *made++ = clipped(red);
      *made++ = clipped(green);
      *made++ = clipped(blue);
    }
  }
  return out;
}

// A picture scaled along y; its first row is row `offset` of what the lines count from.
Picture down(const Picture& in, const Lines& lines, int height, int offset) {
  Picture out(in.width, height);
  const int values = in.width * 3;
  std::vector<int32_t> sums(static_cast<size_t>(values));
  for (int y = 0; y < height; ++y) {
    const Line& line = lines[y];
    std::fill(sums.begin(), sums.end(), 1 << (kBits - 1));
    for (int i = 0; i < line.count; ++i) {
      const uint8_t* row = in.row(line.first - offset + i);
      const int32_t factor = line.weights[i];
      for (int x = 0; x < values; ++x) sums[static_cast<size_t>(x)] += row[x] * factor;
    }
    uint8_t* made = out.row(y);
    for (int x = 0; x < values; ++x) made[x] = clipped(sums[static_cast<size_t>(x)]);
  }
  return out;
}

// The pixel that each place of a line takes, -1 outside; places are added up as Pillow adds them.
std::vector<int> nearest(int in, double from, double to, int out) {
  const double step = (to - from) / out;
  std::vector<int> places(static_cast<size_t>(out), -1);
  double at = from + step * 0.5;
  for (int& place : places) {
    const int pixel = at < 0 ? -1 : static_cast<int>(at);
    if (pixel < in) place = pixel;
    at += step;
  }
  return places;
}

Picture picked(const Picture& in, int width, int height, const Box& box) {
  Picture out(width, height);
  const auto columns = nearest(in.width, box.left, box.right, width);
  const auto rows = nearest(in.height, box.top, box.bottom, height);
  for (int y = 0; y < height; ++y) {
    for (int x = 0; x < width; ++x) {
      const int column = columns[static_cast<size_t>(x)], row = rows[static_cast<size_t>(y)];
      if (column >= 0 && row >= 0) std::memcpy(out.row(y) + 3 * x, in.row(row) + 3 * column, 3);
    }
  }
  return out;
}

}  // namespace

Picture resized(const Picture& picture, int width, int height, int filter) {
  return resized(picture, width, height, filter,
                 {0, 0, static_cast<float>(picture.width), static_cast<float>(picture.height)});
}

Picture resized(const Picture& in, int width, int height, int filter, const Box& box) {
  const auto whole = [](float from, float to, int size) { return from == 0 && to == static_cast<float>(size); };
  const bool same_width = in.width == width && whole(box.left, box.right, width);
  const bool same_height = in.height == height && whole(box.top, box.bottom, height);
  if (same_width && same_height) return in;
  if (filter == kNearest) return picked(in, width, height, box);
  const Lines rows(in.height, box.top, box.bottom, height, filter);
  const Lines columns(in.width, box.left, box.right, width, filter);
  if (same_width) return down(in, rows, height, 0);
  if (same_height) return across(in, columns, width, 0, in.height);
  // The pass that saves more goes first.
  if (height < in.height && in.height - height > 2 * (in.width - width)) {
    return across(down(in, rows, height, 0), columns, width, 0, height);
  }
  const int top = rows.first_used(), bottom = rows.end_used();
  return down(across(in, columns, width, top, bottom), rows, height, top);
}

Picture cropped(const Picture& in, int left, int top, int width, int height) {
  Picture out(width, height);
  paste(out, in, -left, -top);
  return out;
}

void paste(Picture& target, const Picture& picture, int left, int top) {
  const int from = std::max(left, 0), to = std::min(left + picture.width, target.width);
  if (from >= to) return;
  for (int y = std::max(top, 0); y < std::min(top + picture.height, target.height); ++y) {
    std::memcpy(target.row(y) + 3 * static_cast<ptrdiff_t>(from),
                picture.row(y - top) + 3 * static_cast<ptrdiff_t>(from - left), 3 * static_cast<size_t>(to - from));
  }
}

}  // namespace vlmtrim
