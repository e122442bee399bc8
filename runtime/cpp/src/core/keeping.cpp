// The record of a cache policy, and the boundary of its graphs. Mirrors graphs/keeping.py and boundary.py.
#include <algorithm>
#include <tuple>

#include "core/contract.hpp"
#include "core/fields.hpp"

namespace vlmtrim {

CachePolicy CachePolicy::from_json(const Json& value, const std::string& where) {
  Fields fields(value, where);
  CachePolicy made;
  made.policy = fields.need("policy");
  if (!made.policy.is_object()) {
    throw BundleError(said(fields.at("policy"), " is ", shown(made.policy), "; expected an object"));
  }
  const std::string rows = fields.among(fields.need("rows"), "rows", {"last", "text", "probe"});
  made.rows = rows == "last" ? ScoreRows::kLast : rows == "text" ? ScoreRows::kText : ScoreRows::kProbe;
  made.count = fields.whole("count", 0, kLargestSize);
  made.share = number(fields.need("share"), fields.at("share"), 0, 1);
  made.compacts = listed<std::string>(fields.need("compacts"), fields.at("compacts"),
                                      [](const Json& one, const std::string& at) { return text_value(one, at); });
  if (const Json* v = fields.may("part")) made.part = number(*v, fields.at("part"), 0, 1);
  if (const Json* v = fields.may("candidates")) {
    const std::string judged = fields.among(*v, "candidates", {"visual", "said", "all"});
    made.candidates = judged == "visual" ? Candidates::kVisual
                      : judged == "said" ? Candidates::kSaid
                                         : Candidates::kAll;
  }
  if (const Json* v = fields.may("every")) made.every = integer(*v, fields.at("every"), 0, kLargestSize);
  if (const Json* v = fields.may("accumulates")) made.accumulates = boolean(*v, fields.at("accumulates"));
  if (const Json* v = fields.may("ring")) made.ring = integer(*v, fields.at("ring"), 0, kLargestSize);
  if (const Json* v = fields.may("seed"); v != nullptr && !v->is_null()) {
    made.seed = integer(*v, fields.at("seed"), 0, kLargestSize);
  }
  if (const Json* v = fields.may("temperatures")) {
    const auto both = listed<double>(*v, fields.at("temperatures"),
                                     [](const Json& one, const std::string& at) { return number(one, at, 0, 1e6); });
    if (both.size() != 2) throw BundleError(said(fields.at("temperatures"), " is no list of 2 numbers"));
    made.temperatures = {both[0], both[1]};
  }
  fields.finish();
  return made;
}

std::vector<std::string> CachePolicy::graphs() const {
  std::vector<std::string> names{"score", "policy"};
  for (const auto& name : compacts) {
    if (std::find(names.begin(), names.end(), name) == names.end()) names.push_back(name);
  }
  return names;
}

std::vector<std::string> compacts_of(const std::vector<CacheGroup>& groups) {
  std::map<std::tuple<int64_t, int64_t, int64_t>, size_t> numbers;
  std::vector<std::string> names;
  for (const auto& group : groups) {
    const auto number = numbers.emplace(std::tuple(group.kv_heads, group.capacity, group.head_size), numbers.size());
    names.push_back(said("compact-", number.first->second));
  }
  return names;
}

std::map<std::string, GraphSpec> cache_specs(const CachePolicy& policy, const std::vector<CacheGroup>& groups,
                                             const CacheShape& shape) {
  const int64_t kv = groups[0].kv_heads, size = groups[0].head_size;
  int64_t layers = 0;
  for (const auto& group : groups) layers += static_cast<int64_t>(group.layers.size());
  std::map<std::string, GraphSpec> specs;
  GraphSpec& score = specs["score"];
  score.file = "score.onnx";
  score.inputs = {{"score_queries", shape.dtype, {"B", shape.heads, "R", size}},
                  {"row_slots", DType::kInt64, {"B", "R"}},
                  {"key_kinds", DType::kInt64, {"B", "W"}}};
  if (policy.seed) {
    score.inputs.push_back({"key_noise", DType::kFloat32, {"B", "W"}});
    score.inputs.push_back({"temperature", DType::kFloat32, {}});
  }
  score.inputs.push_back({"past_key_values.key", shape.dtype, {"B", kv, "C", size}});
  score.outputs = {{"key_scores", DType::kFloat32, {"B", shape.maps, "W"}}};
  specs["policy"] = {
      "policy.onnx",
      {{"key_scores", DType::kFloat32, {layers, "B", shape.maps, "W"}},
       {"key_kinds", DType::kInt64, {layers, "B", "W"}},
       {"share", DType::kFloat32, {}}},
      {{"order", DType::kInt64, {layers, "B", shape.sets, "W"}}, {"counts", DType::kInt64, {layers, "B"}}}};
  for (size_t i = 0; i < groups.size(); ++i) {
    const std::string& name = policy.compacts.at(i);
    GraphSpec spec{name + ".onnx", {{"order", DType::kInt64, {"B", shape.sets, "M"}}}, {}};
    if (shape.merges) {
      spec.inputs.push_back({"counts", DType::kInt64, {"B"}});
      spec.inputs.push_back({"key_kinds", DType::kInt64, {"B", "W"}});
    }
    for (const char* kind : {"key", "value"}) {
      const std::vector<Dim> cache{"B", kv, groups[i].capacity, size};
      spec.inputs.push_back({said("past_key_values.", kind), shape.dtype, cache});
      spec.outputs.push_back({said("present.", kind), shape.dtype, cache});
    }
    specs[name] = std::move(spec);
  }
  return specs;
}

}  // namespace vlmtrim
