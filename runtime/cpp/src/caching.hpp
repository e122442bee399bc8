// What stays in the caches: runs a bundle's cache policy behind a question, or while an answer grows. Knows the
// contract, no policy. Mirrors runtime/caching.py for one row.
#pragma once

#include <functional>
#include <map>
#include <optional>
#include <vector>

#include "backends/backend.hpp"

namespace vlmtrim {

// Tokens of a step by layer and set of entries, ascending.
using Held = std::vector<std::vector<std::vector<int64_t>>>;

// What one round left: entries of every group, and the step's tokens that stay, where some of it was judged.
struct Round {
  std::vector<int64_t> entries;
  std::optional<Held> held;
};

// Where a step's first token is written, and the last slot that it sees.
struct WritePlace {
  int64_t slot, limit;
};

class Caching {
 public:
  using OpenGraph = std::function<Graph&(const std::string&)>;
  using Numbers = std::vector<int64_t>;

  // `caches` by input name, of the decoder; `graph` opens a graph of the bundle. All of it must outlive this.
  Caching(const Contract& contract, Backend& backend, const Tensors& caches, OpenGraph graph);

  bool on() const { return policy_ != nullptr; }
  // Begins a new conversation.
  void reset();
  // Share of the candidates that stays; decode steps between two rounds. Setting them throws Refusal where the bundle
  // has no policy that takes them.
  double share() const { return share_; }
  void set_share(double share);
  void set_every(int64_t every);

  // Tokens of a question that score, ascending; and the same of a decode step.
  Numbers rows(int64_t tokens, const Numbers& visual_positions) const;
  Numbers decode_rows() const;
  // Adds the decoder's inputs of a step with these rows.
  void feed(Tensors& feeds, const Numbers& rows) const;
  // Of a group, where the step's first token goes; `decodes`: it is a decode step.
  WritePlace place(size_t group, int64_t entries, bool decodes) const;
  // Whether answers go round in the caches, which then do not grow.
  bool rings() const { return policy_ != nullptr && policy_->ring > 0; }

  // Cuts the caches behind a question. `taken`: of every group the step's tokens that its caches took, ascending;
  // `before`: the entries of every group before it. Throws Refusal where the policy names entries that are not there.
  Round after(const Tensors& outputs, const Numbers& rows, const Numbers& visual_positions,
              const std::vector<Numbers>& taken, const Numbers& before);
  // Cuts them behind a decode step where a round is due; returns the entries of every group.
  Numbers grown(const Tensors& outputs, const Numbers& rows, const Numbers& before, const Numbers& entries);

 private:
  // Scores [L, Z, W] of all layers' entries.
  struct Scores {
    int64_t maps = 0, window = 0;
    std::vector<float> values;
  };
  // A policy's choice: slots [L, X, W], what stays first, ascending; and how many stay, [L].
  struct Choice {
    int64_t sets = 0;
    Numbers order, counts;
  };

  Numbers of_groups(const Choice& choice) const;
  int64_t window(const Numbers& entries) const;
  Numbers kinds(const Numbers& taken, int64_t before, const Numbers& visual_positions, int64_t window) const;
  Scores scores(const Tensors& outputs, const std::vector<Numbers>& slots, const std::vector<Numbers>& kinds,
                int64_t window);
  Tensor score(const Tensor& queries, size_t layer, const Numbers& slots, const Numbers& kinds, int64_t window) const;
  void add_noise(Tensors& feeds, int64_t window) const;
  void add_up(Scores& scores);
  Choice cut(const Scores& scores, const std::vector<Numbers>& kinds, const Numbers& entries, double share);
  void compact(size_t layer, const Choice& choice, int64_t window, const Numbers& kinds) const;
  void keep_sums(const Scores& scores, const Choice& choice);
  void check(const Choice& choice, int64_t window, const Numbers& entries) const;

  const Contract& contract_;
  const CachePolicy* policy_;
  Backend& backend_;
  const Tensors& caches_;
  OpenGraph graph_;
  std::vector<size_t> of_layer_;
  int64_t most_ = 0;  // the largest capacity
  double share_ = 1;
  int64_t every_ = 0, steps_ = 0;  // decode steps since the last question
  Numbers settled_;                // of every group, entries that were there after the last round
  std::vector<float> sums_;        // of the scores of all steps, [L, Z, most]
};

}  // namespace vlmtrim
