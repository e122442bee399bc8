#include "session.hpp"

#include <algorithm>
#include <chrono>
#include <cmath>
#include <numeric>

#include "core/error.hpp"
#include "looking_ahead.hpp"

namespace vlmtrim {
namespace {

double seconds() { return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count(); }

std::vector<int64_t> counted(int64_t count) {
  std::vector<int64_t> numbers(static_cast<size_t>(count));
  std::iota(numbers.begin(), numbers.end(), 0);
  return numbers;
}

}  // namespace

std::vector<int64_t> Prefill::visual_kept_by_layer() const {
  std::vector<int64_t> counts;
  for (const auto& layer : *kept_by_layer) {
    std::vector<int64_t> both;
    std::set_intersection(layer.begin(), layer.end(), visual_positions.begin(), visual_positions.end(),
                          std::back_inserter(both));
    counts.push_back(static_cast<int64_t>(both.size()));
  }
  return counts;
}

std::vector<double> Prefill::visual_held_by_layer() const {
  std::vector<double> counts;
  for (const auto& sets : *held) {
    double sum = 0;
    for (const auto& tokens : sets) {
      std::vector<int64_t> both;
      std::set_intersection(tokens.begin(), tokens.end(), visual_positions.begin(), visual_positions.end(),
                            std::back_inserter(both));
      sum += static_cast<double>(both.size());
    }
    counts.push_back(sum / static_cast<double>(sets.size()));
  }
  return counts;
}

Session::Session(std::shared_ptr<Model> model) : model_(std::move(model)) {
  const GraphSpec& decoder = contract().graph("decoder");
  features_ = contract().feature_width();
  vocabulary_ = decoder.output("logits")->shape.back().size;
  selects_ = decoder.input("visual_positions") != nullptr;
  sees_ahead_ = decoder.input(kLastSeen) != nullptr;
  attention_ = std::make_unique<Attention>(contract());
  for (const auto& group : contract().groups) chooses_ |= group.chooses;
  caches_ = model_->backend().make_caches(contract());
  graph("decoder").bind_caches(caches_);
  caching_ = std::make_unique<Caching>(contract(), model_->backend(), caches_,
                                       [this](const std::string& name) -> Graph& { return graph(name); });
  reset();
}

void Session::reset() {
  position_ = 0;
  entries_.assign(contract().groups.size(), 0);
  times_ = {};
  caching_->reset();
  attention_->forget();
  crossing_ = contract().crosses() ? std::make_unique<Crossing>(contract(), model_->processor()) : nullptr;
}

Prefill Session::prefill(const std::vector<int64_t>& ids, const Pictures* pictures, const std::vector<float>* guide) {
  Prefill done;
  done.visual_positions = visual_positions(ids);
  const auto marks = static_cast<int64_t>(done.visual_positions.size());
  int64_t brought = 0;
  if (pictures != nullptr) brought = std::accumulate(pictures->tokens.begin(), pictures->tokens.end(), int64_t{0});
  if (marks != brought) {
    throw Refusal(said("the prompt holds ", marks, " image tokens, ", pictures != nullptr ? pictures->tokens.size() : 0,
                       " image(s) bring ", brought));
  }
  const auto tokens = static_cast<int64_t>(ids.size());
  done.visual = visual_of(pictures);
  Tensors given = guide_scores(guide, marks);
  check_room(tokens, done.visual);
  const double start = seconds();
  Tensor features = no_features();
  if (pictures != nullptr) {
    Tensors seen = encode(*pictures, done.visual);
    features = seen.at("image_features");
    if (contract().guide == Guide::kVision) given["guide_scores"] = seen.at("visual_attention");
  }
  const double middle = seconds();
  const std::vector<int64_t> watched = caching_->rows(tokens, done.visual_positions), before = entries_;
  caching_->feed(given, watched);
  Step found = step(ids, done.visual_positions, features, pictures, given, false);
  Backend& backend = model_->backend();
  done.logits = floats_of(backend.to_host(found.outputs.at("logits")));
  done.kept = contract().groups.back().length(done.visual, done.visual);
  if (chooses_) {
    done.kept_by_layer = kept_by_layer(found.outputs, tokens, done.visual);
    double sum = 0;
    for (const auto& layer : *done.kept_by_layer) sum += static_cast<double>(layer.size());
    const double mean = sum / static_cast<double>(done.kept_by_layer->size());
    done.kept = static_cast<int64_t>(std::nearbyint(mean - static_cast<double>(tokens - done.visual)));
  } else if (selects_) {
    done.kept_indices = integers_of(backend.to_host(found.outputs.at("kept_indices")));
    const int64_t promised = contract().groups.back().length(tokens, done.visual);
    if (static_cast<int64_t>(done.kept_indices->size()) != promised) {
      throw Refusal(said("the decoder kept ", done.kept_indices->size(), " of ", tokens, " tokens (", done.visual,
                         " visual), its contract promises ", promised, "; export the model again"));
    }
    done.visual_scores = floats_of(backend.to_host(found.outputs.at("visual_scores")));
  }
  if (found.kept_features) done.kept = static_cast<int64_t>(found.kept_features->size());
  done.kept_features = std::move(found.kept_features);
  times_.vision += middle - start;
  times_.prefill += seconds() - middle;
  if (caching_->on()) cut(done, found, watched, tokens, before);
  return done;
}

// Cuts the caches behind a question. What each group took of it: all, what the selection keeps, or its layer's choice.
void Session::cut(Prefill& done, const Step& found, const std::vector<int64_t>& rows, int64_t tokens,
                  const std::vector<int64_t>& before) {
  const double start = seconds();
  std::vector<std::vector<int64_t>> taken;
  for (const auto& group : contract().groups) {
    if (done.kept_by_layer) {
      taken.push_back(done.kept_by_layer->at(static_cast<size_t>(group.layers[0])));
    } else {
      taken.push_back(done.kept_indices && group.removed > 0 ? *done.kept_indices : counted(tokens));
    }
  }
  Round left = caching_->after(found.outputs, rows, done.visual_positions, taken, before);
  entries_ = std::move(left.entries);
  done.held = std::move(left.held);
  times_.caches += seconds() - start;
}

std::vector<float> Session::decode(int64_t token) {
  const double start = seconds();
  Tensors given = guide_scores(nullptr, 0);
  const std::vector<int64_t> rows = caching_->decode_rows(), before = entries_;
  caching_->feed(given, rows);
  Step found = step({token}, {}, no_features(), nullptr, given, true);
  std::vector<float> logits = floats_of(model_->backend().to_host(found.outputs.at("logits")));
  entries_ = caching_->grown(found.outputs, rows, before, entries_);
  times_.decode += seconds() - start;
  ++times_.steps;
  return logits;
}

int64_t Session::room() const {
  int64_t room = INT64_MAX;
  for (size_t i = 0; i < entries_.size(); ++i) {
    const CacheGroup& group = contract().groups[i];
    if (!group.of_images) room = std::min(room, group.capacity - entries_[i]);
  }
  return room;
}

Graph& Session::graph(const std::string& name) {
  auto& graph = graphs_[name];
  if (!graph) graph = model_->graph(name);
  return *graph;
}

std::vector<int64_t> Session::visual_positions(const std::vector<int64_t>& ids) const {
  if (ids.empty()) throw Refusal("the prompt is empty; give at least one token");
  std::vector<int64_t> positions;
  for (size_t i = 0; i < ids.size(); ++i) {
    if (ids[i] == contract().image_token_id) {
      positions.push_back(static_cast<int64_t>(i));
    } else if (ids[i] < 0 || ids[i] >= vocabulary_) {
      throw Refusal(said("the prompt holds token ", ids[i], ", the model has ", vocabulary_,
                         "; its tokenizer.json is of another model"));
    }
  }
  return positions;
}

int64_t Session::visual_of(const Pictures* pictures) const {
  if (pictures == nullptr) return 0;
  if (contract().crosses()) return static_cast<int64_t>(pictures->tokens.size()) * contract().image_tokens;
  return std::accumulate(pictures->tokens.begin(), pictures->tokens.end(), int64_t{0});
}

// Features [1, N, D], and what the vision tower looks at where that ranks the visual tokens, [1, N].
Tensors Session::encode(const Pictures& pictures, int64_t visual) {
  Tensors feeds;
  for (const auto& [name, value] : pictures.inputs) {
    feeds[name] = value.dtype == DType::kFloat32 ? cast(value, contract().dtype) : value;
  }
  Tensors outputs = graph("vision").run(feeds);
  Tensors seen{{"image_features", outputs.at("image_features").reshaped({1, visual, features_})}};
  if (contract().guide == Guide::kVision) {
    seen["visual_attention"] = outputs.at("visual_attention").reshaped({1, visual});
  }
  return seen;
}

void Session::check_room(int64_t tokens, int64_t visual) const {
  for (size_t i = 0; i < entries_.size(); ++i) {
    const CacheGroup& group = contract().groups[i];
    const int64_t brings = group.length(tokens, visual);
    if (entries_[i] + brings <= group.capacity) continue;
    if (group.of_images) {
      const int64_t each = contract().image_tokens;
      throw Refusal(said(visual / each, " picture(s) of ", each, " features bring up to ", brings,
                         " entries, the caches of the cross-attention layers hold ", entries_[i], " of at most ",
                         group.capacity, ": give fewer pictures, ", entries_[i] > 0 ? "reset the conversation, " : "",
                         "or export with more --images"));
    }
    throw Refusal(said("the prompt has ", tokens, " tokens (", visual, " visual), ", entries_[i],
                       " are in the caches; layers ", group.layers.front(), "-", group.layers.back(), " would hold ",
                       entries_[i] + brings, ", their capacity is ", group.capacity,
                       ": shorten the prompt, reset the conversation, or export with a larger --max-seq-len"));
  }
}

Tensors Session::guide_scores(const std::vector<float>* guide, int64_t visual) const {
  if (contract().guide != Guide::kBundle) {
    if (guide != nullptr) {
      throw Refusal("scores of a guide are given, and this bundle ranks by its own; leave guide out");
    }
    if (contract().guide == Guide::kNone) return {};
    return {{"guide_scores", Tensor::zeros(DType::kFloat32, {1, 0})}};
  }
  if (guide == nullptr && visual > 0) {
    throw Refusal("this bundle ranks visual tokens by scores of another bundle, and none are given: give guide");
  }
  const std::vector<float> scores = guide != nullptr ? *guide : std::vector<float>{};
  const bool finite = std::all_of(scores.begin(), scores.end(), [](float score) { return std::isfinite(score); });
  if (!finite || static_cast<int64_t>(scores.size()) != visual) {
    throw Refusal(
        said("guide has ", scores.size(), " scores; give finite ones, one of each of the ", visual, " visual tokens"));
  }
  return {{"guide_scores", Tensor::of(scores, {1, visual})}};
}

Session::Step Session::step(const std::vector<int64_t>& ids, const std::vector<int64_t>& visual_positions,
                            const Tensor& features, const Pictures* pictures, const Tensors& given, bool decodes) {
  const auto tokens = static_cast<int64_t>(ids.size()), marks = static_cast<int64_t>(visual_positions.size());
  const int64_t visual = visual_of(pictures);
  const Positions positions = model_->processor().positions(ids, position_, pictures);
  const Tensor where = Tensor::of(visual_positions, {1, marks});
  Tensors embedded{{"input_ids", Tensor::of(ids, {1, tokens})}};
  if (!crossing_) embedded.insert({{"image_features", features}, {"visual_positions", where}});
  Tensors feeds = given;
  feeds.merge(graph("embed").run(embedded));
  feeds["position_ids"] = positions.ids;
  feeds["last_index"] = Tensor::of(std::vector<int64_t>{tokens - 1}, {1});
  feeds.merge(attention_->feeds(tokens, visual_positions));
  if (selects_) feeds["visual_positions"] = where;
  if (sees_ahead_) feeds[kLastSeen] = Tensor::of(last_seen(tokens, visual_positions), {1, tokens});
  const std::vector<int64_t> windows = feed_places(feeds, tokens, visual, decodes);
  if (crossing_) {
    feeds["image_features"] = features;
    feeds.merge(crossing_->feeds(ids, pictures, windows));
  }
  Step done{graph("decoder").run(feeds), std::nullopt};
  attention_->took(done.outputs, model_->backend(), visual_positions, entries_[0]);
  if (crossing_) done.kept_features = crossing_->took(done.outputs, model_->backend(), entries_);
  const std::vector<int64_t> added = grown(done.outputs, tokens, visual, done.kept_features);
  for (size_t i = 0; i < entries_.size(); ++i) entries_[i] += added[i];
  position_ = positions.after;
  return done;
}

// Where the step's tokens go in every group, and what they see; returns the live windows.
std::vector<int64_t> Session::feed_places(Tensors& feeds, int64_t tokens, int64_t visual, bool decodes) const {
  std::vector<int64_t> windows;
  for (size_t i = 0; i < entries_.size(); ++i) {
    const CacheGroup& group = contract().groups[i];
    const int64_t length = std::max<int64_t>(1, entries_[i] + group.length(tokens, visual));
    windows.push_back(model_->backend().window(length, group.capacity));
    const WritePlace place = caching_->place(i, entries_[i], decodes);
    feeds[said("write_indices.", i)] = Tensor::of(std::vector<int64_t>{place.slot}, {1});
    if (caching_->rings()) feeds[said("query_limits.", i)] = Tensor::of(std::vector<int64_t>{place.limit}, {1});
    if (!group.of_images) feeds[said("key_positions.", i)] = Tensor::of(counted(windows[i]), {windows[i]});
  }
  return windows;
}

// Entries that a step added to each group: what the contract says, or what the graph returned.
std::vector<int64_t> Session::grown(const Tensors& outputs, int64_t tokens, int64_t visual,
                                    const std::optional<std::vector<int64_t>>& kept_features) const {
  std::vector<int64_t> added;
  for (size_t i = 0; i < entries_.size(); ++i) {
    const CacheGroup& group = contract().groups[i];
    if (group.of_images) {
      added.push_back(static_cast<int64_t>(kept_features->size()));
    } else if (group.chooses) {
      added.push_back(tokens - visual + chosen(outputs, i, visual));
    } else {
      added.push_back(group.length(tokens, visual));
    }
  }
  return added;
}

// Visual tokens that a choosing group kept.
int64_t Session::chosen(const Tensors& outputs, size_t group, int64_t visual) const {
  if (visual == 0) return 0;
  const int64_t kept = integers_of(model_->backend().to_host(outputs.at(said("kept_counts.", group)))).at(0);
  const CacheGroup& chooser = contract().groups[group];
  const int64_t most = chooser.length(visual, visual);
  if (kept < 0 || kept > most) {
    throw Refusal(said("layer ", chooser.layers[0], " kept ", kept, " of ", visual,
                       " visual tokens, its contract promises at most ", most, "; export the model again"));
  }
  return kept;
}

std::vector<std::vector<int64_t>> Session::kept_by_layer(const Tensors& outputs, int64_t tokens, int64_t visual) const {
  std::map<int64_t, std::vector<int64_t>> layers;
  for (size_t i = 0; i < contract().groups.size(); ++i) {
    const CacheGroup& group = contract().groups[i];
    std::vector<int64_t> kept = counted(tokens);
    if (group.chooses && visual > 0) {
      kept = integers_of(model_->backend().to_host(outputs.at(said("kept_indices.", i))));
      const int64_t count = tokens - visual + chosen(outputs, i, visual);
      kept.resize(static_cast<size_t>(std::min<int64_t>(count, static_cast<int64_t>(kept.size()))));
    }
    for (const int64_t layer : group.layers) layers[layer] = kept;
  }
  std::vector<std::vector<int64_t>> found;
  for (auto& [layer, kept] : layers) found.push_back(std::move(kept));
  return found;
}

Tensor Session::no_features() const { return Tensor::zeros(contract().dtype, {1, 0, features_}); }

}  // namespace vlmtrim
