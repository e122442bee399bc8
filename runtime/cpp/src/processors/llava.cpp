// LLaVA-1.5: every picture becomes one square and the same number of visual tokens.
#include "picture/settings.hpp"
#include "processors/families.hpp"

namespace vlmtrim {
namespace {

class Llava final : public Processor {
 public:
  Llava(const Folder& files, const Contract& contract)
      : Processor(contract), image_(ImageProcessor::from_folder(files)) {
    expect_inputs(files, contract, {{"pixel_values", {-1, 3, image_.height, image_.width}}});
  }

  Pictures prepare(const std::vector<Shown>& shown) const override {
    std::vector<const Picture*> pictures;
    for (const Shown& one : shown) pictures.push_back(&one.picture());
    return {{{"pixel_values", image_.stacked(pictures)}},
            std::vector<int64_t>(pictures.size(), contract_.image_tokens),
            {},
            {}};
  }

 private:
  ImageProcessor image_;
};

}  // namespace

std::unique_ptr<Processor> make_llava(const Folder& files, const Contract& contract) {
  return std::make_unique<Llava>(files, contract);
}

}  // namespace vlmtrim
