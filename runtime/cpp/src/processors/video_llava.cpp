// Video-LLaVA: a picture becomes one square of patches, a video as many as it has frames, each with its class token.
// Mirrors runtime/processors/video_llava.py.
#include <algorithm>

#include "core/error.hpp"
#include "picture/settings.hpp"
#include "processors/families.hpp"

namespace vlmtrim {
namespace {

class VideoLlava final : public Processor {
 public:
  VideoLlava(const Folder& files, const Contract& contract)
      : Processor(contract), image_(ImageProcessor::from_folder(files)) {
    const Shape squares{-1, 3, image_.height, image_.width};
    expect_inputs(files, contract, {{"pixel_values", squares}, {"frame_values", squares}, {"feature_index", {-1}}});
    if (!contract.image_grid) {
      throw BundleError(
          said((files.path() / "contract.json").string(), ": image_grid is null; video_llava needs that of a picture"));
    }
    patches_ = contract.image_grid->first * contract.image_grid->second;
  }

  bool takes_videos() const override { return contract_.video_token_id.has_value(); }

  Pictures prepare(const std::vector<Shown>& shown) const override {
    check(shown);
    std::vector<const Picture*> pictures, frames;
    for (const Shown& one : shown) {
      for (const Picture& frame : one.frames) (one.is_video() ? frames : pictures).push_back(&frame);
    }
    Pictures made;
    int64_t still = 0, moving = std::max<int64_t>(1, static_cast<int64_t>(pictures.size())) * patches_;
    std::vector<int64_t> index;  // in the table of features: pictures, then frames
    for (const Shown& one : shown) {
      int64_t& next = one.is_video() ? moving : still;
      made.tokens.push_back(one.is_video() ? static_cast<int64_t>(one.frames.size()) * (1 + patches_) : patches_);
      for (int64_t i = 0; i < made.tokens.back(); ++i) index.push_back(next++);
    }
    made.inputs = {{"pixel_values", squares(pictures)},
                   {"frame_values", squares(frames)},
                   {"feature_index", Tensor::of(index, {static_cast<int64_t>(index.size())})}};
    return made;
  }

 private:
  void check(const std::vector<Shown>& shown) const {
    const int64_t each = 1 + patches_, most = contract_.image_tokens / each;
    size_t longest = 0;
    for (const Shown& one : shown) longest = std::max(longest, one.is_video() ? one.frames.size() : 0);
    if (static_cast<int64_t>(longest) <= most) return;
    throw Refusal(said("a video of ", longest, " frames, ", each, " visual tokens each; the bundle takes ", most,
                       " frames of one: give fewer, or export with more --image-tokens"));
  }

  // float32 [n, 3, height, width]; one of zeros for none.
  Tensor squares(const std::vector<const Picture*>& pictures) const {
    if (pictures.empty()) return Tensor::zeros(DType::kFloat32, {1, 3, image_.height, image_.width});
    return image_.stacked(pictures);
  }

  ImageProcessor image_;
  int64_t patches_;  // of a picture
};

}  // namespace

std::unique_ptr<Processor> make_video_llava(const Folder& files, const Contract& contract) {
  return std::make_unique<VideoLlava>(files, contract);
}

}  // namespace vlmtrim
