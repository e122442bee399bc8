// One bundle guided by another: A Stitch in Time, SGL (arXiv 2412.03324). Mirrors runtime/guided.py.
#pragma once

#include <optional>

#include "chat.hpp"

namespace vlmtrim {

// What became of a question about pictures: geometric mean, over the tokens of the small model's answer, of the
// likeliest token's probability; whether that answer was given; seconds that each model took.
struct Guidance {
  double confidence = 0;
  bool exited = false;
  double small = 0, large = 0;
};

// A small bundle that answers where it is sure, and shows a large one which visual tokens to keep where it is not.
// Every question about pictures is a conversation of its own for the small one; the large one goes on with its
// conversation, and answers questions without pictures alone. With `exit_confidence` the large one does not see every
// question, so each opens a new conversation of both.
class Guided {
 public:
  // `large` must outlive it. Throws Refusal where the bundles do not fit together.
  Guided(std::shared_ptr<Model> small, Chat& large, std::optional<double> exit_confidence);

  // As Chat::reset, of both.
  void reset(const std::string& system);
  // As Chat::generate; where the small one's answer is given, the listener is told of it when it is whole.
  Answer generate(const std::vector<Part>& parts, const std::vector<Shown>& shown, const GenerateOptions& options,
                  const Listener& listener);
  // Ends the small one's answer behind its next token, and with it the question.
  void cancel() { small_.cancel(); }
  // Of the last question; none where it had no picture.
  const std::optional<Guidance>& guidance() const { return guidance_; }
  // Of the bundle that gave the last answer.
  Session& session() { return guidance_ && guidance_->exited ? small_.session() : large_.session(); }

 private:
  void check_same(const std::vector<Shown>& shown);

  Chat small_, &large_;
  std::optional<double> exit_confidence_;
  std::optional<Guidance> guidance_;
  std::string system_;
};

}  // namespace vlmtrim
