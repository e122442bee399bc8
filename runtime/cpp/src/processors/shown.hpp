// What a question shows: pictures, and videos as frames in order. Mirrors runtime/video.py.
#pragma once

#include <functional>
#include <optional>
#include <vector>

#include "picture/picture.hpp"

namespace vlmtrim {

constexpr size_t kMostFrames = 4096;
// Of all frames together (768 MB of RGB), a hundred of 1920 x 1080 or a thousand of 512 x 512.
constexpr int64_t kMostPixelsOfFrames = 256 * 1024 * 1024;
constexpr double kSlowest = 1e-3, kFastest = 1e3;  // frames a second

struct Shown {
  std::vector<Picture> frames;  // of one size; a picture is one
  std::optional<double> fps;    // of a video alone: frames a second, as they are given

  bool is_video() const { return fps.has_value(); }
  const Picture& picture() const { return frames.front(); }
  // When each frame of a video is shown.
  std::vector<double> seconds() const;

  static Shown of(Picture picture) { return {{std::move(picture)}, std::nullopt}; }
  // Opens frames 0 to `count` - 1. Throws Refusal where they cannot be one video.
  static Shown video(size_t count, double fps, const std::function<Picture(size_t)>& open);
};

}  // namespace vlmtrim
