// Drives a bundle: vision -> embed -> decoder, with the caches of every group and their lengths. One conversation.
// Mirrors runtime/session.py and choosing.py for one row.
#pragma once

#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "attention.hpp"
#include "caching.hpp"
#include "crossing.hpp"
#include "model.hpp"

namespace vlmtrim {

struct Times {
  double vision = 0, prefill = 0, decode = 0;  // seconds since the session was opened or reset
  int64_t steps = 0;                           // decode steps
  double caches = 0;                           // cutting the caches behind questions
};

// What one prefill did. Indices are into the step's tokens, or its image features, ascending.
struct Prefill {
  std::vector<float> logits;
  int64_t visual = 0, kept = 0;
  std::vector<int64_t> visual_positions;
  std::optional<std::vector<int64_t>> kept_indices;
  std::optional<std::vector<float>> visual_scores;
  std::optional<std::vector<int64_t>> kept_features;
  std::optional<std::vector<std::vector<int64_t>>> kept_by_layer;
  std::optional<Held> held;  // what a cache policy left of the step's tokens

  // Which visual tokens each layer keeps, where layers choose by themselves: how many of them.
  std::vector<int64_t> visual_kept_by_layer() const;
  // Visual tokens that each layer's caches hold, where a policy judged them: the mean over its sets.
  std::vector<double> visual_held_by_layer() const;
};

// One thread at a time.
class Session {
 public:
  explicit Session(std::shared_ptr<Model> model);

  Model& model() const { return *model_; }
  const Contract& contract() const { return model_->contract(); }
  const Times& times() const { return times_; }
  Caching& caching() { return *caching_; }
  Attention& attention() { return *attention_; }

  // Forgets the conversation; the caches are reused.
  void reset();
  // Runs new tokens, image tokens already repeated. `pictures` may be null; `guide`: what the visual tokens are ranked
  // by where the contract's guide is another bundle. Throws Refusal.
  Prefill prefill(const std::vector<int64_t>& ids, const Pictures* pictures, const std::vector<float>* guide = nullptr);
  // Runs one token; returns logits [V].
  std::vector<float> decode(int64_t token);
  // Tokens that the caches can still take, visual tokens not counted.
  int64_t room() const;
  // Filled cache entries of every group.
  const std::vector<int64_t>& entries() const { return entries_; }

 private:
  struct Step {
    Tensors outputs;
    std::optional<std::vector<int64_t>> kept_features;
  };

  Graph& graph(const std::string& name);
  std::vector<int64_t> visual_positions(const std::vector<int64_t>& ids) const;
  int64_t visual_of(const Pictures* pictures) const;
  Tensors encode(const Pictures& pictures, int64_t visual);
  void check_room(int64_t tokens, int64_t visual) const;
  Tensors guide_scores(const std::vector<float>* guide, int64_t visual) const;
  Step step(const std::vector<int64_t>& ids, const std::vector<int64_t>& visual_positions, const Tensor& features,
            const Pictures* pictures, const Tensors& given, bool decodes);
  std::vector<int64_t> feed_places(Tensors& feeds, int64_t tokens, int64_t visual, bool decodes) const;
  void cut(Prefill& done, const Step& found, const std::vector<int64_t>& rows, int64_t tokens,
           const std::vector<int64_t>& before);
  std::vector<int64_t> grown(const Tensors& outputs, int64_t tokens, int64_t visual,
                             const std::optional<std::vector<int64_t>>& kept_features) const;
  std::vector<std::vector<int64_t>> kept_by_layer(const Tensors& outputs, int64_t tokens, int64_t visual) const;
  int64_t chosen(const Tensors& outputs, size_t group, int64_t visual) const;
  Tensor no_features() const;

  std::shared_ptr<Model> model_;
  std::map<std::string, std::unique_ptr<Graph>> graphs_;
  Tensors caches_;
  int64_t features_ = 0, vocabulary_ = 0, position_ = 0;
  bool selects_ = false, chooses_ = false, sees_ahead_ = false;
  std::vector<int64_t> entries_;
  std::unique_ptr<Crossing> crossing_;
  std::unique_ptr<Caching> caching_;
  std::unique_ptr<Attention> attention_;
  Times times_;
};

}  // namespace vlmtrim
