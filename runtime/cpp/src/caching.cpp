#include "caching.hpp"

#include <algorithm>
#include <cmath>
#include <numeric>

#include "core/error.hpp"
#include "sampling.hpp"

namespace vlmtrim {
namespace {

// In key_kinds: no entry (yet); one that stays whatever it scores; one that is judged; and one that is judged with them
// and adds nothing to what may stay.
constexpr int64_t kNone = -1, kStays = 0, kCandidate = 1, kFresh = 2;

bool holds(const std::vector<int64_t>& ascending, int64_t value) {
  return std::binary_search(ascending.begin(), ascending.end(), value);
}

// Where the tokens at `rows` are in a group's caches; -1 for one that they did not take.
std::vector<int64_t> slots_of(const std::vector<int64_t>& rows, const std::vector<int64_t>& taken, int64_t before) {
  std::vector<int64_t> slots;
  for (const int64_t row : rows) {
    const auto place = std::lower_bound(taken.begin(), taken.end(), row);
    slots.push_back(place != taken.end() && *place == row ? before + (place - taken.begin()) : -1);
  }
  return slots;
}

}  // namespace

Caching::Caching(const Contract& contract, Backend& backend, const Tensors& caches, OpenGraph graph)
    : contract_(contract),
      policy_(contract.cache ? &*contract.cache : nullptr),
      backend_(backend),
      caches_(caches),
      graph_(std::move(graph)),
      of_layer_(contract.groups_of_layers()) {
  for (const auto& group : contract.groups) most_ = std::max(most_, group.capacity);
  if (policy_ == nullptr) return;
  share_ = policy_->share;
  every_ = policy_->every;
}

void Caching::reset() {
  sums_.clear();
  settled_.clear();
  steps_ = 0;
}

void Caching::set_share(double share) {
  if (policy_ == nullptr) {
    throw Refusal("the bundle has no cache policy; leave the share out, or export with --cache POLICY");
  }
  if (!(share >= 0 && share <= 1)) throw Refusal(said("the share of the caches is ", share, "; give 0 to 1"));
  share_ = share;
}

void Caching::set_every(int64_t every) {
  if (policy_ == nullptr || policy_->every == 0) {
    throw Refusal("the bundle's caches are not cut while an answer grows; export with --cache keyformer or scope");
  }
  if (every < 1) throw Refusal(said("decode steps between two rounds are ", every, "; give 1 or more"));
  every_ = every;
}

Caching::Numbers Caching::rows(int64_t tokens, const Numbers& visual_positions) const {
  if (policy_ == nullptr || policy_->candidates == Candidates::kSaid) return {};
  if (policy_->candidates != Candidates::kAll && visual_positions.empty()) return {};
  Numbers chosen;
  if (policy_->rows == ScoreRows::kProbe) {
    const int64_t number = std::min(policy_->count, tokens);
    for (int64_t i = 0; i < number; ++i) chosen.push_back((i + 1) * tokens / number - 1);
    return chosen;
  }
  const bool behind = policy_->rows == ScoreRows::kText && !visual_positions.empty();
  const int64_t first = behind ? std::min(visual_positions.back() + 1, tokens - 1) : 0;
  const auto part = static_cast<int64_t>(policy_->part * static_cast<double>(tokens));
  const int64_t number = std::min({policy_->count, tokens - first, std::max<int64_t>(1, part)});
  chosen.resize(static_cast<size_t>(number));
  std::iota(chosen.begin(), chosen.end(), tokens - number);
  return chosen;
}

Caching::Numbers Caching::decode_rows() const {
  if (policy_ == nullptr || every_ == 0) return {};
  return policy_->accumulates || (steps_ + 1) % every_ == 0 ? Numbers{0} : Numbers{};
}

void Caching::feed(Tensors& feeds, const Numbers& rows) const {
  if (policy_ != nullptr) feeds["score_rows"] = Tensor::of(rows, {1, static_cast<int64_t>(rows.size())});
}

WritePlace Caching::place(size_t group, int64_t entries, bool decodes) const {
  if (!rings() || !decodes || settled_.empty()) return {entries, entries};
  const int64_t length = std::min(policy_->ring, settled_[group]);
  return {settled_[group] - length + steps_ % std::max<int64_t>(length, 1), entries - 1};
}

Round Caching::after(const Tensors& outputs, const Numbers& rows, const Numbers& visual_positions,
                     const std::vector<Numbers>& taken, const Numbers& before) {
  steps_ = 0;
  Numbers entries = before;
  for (size_t i = 0; i < entries.size(); ++i) entries[i] += static_cast<int64_t>(taken[i].size());
  const bool all = policy_->candidates == Candidates::kAll;
  if (policy_->candidates == Candidates::kSaid || (!all && visual_positions.empty())) {
    settled_ = entries;
    return {entries, std::nullopt};
  }
  const int64_t wide = window(entries);
  std::vector<Numbers> kinds, slots;
  for (size_t i = 0; i < entries.size(); ++i) {
    kinds.push_back(this->kinds(taken[i], before[i], visual_positions, wide));
    slots.push_back(slots_of(rows, taken[i], before[i]));
  }
  const Choice choice = cut(scores(outputs, slots, kinds, wide), kinds, entries, share_);
  settled_ = of_groups(choice);
  if (all) return {settled_, std::nullopt};
  Held held;
  for (size_t layer = 0; layer < of_layer_.size(); ++layer) {
    const size_t group = of_layer_[layer];
    auto& sets = held.emplace_back();
    for (int64_t x = 0; x < choice.sets; ++x) {  // what was there before the step stays, in front
      const auto row = choice.order.begin() + (static_cast<int64_t>(layer) * choice.sets + x) * wide;
      auto& tokens = sets.emplace_back();
      for (int64_t i = before[group]; i < choice.counts[layer]; ++i) {
        const int64_t place = row[i] - before[group];
        if (place < 0) throw Refusal("the cache policy drops entries that stay; export the model again");
        tokens.push_back(taken[group][static_cast<size_t>(place)]);
      }
    }
  }
  return {settled_, std::move(held)};
}

Caching::Numbers Caching::grown(const Tensors& outputs, const Numbers& rows, const Numbers& before,
                                const Numbers& entries) {
  ++steps_;
  if (rings()) return before;
  if (policy_ == nullptr || every_ == 0 || rows.empty()) return entries;
  const bool due = steps_ % every_ == 0, said_alone = policy_->candidates == Candidates::kSaid;
  const int64_t wide = window(entries);
  std::vector<Numbers> kinds, slots;
  for (size_t i = 0; i < entries.size(); ++i) {
    const int64_t settled = settled_.empty() ? 0 : settled_[i];
    auto& group = kinds.emplace_back(static_cast<size_t>(wide), kNone);
    for (int64_t slot = 0; slot < std::min(entries[i], wide); ++slot) {
      const bool old = slot < settled;
      group[static_cast<size_t>(slot)] = said_alone ? (old ? kStays : kCandidate) : (old ? kCandidate : kFresh);
    }
    slots.push_back({before[i]});
  }
  const Scores scored = scores(outputs, slots, kinds, wide);
  if (!due) return entries;
  const Choice choice = cut(scored, kinds, entries, 1.0);
  Numbers left = of_groups(choice);
  if (policy_->candidates == Candidates::kAll) settled_ = left;
  return left;
}

// Entries that stay in every group.
Caching::Numbers Caching::of_groups(const Choice& choice) const {
  Numbers counts;
  for (const auto& group : contract_.groups) counts.push_back(choice.counts[static_cast<size_t>(group.layers[0])]);
  return counts;
}

int64_t Caching::window(const Numbers& entries) const {
  return backend_.window(std::max<int64_t>(1, *std::max_element(entries.begin(), entries.end())), most_);
}

// Kinds of a group's entries, [W].
Caching::Numbers Caching::kinds(const Numbers& taken, int64_t before, const Numbers& visual_positions,
                                int64_t window) const {
  Numbers kinds(static_cast<size_t>(window), kNone);
  const int64_t text = policy_->candidates == Candidates::kAll ? kCandidate : kStays;
  std::fill_n(kinds.begin(), before, text);
  for (size_t i = 0; i < taken.size(); ++i) {
    kinds[static_cast<size_t>(before) + i] = holds(visual_positions, taken[i]) ? kCandidate : text;
  }
  return kinds;
}

// Scores of this step, or of all so far; `slots` are where the rows are in every group's caches, `kinds` what they
// hold.
Caching::Scores Caching::scores(const Tensors& outputs, const std::vector<Numbers>& slots,
                                const std::vector<Numbers>& kinds, int64_t window) {
  Scores found;
  found.window = window;
  for (size_t layer = 0; layer < of_layer_.size(); ++layer) {
    const size_t group = of_layer_[layer];
    const Tensor own = score(outputs.at(said("score_queries.", layer)), layer, slots[group], kinds[group], window);
    const int64_t maps = own.shape.at(1), width = own.shape.at(2);
    found.maps = maps;
    for (int64_t z = 0; z < maps; ++z) {
      const auto* row = own.as<float>() + z * width;
      found.values.insert(found.values.end(), row, row + width);
      found.values.resize(found.values.size() + static_cast<size_t>(window - width), 0);
    }
  }
  if (policy_->accumulates) add_up(found);
  return found;
}

Tensor Caching::score(const Tensor& queries, size_t layer, const Numbers& slots, const Numbers& kinds,
                      int64_t window) const {
  const int64_t own = std::min(window, contract_.groups[of_layer_[layer]].capacity);
  Tensors feeds{{"score_queries", queries},
                {"row_slots", Tensor::of(slots, {1, static_cast<int64_t>(slots.size())})},
                {"key_kinds", Tensor::of(Numbers(kinds.begin(), kinds.begin() + own), {1, own})},
                {"past_key_values.key", caches_.at(past_name(static_cast<int64_t>(layer), "key"))}};
  add_noise(feeds, own);
  return backend_.to_host(graph_("score").run(feeds).at("key_scores"));
}

// What a policy that draws adds to the logits of this step: the same for all layers and heads. As numpy's
// default_rng([seed, steps]).gumbel draws it.
void Caching::add_noise(Tensors& feeds, int64_t window) const {
  if (!policy_->seed) return;
  Pcg64 generator(static_cast<uint64_t>(*policy_->seed) | static_cast<uint64_t>(steps_) << 32);
  std::vector<float> drawn;
  while (static_cast<int64_t>(drawn.size()) < window) {
    const double uniform = 1.0 - generator.uniform();
    if (uniform < 1) drawn.push_back(static_cast<float>(-std::log(-std::log(uniform))));
  }
  feeds["key_noise"] = Tensor::of(drawn, {1, window});
  const auto [first, rise] = policy_->temperatures;
  feeds["temperature"] =
      Tensor::of(std::vector<float>{static_cast<float>(first + rise * static_cast<double>(steps_))}, {});
}

void Caching::add_up(Scores& scores) {
  const size_t lines = scores.values.size() / static_cast<size_t>(scores.window);
  const auto wide = static_cast<size_t>(scores.window), most = static_cast<size_t>(most_);
  sums_.resize(lines * most, 0);
  for (size_t line = 0; line < lines; ++line) {
    for (size_t i = 0; i < wide; ++i)
      scores.values[line * wide + i] = sums_[line * most + i] += scores.values[line * wide + i];
  }
}

// Lets the policy choose by scores and kinds of the groups, and compacts every layer.
Caching::Choice Caching::cut(const Scores& scores, const std::vector<Numbers>& kinds, const Numbers& entries,
                             double share) {
  const auto layers = static_cast<int64_t>(of_layer_.size());
  Numbers by_layer;
  for (const size_t group : of_layer_) by_layer.insert(by_layer.end(), kinds[group].begin(), kinds[group].end());
  const Tensors chosen =
      graph_("policy").run({{"key_scores", Tensor::of(scores.values, {layers, 1, scores.maps, scores.window})},
                            {"key_kinds", Tensor::of(by_layer, {layers, 1, scores.window})},
                            {"share", Tensor::of(std::vector<float>{static_cast<float>(share)}, {})}});
  Choice choice;
  choice.sets = chosen.at("order").shape.at(2);
  choice.order = integers_of(backend_.to_host(chosen.at("order")));
  choice.counts = integers_of(backend_.to_host(chosen.at("counts")));
  check(choice, scores.window, entries);
  for (size_t layer = 0; layer < of_layer_.size(); ++layer) {
    const size_t group = of_layer_[layer];
    if (choice.counts[layer] < entries[group]) compact(layer, choice, scores.window, kinds[group]);
  }
  if (!sums_.empty()) keep_sums(scores, choice);
  return choice;
}

void Caching::compact(size_t layer, const Choice& choice, int64_t window, const Numbers& kinds) const {
  const size_t group = of_layer_[layer];
  const int64_t capacity = contract_.groups[group].capacity;
  const int64_t most = std::max<int64_t>(1, choice.counts[layer]);
  Numbers order;
  for (int64_t x = 0; x < choice.sets; ++x) {
    const auto row = choice.order.begin() + (static_cast<int64_t>(layer) * choice.sets + x) * window;
    std::transform(row, row + most, std::back_inserter(order),
                   [&](int64_t slot) { return std::min(slot, capacity - 1); });
  }
  Graph& graph = graph_(policy_->compacts[group]);
  Tensors bound, feeds{{"order", Tensor::of(order, {1, choice.sets, most})}};
  if (graph.spec().input("counts") != nullptr) {
    const int64_t own = std::min(window, capacity);
    feeds["counts"] = Tensor::of(Numbers{choice.counts[layer]}, {1});
    feeds["key_kinds"] = Tensor::of(Numbers(kinds.begin(), kinds.begin() + own), {1, own});
  }
  for (const char* kind : {"key", "value"}) {
    bound[said("past_key_values.", kind)] = caches_.at(past_name(static_cast<int64_t>(layer), kind));
  }
  graph.bind_caches(bound);
  graph.run(feeds);
}

// The sums go where their entries went.
void Caching::keep_sums(const Scores& scores, const Choice& choice) {
  const auto most = static_cast<size_t>(most_), wide = static_cast<size_t>(scores.window);
  const auto maps = static_cast<size_t>(scores.maps), sets = static_cast<size_t>(choice.sets);
  for (size_t layer = 0; layer < of_layer_.size(); ++layer) {
    for (size_t z = 0; z < maps; ++z) {
      const int64_t* order = choice.order.data() + (layer * sets + std::min(z, sets - 1)) * wide;
      float* sums = sums_.data() + (layer * maps + z) * most;
      std::fill_n(sums, most, 0.0F);
      for (size_t i = 0; i < static_cast<size_t>(choice.counts[layer]); ++i) {
        sums[i] = scores.values[(layer * maps + z) * wide + static_cast<size_t>(order[i])];
      }
    }
  }
}

// Refuses a policy that keeps what is not there: the caches' lengths would lie.
void Caching::check(const Choice& choice, int64_t window, const Numbers& entries) const {
  for (size_t layer = 0; layer < of_layer_.size(); ++layer) {
    const int64_t filled = entries[of_layer_[layer]], count = choice.counts[layer];
    if (count < 0 || count > filled || count > window) {
      throw Refusal(said("the cache policy keeps ", count, " entries of ", filled, "; export the model again"));
    }
    for (int64_t x = 0; x < choice.sets; ++x) {
      const auto row = choice.order.begin() + (static_cast<int64_t>(layer) * choice.sets + x) * window;
      if (std::any_of(row, row + count, [&](int64_t slot) { return slot < 0 || slot >= filled; })) {
        throw Refusal("the cache policy names entries that the caches do not hold; export the model again");
      }
    }
  }
}

}  // namespace vlmtrim
