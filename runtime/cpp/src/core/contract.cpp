#include "core/contract.hpp"

#include <cmath>

#include "core/error.hpp"
#include "core/fields.hpp"

namespace vlmtrim {
namespace {

struct NamedType {
  DType dtype;
  const char* name;
  size_t bytes;
};
constexpr NamedType kTypes[] = {{DType::kFloat32, "float32", 4},   {DType::kFloat16, "float16", 2},
                                {DType::kBFloat16, "bfloat16", 2}, {DType::kInt64, "int64", 8},
                                {DType::kInt32, "int32", 4},       {DType::kBool, "bool", 1}};

int64_t size_of(const Json& value, const std::string& where) { return integer(value, where, 0, kLargestSize); }

DType dtype_of(Fields& fields, const char* name, size_t allowed) {
  std::vector<std::string> names;
  for (size_t i = 0; i < allowed; ++i) names.emplace_back(kTypes[i].name);
  return *dtype_named(fields.among(fields.need(name), name, names));
}

Dim dim_of(const Json& value, const std::string& where) {
  if (value.is_number_integer()) return Dim(size_of(value, where));
  return Dim(text_value(value, where));
}

TensorSpec tensor_of(const Json& value, const std::string& where) {
  Fields fields(value, where);
  TensorSpec tensor{text_value(fields.need("name"), fields.at("name")), dtype_of(fields, "dtype", std::size(kTypes)),
                    listed<Dim>(fields.need("shape"), fields.at("shape"), dim_of)};
  fields.finish();
  return tensor;
}

GraphSpec graph_of(const Json& value, const std::string& where) {
  Fields fields(value, where);
  GraphSpec graph{text_value(fields.need("file"), fields.at("file")),
                  listed<TensorSpec>(fields.need("inputs"), fields.at("inputs"), tensor_of),
                  listed<TensorSpec>(fields.need("outputs"), fields.at("outputs"), tensor_of)};
  fields.finish();
  return graph;
}

CacheGroup group_of(const Json& value, const std::string& where) {
  Fields fields(value, where);
  CacheGroup group;
  group.layers = listed<int64_t>(fields.need("layers"), fields.at("layers"), size_of);
  group.capacity = fields.whole("capacity", 1, kLargestSize);
  group.kv_heads = fields.whole("kv_heads", 1, kLargestSize);
  group.head_size = fields.whole("head_size", 1, kLargestSize);
  if (const Json* found = fields.may("removed")) group.removed = number(*found, fields.at("removed"), 0, 1);
  if (const Json* found = fields.may("source")) {
    group.of_images = fields.among(*found, "source", {"tokens", "images"}) == "images";
  }
  if (const Json* found = fields.may("most")) group.most = number(*found, fields.at("most"), 0, 1);
  if (const Json* found = fields.may("chooses")) group.chooses = boolean(*found, fields.at("chooses"));
  // Which layers read how few entries is the graph's doing; only reports count it.
  if (const Json* found = fields.may("sparse")) listed<int64_t>(*found, fields.at("sparse"), size_of);
  if (const Json* found = fields.may("attends")) integer(*found, fields.at("attends"), 0, kLargestSize);
  if (const Json* found = fields.may("window")) {
    if (integer(*found, fields.at("window"), 0, kLargestSize) > 0) {
      throw BundleError(said(fields.at("window"),
                             ": caches that hold a window alone are the Python runtime's; run the "
                             "bundle with run-vlm, or export without --max-input-len"));
    }
  }
  fields.finish();
  return group;
}

Packed packed_of(const Json& value, const std::string& where) {
  Fields fields(value, where);
  Packed packed;
  packed.part = fields.among(fields.need("part"), "part", {"tower", "layers", "head"});
  packed.format =
      fields.among(fields.need("format"), "format", {"fp8", "int4", "int4_sum", "int4_zero", "int8", "nvfp4", "w8a8"});
  packed.block = fields.whole("block", 0, 4096);
  packed.matrices = fields.whole("matrices", 1, kLargestSize);
  packed.weights = fields.whole("weights", 1, INT64_MAX);
  packed.nbytes = fields.whole("nbytes", 1, INT64_MAX);
  fields.finish();
  return packed;
}

std::pair<int64_t, int64_t> pair_of(const Json& value, const std::string& where, int64_t low) {
  if (!value.is_array() || value.size() != 2) {
    throw BundleError(said(where, " is ", shown(value), "; expected a list of 2 sizes"));
  }
  return {integer(value[0], where + "[0]", low, kLargestSize), integer(value[1], where + "[1]", low, kLargestSize)};
}

// What only reports read is checked all the same: a contract is whole or none.
void check_macs(const Json& value, const std::string& where) {
  Fields fields(value, where);
  for (const char* name : {"token", "pair", "logits"}) fields.whole(name, 0, INT64_MAX);
  if (const Json* found = fields.may("written")) integer(*found, fields.at("written"), 0, INT64_MAX);
  fields.finish();
}

bool given(const Json* value) { return value != nullptr && !value->is_null(); }

Contract decoded(const Json& raw, const std::string& where) {
  Fields fields(raw, where, true);
  Contract c;
  c.family = text_value(fields.need("family"), fields.at("family"));
  c.dtype = dtype_of(fields, "dtype", 3);
  c.graphs = mapped<GraphSpec>(fields.need("graphs"), fields.at("graphs"), graph_of);
  c.groups = listed<CacheGroup>(fields.need("groups"), fields.at("groups"), group_of);
  c.dims = mapped<std::pair<int64_t, int64_t>>(fields.need("dims"), fields.at("dims"),
                                               [](const Json& v, const std::string& w) { return pair_of(v, w, 0); });
  c.selection = fields.need("selection");
  if (!c.selection.is_null() && !c.selection.is_object()) {
    throw BundleError(said(fields.at("selection"), " is ", shown(c.selection), "; expected an object"));
  }
  c.max_seq_len = fields.whole("max_seq_len", 1, kLargestSize);
  c.images_assumed = fields.whole("images_assumed", 1, kLargestSize);
  c.image_tokens = fields.whole("image_tokens", 1, kLargestSize);
  c.image_token_id = fields.whole("image_token_id", 0, kLargestSize);
  c.eos_token_ids = listed<int64_t>(fields.need("eos_token_ids"), fields.at("eos_token_ids"), size_of);
  if (const Json* v = fields.may("image_grid"); given(v)) c.image_grid = pair_of(*v, fields.at("image_grid"), 1);
  if (const Json* v = fields.may("video_token_id"); given(v))
    c.video_token_id = size_of(*v, fields.at("video_token_id"));
  if (const Json* v = fields.may("chains")) {
    c.chains = mapped<std::vector<std::string>>(*v, fields.at("chains"), [](const Json& list, const std::string& w) {
      return listed<std::string>(list, w, [](const Json& one, const std::string& at) { return text_value(one, at); });
    });
  }
  if (const Json* v = fields.may("macs"); given(v)) check_macs(*v, fields.at("macs"));
  if (const Json* v = fields.may("guide"); given(v)) {
    c.guide = fields.among(*v, "guide", {"vision", "bundle"}) == "vision" ? Guide::kVision : Guide::kBundle;
  }
  if (const Json* v = fields.may("packed")) c.packed = listed<Packed>(*v, fields.at("packed"), packed_of);
  if (const Json* v = fields.may("cache"); given(v)) c.cache = CachePolicy::from_json(*v, fields.at("cache"));
  if (const Json* v = fields.may("schema")) size_of(*v, fields.at("schema"));
  if (const Json* v = fields.may("producer")) text_value(*v, fields.at("producer"));
  fields.finish();
  return c;
}

void add_caches(GraphSpec& spec, DType dtype, const CacheGroup& group) {
  const std::vector<Dim> shape{"B", group.kv_heads, group.capacity, group.head_size};
  for (const int64_t layer : group.layers) {
    for (const char* kind : {"key", "value"}) {
      spec.inputs.push_back({past_name(layer, kind), dtype, shape});
      spec.outputs.push_back({present_name(layer, kind), dtype, shape});
    }
  }
}

void add_queries(GraphSpec& spec, const DecoderShape& shape, const std::vector<CacheGroup>& groups) {
  if (shape.query_heads == 0) return;
  spec.inputs.push_back({"score_rows", DType::kInt64, {"B", "R"}});
  size_t layers = 0;
  for (const auto& group : groups) layers += group.layers.size();
  for (size_t layer = 0; layer < layers; ++layer) {
    spec.outputs.push_back(
        {said("score_queries.", layer), shape.dtype, {"B", shape.query_heads, "R", groups[0].head_size}});
  }
}

void add_selection(GraphSpec& spec, const DecoderShape& shape, const std::vector<CacheGroup>& groups, bool crosses) {
  bool chooses = false;
  for (const auto& group : groups) chooses |= group.chooses;
  if (crosses && shape.selects) {
    spec.outputs.push_back({"kept_features", DType::kInt64, {"B", "Nk"}});
    spec.outputs.push_back({"kept_counts", DType::kInt64, {"B"}});
  } else if (chooses) {
    spec.inputs.push_back({"visual_positions", DType::kInt64, {"B", "N"}});
    for (size_t i = 0; i < groups.size(); ++i) {
      if (!groups[i].chooses) continue;
      spec.outputs.push_back({said("kept_indices.", i), DType::kInt64, {"B", said("Sk", i)}});
      spec.outputs.push_back({said("kept_counts.", i), DType::kInt64, {"B"}});
    }
  } else if (shape.selects) {
    spec.inputs.push_back({"visual_positions", DType::kInt64, {"B", "N"}});
    if (shape.guided) spec.inputs.push_back({"guide_scores", DType::kFloat32, {"B", "N"}});
    spec.outputs.push_back({"kept_indices", DType::kInt64, {"B", "Sk"}});
    spec.outputs.push_back({"visual_scores", DType::kFloat32, {"B", "N"}});
  }
}

}  // namespace

const char* name_of(DType dtype) {
  for (const auto& type : kTypes) {
    if (type.dtype == dtype) return type.name;
  }
  return "unknown";
}

size_t bytes_of(DType dtype) {
  for (const auto& type : kTypes) {
    if (type.dtype == dtype) return type.bytes;
  }
  return 0;
}

std::optional<DType> dtype_named(const std::string& name) {
  for (const auto& type : kTypes) {
    if (name == type.name) return type.dtype;
  }
  return std::nullopt;
}

std::string said_of(const std::vector<Dim>& shape) {
  std::string list;
  for (const auto& dim : shape) list += (list.empty() ? "" : ", ") + (dim.name.empty() ? said(dim.size) : dim.name);
  return "[" + list + "]";
}

std::string said_of(const TensorSpec& tensor) {
  return said(tensor.name, " ", name_of(tensor.dtype), " ", said_of(tensor.shape));
}

const TensorSpec* GraphSpec::input(const std::string& name) const {
  for (const auto& tensor : inputs) {
    if (tensor.name == name) return &tensor;
  }
  return nullptr;
}

const TensorSpec* GraphSpec::output(const std::string& name) const {
  for (const auto& tensor : outputs) {
    if (tensor.name == name) return &tensor;
  }
  return nullptr;
}

int64_t kept_count(int64_t tokens, double removed) {
  return static_cast<int64_t>(std::nearbyint(static_cast<double>(tokens) * (1 - removed)));
}

int64_t most_features(int64_t features, double share) {
  return static_cast<int64_t>(static_cast<double>(features) * share + 1e-9);
}

int64_t CacheGroup::length(int64_t tokens, int64_t visual) const {
  if (of_images) return most_features(visual, most);
  return tokens - visual + (chooses ? most_features(visual, most) : kept_count(visual, removed));
}

int64_t CacheGroup::nbytes(int64_t batch, DType dtype) const {
  __int128 size = static_cast<__int128>(2) * static_cast<int64_t>(layers.size()) * batch * kv_heads;
  size *= static_cast<__int128>(capacity) * head_size * static_cast<int64_t>(bytes_of(dtype));
  return size > INT64_MAX ? INT64_MAX : static_cast<int64_t>(size);
}

bool Contract::removes() const {
  for (const auto& group : groups) {
    if (group.removed > 0 || group.most < 1 || group.chooses) return true;
  }
  return false;
}

bool Contract::crosses() const {
  for (const auto& group : groups) {
    if (group.of_images) return true;
  }
  return false;
}

int64_t Contract::feature_width() const {
  int64_t width = 0;
  for (const char* name : {"inputs_embeds", kDeepstack}) {
    const TensorSpec* input = graph("decoder").input(name);
    if (input != nullptr && !input->shape.empty()) width += input->shape.back().size;
  }
  return width;
}

std::vector<std::string> Contract::chain(const std::string& whole) const {
  const auto found = chains.find(whole);
  return found == chains.end() ? std::vector<std::string>{whole} : found->second;
}

std::vector<std::string> Contract::wholes() const {
  std::vector<std::string> names{"vision", "embed", "decoder"};
  if (cache) {
    for (const auto& name : cache->graphs()) names.push_back(name);
  }
  return names;
}

std::vector<size_t> Contract::groups_of_layers() const {
  std::map<int64_t, size_t> of;
  for (size_t i = 0; i < groups.size(); ++i) {
    for (const int64_t layer : groups[i].layers) of[layer] = i;
  }
  std::vector<size_t> found;
  for (const auto& [layer, group] : of) found.push_back(group);
  return found;
}

Contract Contract::from_json(const std::string& text, const std::string& where) {
  const Json raw = json_object(text, where);
  const auto schema = raw.find("schema");
  if (schema == raw.end() || *schema != kSchema) {
    throw BundleError(said(where, " has schema ", schema == raw.end() ? "null" : shown(*schema),
                           ", this vlmtrim reads schema ", kSchema,
                           ": export the model again, or install the vlmtrim that made the bundle"));
  }
  return decoded(raw, where);
}

std::string past_name(int64_t layer, const char* kind) { return said("past_key_values.", layer, ".", kind); }
std::string present_name(int64_t layer, const char* kind) { return said("present.", layer, ".", kind); }

GraphSpec decoder_spec(const DecoderShape& shape, const std::vector<CacheGroup>& groups) {
  GraphSpec spec{"decoder.onnx", {}, {}};
  bool crosses = false;
  for (const auto& group : groups) crosses |= group.of_images;
  spec.inputs.push_back({"inputs_embeds", shape.dtype, {"B", "S", shape.hidden}});
  const std::vector<Dim> plain{"B", "S"}, several{shape.position_axes, "B", "S"};
  spec.inputs.push_back({"position_ids", DType::kInt64, shape.position_axes == 1 ? plain : several});
  spec.inputs.push_back({"last_index", DType::kInt64, {"B"}});
  spec.outputs.push_back({"logits", shape.dtype, {"B", shape.vocabulary}});
  if (shape.emits) {
    spec.inputs.push_back({"score_rows", DType::kInt64, {"B", "R"}});
    spec.inputs.push_back({"score_weights", DType::kFloat32, {"B", "R"}});
    spec.outputs.push_back({"key_scores", DType::kFloat32, {"B", "W0"}});
  }
  if (crosses) {
    spec.inputs.push_back({"image_features", shape.dtype, {"B", "N", shape.hidden}});
    spec.inputs.push_back({"image_numbers", DType::kInt64, {"B", "N"}});
    spec.inputs.push_back({"seen_images", DType::kInt64, {"B", "S", 2}});
  }
  add_selection(spec, shape, groups, crosses);
  add_queries(spec, shape, groups);
  if (shape.deepstack > 0) {
    spec.inputs.push_back({kDeepstack, shape.dtype, {"B", "S", shape.deepstack * shape.hidden}});
  }
  if (shape.sees_ahead) spec.inputs.push_back({kLastSeen, DType::kInt64, plain});
  for (size_t i = 0; i < groups.size(); ++i) {
    spec.inputs.push_back({said("write_indices.", i), DType::kInt64, {"B"}});
    if (groups[i].of_images) {
      spec.inputs.push_back({said("key_images.", i), DType::kInt64, {"B", said("W", i)}});
    } else {
      spec.inputs.push_back({said("key_positions.", i), DType::kInt64, {said("W", i)}});
    }
    if (shape.rings) spec.inputs.push_back({said("query_limits.", i), DType::kInt64, {"B"}});
    add_caches(spec, shape.dtype, groups[i]);
  }
  return spec;
}

}  // namespace vlmtrim
