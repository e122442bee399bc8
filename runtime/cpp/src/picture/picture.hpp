// Pictures as 8-bit RGB, read from files that strangers made: named formats alone, within limits.
// Mirrors runtime/image.py and runtime/decoding.py.
#pragma once

#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

namespace vlmtrim {

constexpr int64_t kMostPixels = 64 * 1024 * 1024;  // that a file may unpack to
constexpr size_t kMostBytes = size_t{512} << 20;   // of a file

struct Picture {
  int width = 0, height = 0;
  std::vector<uint8_t> rgb;  // rows from the top, 3 bytes a pixel

  Picture() = default;
  Picture(int wide, int high) : width(wide), height(high), rgb(static_cast<size_t>(wide) * high * 3) {}
  uint8_t* row(int y) { return rgb.data() + static_cast<size_t>(y) * width * 3; }
  const uint8_t* row(int y) const { return rgb.data() + static_cast<size_t>(y) * width * 3; }
};

// All throw Refusal: missing, no picture, truncated, too large.
Picture load_picture(const std::string& path);
Picture decode_picture(std::string_view data, const std::string& name);
// From pixels in memory; `stride` bytes from row to row, `channels` 1 (grey), 3 (RGB) or 4 (RGB and one ignored).
Picture from_pixels(const uint8_t* pixels, int width, int height, int64_t stride, int channels);

// Throws Refusal where a picture of this size is not taken.
void check_size(int64_t width, int64_t height, const std::string& name);

// Pillow's numbers of its filters.
enum Filter { kNearest = 0, kLanczos = 1, kBilinear = 2, kBicubic = 3, kBox = 4, kHamming = 5 };
struct Box {
  float left, top, right, bottom;
};
// As Pillow's Image.resize, to the bit; `box` is the part of the picture that is scaled.
Picture resized(const Picture& picture, int width, int height, int filter);
Picture resized(const Picture& picture, int width, int height, int filter, const Box& box);
// The part from (left, top) on, black where it is outside.
Picture cropped(const Picture& picture, int left, int top, int width, int height);
void paste(Picture& target, const Picture& picture, int left, int top);

}  // namespace vlmtrim
