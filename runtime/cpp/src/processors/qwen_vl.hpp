// What the families of Qwen-VL share: pictures keep their proportions; every 28 x 28 pixels or so become a visual
// token. Mirrors runtime/processors/qwen2_5_vl.py.
#pragma once

#include "picture/settings.hpp"
#include "processors/processor.hpp"

namespace vlmtrim {

using Size = std::pair<int64_t, int64_t>;  // height, width

// What a picture may have: multiples of `side`, between `least` and `most` pixels; those of a video are of all `frames`
// together, which count as `counted` where whole groups of them do.
struct Limits {
  int64_t side, least, most, frames = 1, counted = 1;
};
// A size of about the same proportions. Throws Refusal.
Size fitting_size(Size size, const Limits& limits);

class QwenVl : public Processor {
 public:
  bool takes_videos() const override { return contract_.video_token_id.has_value(); }
  // `grids` of what it makes: rows, columns, and the time of each frame.
  Pictures prepare(const std::vector<Shown>& shown) const override;
  // M-RoPE [3, 1, S]: text counts on along all three axes, a picture's tokens by frame, row and column; the text behind
  // a picture goes on after its longer side.
  Positions positions(const std::vector<int64_t>& ids, int64_t start, const Pictures* pictures) const override;

 protected:
  QwenVl(const Folder& files, const Contract& contract);

  // (height, width) at which the model sees one of `count` frames of a video; they share what a picture may have.
  virtual Size frame_size(const Picture& frame, int64_t count) const;
  // Throws Refusal where each of so many frames that tokens fill has more of them than its share.
  void check_tokens(const Picture& picture, int64_t tokens, int64_t frames) const;
  // Positions between two frames of a video that are as many a second.
  virtual float interval(double fps) const;
  // Of the vision graph's inputs.
  std::map<std::string, Shape> shapes() const;
  // Of the model's config.
  static Json vision_config(const Folder& files);

  // Pixels of a patch and patches of a token along each side; frames that share tokens.
  int64_t patch_ = 0, merge_ = 0, together_ = 0;
  FrameSettings frame_;

 private:
  struct Grid {
    int64_t rows, columns;
  };

  Size size(const Picture& picture, int64_t frames) const;
  void add_patches(const std::vector<Picture>& frames, size_t first, Grid grid, const Normalisation& values,
                   float*& target) const;
  void add_places(Grid grid, int64_t*& target) const;
  void add_windows(const std::vector<Grid>& grids, int64_t total, Tensors& inputs) const;

  int64_t window_, least_ = 0, most_ = 0;
  double tokens_per_second_ = 0;
  int filter_ = kBicubic;
  Normalisation values_;
};

}  // namespace vlmtrim
