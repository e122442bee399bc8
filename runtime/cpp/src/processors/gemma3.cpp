// Gemma 3: every picture becomes one square and the same number of visual tokens, between two marks.
// Mirrors runtime/processors/gemma3.py.
#include "picture/settings.hpp"
#include "processors/families.hpp"

namespace vlmtrim {
namespace {

class Gemma3 final : public Processor {
 public:
  Gemma3(const Folder& files, const Contract& contract)
      : Processor(contract), image_(ImageProcessor::from_folder(files)) {
    expect_inputs(files, contract, {{"pixel_values", {-1, 3, image_.height, image_.width}}});
    const ImageSettings settings = ImageSettings::read(files);
    image_.filter = settings.resample(kBilinear);
    if (settings.boolean("do_pan_and_scan", false)) {
      settings.refuse(
          "do_pan_and_scan is true, and pictures are not cut into crops here; set it to false, and give crops as "
          "further pictures");
    }
    const auto marks = special_tokens(
        files,
        {{"boi_token", "<start_of_image>"}, {"image_token", "<image_soft_token>"}, {"eoi_token", "<end_of_image>"}});
    words_ = "\n\n" + marks[0];
    for (int64_t i = 0; i < contract.image_tokens; ++i) words_ += marks[1];
    words_ += marks[2] + "\n\n";
  }

  Pictures prepare(const std::vector<Shown>& shown) const override {
    std::vector<const Picture*> pictures;
    for (const Shown& one : shown) pictures.push_back(&one.picture());
    return {{{"pixel_values", image_.stacked(pictures)}},
            std::vector<int64_t>(pictures.size(), contract_.image_tokens),
            {},
            std::vector<std::string>(pictures.size(), words_)};
  }

 private:
  ImageProcessor image_;
  std::string words_;  // what the prompt says of a picture
};

}  // namespace

std::unique_ptr<Processor> make_gemma3(const Folder& files, const Contract& contract) {
  return std::make_unique<Gemma3>(files, contract);
}

}  // namespace vlmtrim
