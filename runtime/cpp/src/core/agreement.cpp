// Holds the parts of a contract against each other. Mirrors graphs/agreement.py.
#include <algorithm>

#include "core/contract.hpp"
#include "core/error.hpp"

namespace vlmtrim {
namespace {

const char* const kWhole[] = {"vision", "embed", "decoder"};

// What is wrong; caught in check_agreement, which adds the file's name.
struct Contradiction {
  std::string text;
};
template <class... Parts>
[[noreturn]] void contradict(const Parts&... parts) {
  throw Contradiction{said(parts...)};
}

// Size of a tensor's last dimension where it is fixed and above 0, else 0.
int64_t width(const TensorSpec* tensor) {
  if (tensor == nullptr || tensor->shape.empty() || !tensor->shape.back().name.empty()) return 0;
  return tensor->shape.back().size;
}

std::string chain_problem(const std::vector<const GraphSpec*>& chain, const GraphSpec& whole) {
  std::map<std::string, TensorSpec> produced;
  std::set<std::string> used, outside, returned;
  for (const auto& tensor : whole.inputs) outside.insert(tensor.name);
  for (const auto& tensor : whole.outputs) returned.insert(tensor.name);
  for (const GraphSpec* spec : chain) {
    for (const auto& tensor : spec->inputs) {
      const auto made = produced.find(tensor.name);
      const TensorSpec* source = made != produced.end() ? &made->second : whole.input(tensor.name);
      if (source == nullptr || *source != tensor) {
        return said(spec->file, ": no earlier graph and no input of ", whole.file, " provides ", said_of(tensor));
      }
      used.insert(tensor.name);
    }
    for (const auto& tensor : spec->outputs) {
      if (!produced.emplace(tensor.name, tensor).second) {
        return said(spec->file, ": ", tensor.name, " is returned by two graphs of the chain");
      }
    }
  }
  for (const auto& tensor : whole.outputs) {
    const auto made = produced.find(tensor.name);
    if (made == produced.end() || made->second != tensor)
      return said("no graph of the chain returns ", said_of(tensor));
  }
  for (const auto& name : outside) {
    if (used.count(name) == 0) return said("no graph of the chain reads ", name);
  }
  for (const auto& [name, tensor] : produced) {
    if (used.count(name) == 0 && returned.count(name) == 0) {
      return said(name, " is returned by a graph of the chain and read by none");
    }
  }
  return "";
}

void check_graphs(const Contract& c) {
  for (const char* name : kWhole) {
    if (c.graphs.count(name) == 0) contradict("graphs has no ", name);
  }
  std::set<std::string> files;
  for (const auto& [name, spec] : c.graphs) {
    const bool onnx = spec.file.size() > 5 && spec.file.compare(spec.file.size() - 5, 5, ".onnx") == 0;
    if (!is_plain_name(spec.file) || !onnx) {
      contradict("a graph lies in ", shown(spec.file), "; expected a plain name that ends in .onnx");
    }
    if (!files.insert(spec.file).second) contradict("two graphs lie in one file");
    for (const auto* tensors : {&spec.inputs, &spec.outputs}) {
      std::set<std::string> names;
      for (const auto& tensor : *tensors) {
        if (!names.insert(tensor.name).second) contradict("graphs.", name, " names a tensor twice");
      }
    }
  }
  for (const auto& [whole, pieces] : c.chains) {
    std::vector<const GraphSpec*> chain;
    for (const auto& piece : pieces) {
      const auto found = c.graphs.find(piece);
      if (found != c.graphs.end()) chain.push_back(&found->second);
    }
    const bool known = std::find(std::begin(kWhole), std::end(kWhole), whole) != std::end(kWhole);
    if (!known || pieces.empty() || chain.size() < pieces.size()) {
      contradict("chains.", whole, " names a graph that graphs does not have");
    }
    const std::string problem = chain_problem(chain, c.graph(whole));
    if (!problem.empty()) contradict("chains.", whole, ": ", problem);
  }
}

void check_groups(const Contract& c) {
  std::vector<int64_t> layers;
  bool filled = false, tokens = false;
  for (const auto& group : c.groups) {
    layers.insert(layers.end(), group.layers.begin(), group.layers.end());
    filled |= group.layers.empty();
    tokens |= !group.of_images;
  }
  std::sort(layers.begin(), layers.end());
  for (size_t i = 0; i < layers.size(); ++i) filled |= layers[i] != static_cast<int64_t>(i);
  if (layers.empty() || filled) contradict("groups do not hold every layer once");
  if (!tokens) contradict("no group is filled by tokens");
  const bool selects = c.graph("decoder").output("kept_indices") != nullptr;
  for (size_t i = 0; i < c.groups.size(); ++i) {
    const CacheGroup& group = c.groups[i];
    if (!group.of_images && group.capacity > c.max_seq_len) {
      contradict("groups[", i, "].capacity is ", group.capacity, ", max_seq_len ", c.max_seq_len);
    }
    if (group.removed > 0 && !selects) {
      contradict("groups[", i, "].removed is ", group.removed, ", and the decoder selects nothing");
    }
    if (group.chooses && (group.of_images || group.layers.size() > 1 || group.removed > 0)) {
      contradict("groups[", i, "] chooses and is not one layer that is filled by tokens");
    }
    if (group.most < 1 && !group.of_images && !group.chooses) {
      contradict("groups[", i, "].most is ", group.most, ", and it chooses nothing");
    }
    if (group.removed >= 1 || group.most <= 0) contradict("groups[", i, "] keeps nothing of a picture");
  }
}

void check_guide(const Contract& c) {
  const bool takes = c.graph("decoder").input("guide_scores") != nullptr;
  if (takes && c.guide == Guide::kNone) {
    contradict("the decoder takes guide_scores, and guide does not say who provides them");
  }
  if (c.graph("decoder").output("key_scores") != nullptr && (c.removes() || c.crosses())) {
    contradict("the decoder returns key_scores, and does not hold all visual tokens");
  }
  if (!takes && c.guide != Guide::kNone) contradict("guide is given, and the decoder takes no guide_scores");
}

// Heads of the queries that the decoder returns; 0 where it returns none.
int64_t query_heads(const Contract& c) {
  const TensorSpec* queries = c.graph("decoder").output("score_queries.0");
  return queries != nullptr && queries->shape.size() == 4 ? queries->shape[1].size : 0;
}

// The decoder's boundary follows from the groups and four numbers; those are read off it, the rest must match.
void check_decoder(const Contract& c) {
  const GraphSpec& spec = c.graph("decoder");
  const int64_t hidden = width(spec.input("inputs_embeds")), vocabulary = width(spec.output("logits"));
  const TensorSpec* positions = spec.input("position_ids");
  const bool several = positions != nullptr && positions->shape.size() == 3;
  if (hidden <= 0 || vocabulary <= 0 || (several && !positions->shape[0].name.empty())) {
    contradict("the decoder has no inputs_embeds, position_ids or logits of a fixed width");
  }
  const bool selects = spec.output("kept_indices") != nullptr || spec.output("kept_features") != nullptr;
  const int64_t axes = several ? positions->shape[0].size : 1;
  const GraphSpec expected =
      decoder_spec({c.dtype, hidden, vocabulary, selects, axes, c.guide != Guide::kNone,
                    spec.output("key_scores") != nullptr, query_heads(c), c.cache && c.cache->ring > 0,
                    width(spec.input(kDeepstack)) / hidden, spec.input(kLastSeen) != nullptr},
                   c.groups);
  const auto compare = [](const char* kind, const auto& found, const auto& wanted) {
    if (found.size() != wanted.size()) {
      contradict("the decoder has ", found.size(), " ", kind, "; its groups need ", wanted.size());
    }
    for (size_t i = 0; i < found.size(); ++i) {
      if (found[i] == wanted[i]) continue;
      contradict("the decoder has among its ", kind, " ", said_of(found[i]), " where its groups need ",
                 said_of(wanted[i]));
    }
  };
  compare("inputs", spec.inputs, expected.inputs);
  compare("outputs", spec.outputs, expected.outputs);
  for (const int64_t token : c.eos_token_ids) {
    if (token >= vocabulary) {
      contradict("eos_token_ids holds ", token, ", the decoder returns logits of ", vocabulary, " tokens");
    }
  }
}

// The boundaries of a cache policy's graphs follow from the groups and from three sizes, read off them.
void check_cache(const Contract& c) {
  const int64_t heads = query_heads(c);
  if (!c.cache) {
    if (heads > 0) contradict("the decoder returns score_queries, and no cache policy reads them");
    return;
  }
  const CachePolicy& policy = *c.cache;
  if (c.crosses() || heads == 0) {
    contradict("a cache policy needs visual tokens of the sequence, and score_queries of the decoder");
  }
  bool there = policy.compacts == compacts_of(c.groups);
  for (const auto& name : policy.graphs()) there = there && c.graphs.count(name) > 0;
  if (!there) contradict("graphs does not have what the cache policy runs");
  const TensorSpec *order = c.graph("policy").output("order"), *scores = c.graph("policy").input("key_scores");
  const auto sized = [](const TensorSpec* t) { return t != nullptr && t->shape.size() == 4 && t->shape[2].size > 0; };
  if (!sized(order) || !sized(scores)) contradict("the cache policy's graph has no key_scores or order of fixed sizes");
  const bool merges = c.graph(policy.compacts[0]).input("counts") != nullptr;
  const CacheShape shape{c.dtype, heads, order->shape[2].size, scores->shape[2].size, merges};
  for (const auto& [name, spec] : cache_specs(policy, c.groups, shape)) {
    if (!(c.graph(name) == spec)) contradict("graphs.", name, " is not what its cache policy needs");
  }
  const auto rows = c.dims.find("R");
  if (rows == c.dims.end() ? policy.count > 0 : rows->second != std::pair<int64_t, int64_t>(0, policy.count)) {
    contradict("dims.R is not 0 to the ", policy.count, " rows of the cache policy");
  }
}

void check_embed(const Contract& c) {
  const GraphSpec& spec = c.graph("embed");
  const Dim hidden(width(&c.graph("decoder").inputs[0]));
  std::vector<TensorSpec> wanted{{"input_ids", DType::kInt64, {"B", "S"}}};
  if (!c.crosses()) {
    wanted.push_back({"image_features", c.dtype, {"B", "N", c.feature_width()}});
    wanted.push_back({"visual_positions", DType::kInt64, {"B", "N"}});
  }
  const TensorSpec embeds{"inputs_embeds", c.dtype, {"B", "S", hidden}};
  std::vector<TensorSpec> returned{embeds};
  if (const TensorSpec* added = c.graph("decoder").input(kDeepstack)) returned.push_back(*added);
  bool same = spec.inputs.size() == wanted.size() && spec.outputs == returned;
  for (const auto& tensor : wanted) {
    const TensorSpec* found = spec.input(tensor.name);
    same = same && found != nullptr && *found == tensor;
  }
  if (same) return;
  const std::string more = returned.size() > 1 ? " and " + said_of(returned[1]) : "";
  contradict("the embedding does not turn token ids and image features into ", said_of(embeds), more);
}

void check_vision(const Contract& c) {
  const int64_t features = c.feature_width();
  const auto& outputs = c.graph("vision").outputs;
  const bool watches = c.guide == Guide::kVision;
  const TensorSpec seen{"visual_attention", DType::kFloat32, {"I", c.image_tokens}};
  const bool whole = !outputs.empty() && outputs[0].name == "image_features" && outputs[0].dtype == c.dtype &&
                     outputs.size() == (watches ? 2u : 1u) && (!watches || outputs[1] == seen);
  if (!whole) contradict("the vision graph must return image_features of ", name_of(c.dtype), " and what guide says");
  const auto& shape = outputs[0].shape;
  if (width(&outputs[0]) != features || (shape.size() != 2 && shape.size() != 3)) {
    contradict("the vision graph returns ", said_of(outputs[0]), ", the decoder takes features of width ", features);
  }
  if (shape.size() == 3 && !(shape[1] == Dim(c.image_tokens))) {
    contradict("the vision graph returns ", said_of(outputs[0]), ", image_tokens is ", c.image_tokens);
  }
}

void check_dims(const Contract& c) {
  const auto limits = [&](const std::string& name) -> const std::pair<int64_t, int64_t>* {
    const auto found = c.dims.find(name);
    return found == c.dims.end() ? nullptr : &found->second;
  };
  for (const auto& [name, range] : c.dims) {
    if (range.first > range.second) contradict("dims.", shown(name), " is ", range.first, " to ", range.second);
  }
  for (const auto& [name, spec] : c.graphs) {
    for (const auto& tensor : spec.inputs) {
      for (const auto& dim : tensor.shape) {
        if (!dim.name.empty() && limits(dim.name) == nullptr) {
          contradict("dims has no ", shown(dim.name), ", a size of ", shown(tensor.name), " in ", spec.file);
        }
      }
    }
  }
  using Range = std::pair<int64_t, int64_t>;
  for (size_t i = 0; i < c.groups.size(); ++i) {
    const Range* found = limits(said("W", i));
    if (found == nullptr || *found != Range(1, c.groups[i].capacity)) {
      contradict("dims.W", i, " is not 1 to the capacity of its group, ", c.groups[i].capacity);
    }
  }
  const Range *b = limits("B"), *s = limits("S"), *n = limits("N"), *r = limits("R");
  if (b == nullptr || b->first < 1 || s == nullptr || *s != Range(1, c.max_seq_len)) {
    contradict("dims.B must begin at 1, and dims.S be 1 to max_seq_len");
  }
  if (r != nullptr && r->first != 0) contradict("dims.R must begin at 0");
  if (n == nullptr || n->first != 0) contradict("dims.N must begin at 0");
  if (!c.crosses() && n->second > c.max_seq_len) {
    contradict("dims.N reaches ", n->second, ", a step has at most ", c.max_seq_len, " tokens");
  }
}

void check_pictures(const Contract& c) {
  const int64_t most = c.dims.at("N").second;
  if (c.image_tokens > most) {
    contradict("image_tokens is ", c.image_tokens, ", a step takes ", most, " visual tokens");
  }
  if (c.image_grid && c.image_grid->first * c.image_grid->second > c.image_tokens) {
    contradict("image_grid is [", c.image_grid->first, ", ", c.image_grid->second, "], a picture has ", c.image_tokens,
               " tokens");
  }
}

}  // namespace

void check_agreement(const Contract& contract, const std::string& where) {
  try {
    for (auto* rule : {check_graphs, check_groups, check_guide, check_decoder, check_cache, check_embed, check_vision,
                       check_dims, check_pictures}) {
      rule(contract);
    }
  } catch (const Contradiction& problem) {
    const bool is_long = problem.text.size() > 400;  // names in it are a stranger's
    throw BundleError(said(where, ": ", problem.text.substr(0, 400), is_long ? "..." : "", "; export the model again"));
  }
}

}  // namespace vlmtrim
