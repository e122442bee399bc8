#include "processors/shown.hpp"

#include <algorithm>

#include "core/error.hpp"

namespace vlmtrim {

std::vector<double> Shown::seconds() const {
  std::vector<double> found;
  for (size_t number = 0; number < frames.size(); ++number) found.push_back(static_cast<double>(number) / *fps);
  return found;
}

Shown Shown::video(size_t count, double fps, const std::function<Picture(size_t)>& open) {
  if (count == 0) throw Refusal("a video without frames; give at least one");
  if (count > kMostFrames) throw Refusal(said("a video of ", count, " frames; give at most ", kMostFrames));
  if (!(kSlowest <= fps && fps <= kFastest)) {
    throw Refusal(
        said("a video of ", fps, " frames a second; give a number above 0, from ", kSlowest, " to ", kFastest));
  }
  Shown made{{}, fps};
  for (size_t number = 0; number < count; ++number) {
    try {
      made.frames.push_back(open(number));
    } catch (const Refusal& refusal) {
      throw Refusal(said("frame ", number + 1, " of a video of ", count, ": ", refusal.what()));
    }
    const Picture &first = made.frames.front(), &last = made.frames.back();
    if (int64_t{first.width} * first.height * static_cast<int64_t>(count) > kMostPixelsOfFrames) {
      throw Refusal(said("a video of ", count, " frames of ", first.width, " x ", first.height,
                         " pixels; all together may have ", kMostPixelsOfFrames / 1'000'000,
                         " million: give fewer frames, or scale them down"));
    }
    if (last.width == first.width && last.height == first.height) continue;
    const auto [one, other] = std::minmax({std::pair(first.width, first.height), std::pair(last.width, last.height)});
    throw Refusal(said("the frames of a video have 2 sizes or more, among them [(", one.first, ", ", one.second, "), (",
                       other.first, ", ", other.second, ")]"));
  }
  return made;
}

}  // namespace vlmtrim
