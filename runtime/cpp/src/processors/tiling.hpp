// Tiles of any resolution, as LLaVA-NeXT and LLaVA-OneVision cut pictures into them, and the patches that a picture
// covers. Mirrors runtime/processors/llava_next.py.
#pragma once

#include <functional>
#include <utility>
#include <vector>

#include "picture/settings.hpp"

namespace vlmtrim {

using Size = std::pair<int64_t, int64_t>;  // height, width

// Numbers of patches by rows.
struct PatchGrid {
  int64_t rows = 0, columns = 0;
  std::vector<int64_t> numbers;
};

class Tiling {
 public:
  // `usual`: resolutions of settings that name none. Throws BundleError.
  Tiling(const Folder& files, const Contract& contract, std::vector<Size> usual);

  const ImageProcessor& tile() const { return tile_; }
  // Rows and columns of a tile's patches.
  Size patches() const { return patches_; }
  // Adds the squeezed picture, then the tiles of the scaled and padded one, row by row.
  void add_tiles(const Picture& picture, std::vector<Picture>& tiles) const;
  // The patches of a tile, by its number.
  PatchGrid squeezed(int64_t tile) const;
  // Those that a picture of this size covers of its tiles behind the squeezed one, which is number `first`.
  PatchGrid covered(Size size, int64_t first) const;
  // Throws BundleError where the resolutions are not the model's; `most`: tokens of a grid of so many rows and columns
  // of patches, whatever part of it a picture covers.
  void check(const Folder& files, const Contract& contract, const std::function<int64_t(int64_t, int64_t)>& most) const;

 private:
  ImageProcessor tile_;
  std::vector<Size> pinpoints_;
  Size patches_;
};

}  // namespace vlmtrim
