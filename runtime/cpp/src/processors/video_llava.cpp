// Video-LLaVA: a picture becomes one square of patches, a video as many as it has frames, each with its class token.
// Mirrors runtime/processors/video_llava.py.
#include <numeric>

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

  Pictures prepare(const std::vector<Picture>& pictures) const override {
    std::vector<int64_t> index(pictures.size() * static_cast<size_t>(patches_));
    std::iota(index.begin(), index.end(), 0);
    return {{{"pixel_values", squares(pictures)},
             {"frame_values", squares({})},
             {"feature_index", Tensor::of(index, {static_cast<int64_t>(index.size())})}},
            std::vector<int64_t>(pictures.size(), patches_),
            {},
            {}};
  }

 private:
  // float32 [n, 3, height, width]; one of zeros for none.
  Tensor squares(const std::vector<Picture>& pictures) const {
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
