// LLaVA-NeXT: a picture becomes the tiles that its shape needs, and as many visual tokens as its part of them has.
#include "processors/families.hpp"
#include "processors/tiling.hpp"

namespace vlmtrim {
namespace {

// Resolutions of settings that name none.
const std::vector<Size> kPinpoints{{336, 672}, {672, 336}, {672, 672}, {1008, 336}, {336, 1008}};

class LlavaNext final : public Processor {
 public:
  LlavaNext(const Folder& files, const Contract& contract) : Processor(contract), tiling_(files, contract, kPinpoints) {
    const ImageProcessor& tile = tiling_.tile();
    expect_inputs(files, contract, {{"pixel_values", {-1, 3, tile.height, tile.width}}, {"feature_index", {-1}}});
    tiling_.check(files, contract, [](int64_t rows, int64_t columns) { return rows * (columns + 1); });
  }

  Pictures prepare(const std::vector<Shown>& shown) const override {
    std::vector<Picture> tiles;
    std::vector<int64_t> first;
    for (const Shown& one : shown) {
      first.push_back(static_cast<int64_t>(tiles.size()));
      tiling_.add_tiles(one.picture(), tiles);
    }
    const auto total = static_cast<int64_t>(tiles.size());
    check_tiles(shown.size(), total);
    const auto [rows, columns] = tiling_.patches();
    Pictures made;
    std::vector<int64_t> index;
    for (size_t i = 0; i < shown.size(); ++i) {
      const size_t before = index.size();
      const Picture& picture = shown[i].picture();
      add_features({picture.height, picture.width}, first[i], total * rows * columns, index);
      made.tokens.push_back(static_cast<int64_t>(index.size() - before));
    }
    made.inputs["pixel_values"] = tiling_.tile().stacked(tiles);
    made.inputs["feature_index"] = Tensor::of(index, {static_cast<int64_t>(index.size())});
    return made;
  }

 private:
  // The patch that each token of a picture is, whose tiles start at number `first`: the squeezed tile, then the rows.
  void add_features(Size size, int64_t first, int64_t newline, std::vector<int64_t>& index) const {
    const PatchGrid whole = tiling_.squeezed(first), grid = tiling_.covered(size, first);
    index.insert(index.end(), whole.numbers.begin(), whole.numbers.end());
    for (int64_t row = 0; row < grid.rows; ++row) {
      const auto from = grid.numbers.begin() + row * grid.columns;
      index.insert(index.end(), from, from + grid.columns);
      index.push_back(newline);
    }
  }

  Tiling tiling_;
};

}  // namespace

std::unique_ptr<Processor> make_llava_next(const Folder& files, const Contract& contract) {
  return std::make_unique<LlavaNext>(files, contract);
}

}  // namespace vlmtrim
