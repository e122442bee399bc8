// What a processor is: pictures and videos -> inputs of the vision graph, visual tokens of each, positions of the
// tokens. Mirrors runtime/processors/base.py and the families' files beside it.
#pragma once

#include <memory>
#include <vector>

#include "core/bundle.hpp"
#include "core/tensor.hpp"
#include "processors/shown.hpp"

namespace vlmtrim {

// What the pictures and videos of one step become.
struct Pictures {
  Tensors inputs;               // of the vision graph: float32 (cast to the contract's dtype later) or int64
  std::vector<int64_t> tokens;  // visual tokens that each picture brings
  std::vector<std::vector<int64_t>> grids;  // what a family's positions depend on, per picture
  // What the prompt says of each picture in place of its mark, its image tokens among it; empty where that is the mark
  // alone, once for every token.
  std::vector<std::string> words;
};

struct Positions {
  Tensor ids;         // as the contract states them
  int64_t after = 0;  // first free position after the step
};

// Where a conversation with cross-attention is: pictures so far, the first and the first not that its last token sees,
// and whether that token marks a picture.
struct View {
  int64_t pictures = 0, first = 0, end = 0;
  bool at_mark = false;
};

// Holds no state: one serves all sessions of a model.
class Processor {
 public:
  explicit Processor(const Contract& contract) : contract_(contract) {}
  virtual ~Processor() = default;

  // Whether videos may stand among the pictures.
  virtual bool takes_videos() const { return false; }
  virtual Pictures prepare(const std::vector<Shown>& shown) const = 0;
  // Positions of a step's tokens, from the first free one; `pictures` may be null.
  virtual Positions positions(const std::vector<int64_t>& ids, int64_t start, const Pictures* pictures) const;

  // Of families whose decoder has cross-attention. `image_numbers` of the contract for a step's pictures, [N].
  virtual std::vector<int64_t> image_numbers(const Pictures& pictures, const View& view) const;
  // `seen_images` of the contract, [S, 2]; moves `view` on. `brings`: whether image tokens stand for pictures.
  virtual std::vector<int64_t> seen_images(const std::vector<int64_t>& ids, View& view, bool brings) const;

 protected:
  // Throws Refusal where so many pictures become more tiles than the vision graph takes in a step (T).
  void check_tiles(size_t pictures, int64_t tiles) const;
  // The same of the frames of videos alone, where each is a tile: before any is made.
  void check_frames(const std::vector<Shown>& shown) const;

  const Contract& contract_;
};

// The special tokens of some roles, as the tokenizer's settings name them; `usual` by role where they do not. Throws
// BundleError.
std::vector<std::string> special_tokens(const Folder& files,
                                        const std::vector<std::pair<const char*, const char*>>& usual);

// Throws Refusal where there is none of the bundle's family, BundleError where its settings do not fit its graphs.
// The bundle must outlive it.
std::unique_ptr<Processor> load_processor(const Bundle& bundle);

}  // namespace vlmtrim
