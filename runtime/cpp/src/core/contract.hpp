// What the graphs of a bundle promise: contract.json. Mirrors graphs/contract.py, where every tensor is explained.
#pragma once

#include <cstdint>
#include <map>
#include <optional>
#include <string>
#include <vector>

#include "core/reading.hpp"

namespace vlmtrim {

constexpr int kSchema = 2;
constexpr int64_t kLargestSize = INT32_MAX;  // sizes are of 31 bits, as in every library that runs the graphs

enum class DType { kFloat32, kFloat16, kBFloat16, kInt64, kInt32, kBool };
const char* name_of(DType dtype);
size_t bytes_of(DType dtype);
std::optional<DType> dtype_named(const std::string& name);

// A dimension: a size, or the name of a symbolic one.
struct Dim {
  int64_t size = 0;
  std::string name;  // empty where the size is fixed

  Dim(int64_t fixed) : size(fixed) {}                   // NOLINT(google-explicit-constructor)
  Dim(std::string symbol) : name(std::move(symbol)) {}  // NOLINT(google-explicit-constructor)
  Dim(const char* symbol) : name(symbol) {}             // NOLINT(google-explicit-constructor)
  bool operator==(const Dim& other) const { return size == other.size && name == other.name; }
};

struct TensorSpec {
  std::string name;
  DType dtype;
  std::vector<Dim> shape;

  bool operator==(const TensorSpec& o) const { return name == o.name && dtype == o.dtype && shape == o.shape; }
  bool operator!=(const TensorSpec& o) const { return !(*this == o); }
};

// For messages: name dtype [dims].
std::string said_of(const TensorSpec& tensor);
std::string said_of(const std::vector<Dim>& shape);

struct GraphSpec {
  std::string file;
  std::vector<TensorSpec> inputs, outputs;

  bool operator==(const GraphSpec& o) const { return file == o.file && inputs == o.inputs && outputs == o.outputs; }
  // nullptr where there is none of that name.
  const TensorSpec* input(const std::string& name) const;
  const TensorSpec* output(const std::string& name) const;
};

// Number of visual tokens that stay when the share `removed` goes: halves to even, as Python's round.
int64_t kept_count(int64_t tokens, double removed);
// Image features, or visual tokens, that enter caches bounded by `share`.
int64_t most_features(int64_t features, double share);

// Layers whose caches always hold the same entries.
struct CacheGroup {
  std::vector<int64_t> layers;
  int64_t capacity = 0, kv_heads = 0, head_size = 0;
  double removed = 0;
  bool of_images = false;  // source: image features (cross-attention), else tokens
  double most = 1;
  bool chooses = false;

  // Cache entries that a step adds (at most, where it is bounded).
  int64_t length(int64_t tokens, int64_t visual) const;
  int64_t nbytes(int64_t batch, DType dtype) const;
};

// What a step or a round of a cache policy judges: its visual tokens; what was said since the question; all entries.
enum class Candidates { kVisual, kSaid, kAll };
// Which tokens of a step score: the last ones; the last ones behind the last visual token; some at a uniform stride.
enum class ScoreRows { kLast, kText, kProbe };

// What stays in the caches. Mirrors graphs/keeping.py, where every field and tensor is explained.
struct CachePolicy {
  Json policy;  // for people and reports only
  ScoreRows rows = ScoreRows::kLast;
  int64_t count = 0;
  double share = 1, part = 1;
  Candidates candidates = Candidates::kVisual;
  int64_t every = 0, ring = 0;
  bool accumulates = false;
  std::optional<int64_t> seed;
  std::pair<double, double> temperatures{1, 0};
  std::vector<std::string> compacts;  // of every group, the graph that compacts its layers

  // Names of its graphs.
  std::vector<std::string> graphs() const;
  // Throws BundleError naming `where`.
  static CachePolicy from_json(const Json& value, const std::string& where);
};

// Boundaries of a policy's graphs by name; `heads` of queries, `sets` of entries in a layer, `maps` of scores,
// `merges`: whether what goes is merged into what stays.
struct CacheShape {
  DType dtype;
  int64_t heads, sets, maps;
  bool merges;
};
std::map<std::string, GraphSpec> cache_specs(const CachePolicy& policy, const std::vector<CacheGroup>& groups,
                                             const CacheShape& shape);
// Names of the graphs that compact the groups' layers: one for every shape of caches.
std::vector<std::string> compacts_of(const std::vector<CacheGroup>& groups);

struct Packed {
  std::string part, format;
  int64_t block = 0, matrices = 0, weights = 0, nbytes = 0;
};

enum class Guide { kNone, kVision, kBundle };

struct Contract {
  std::string family;
  DType dtype = DType::kFloat32;
  std::map<std::string, GraphSpec> graphs;
  std::vector<CacheGroup> groups;
  std::map<std::string, std::pair<int64_t, int64_t>> dims;
  Json selection;  // for people and reports only
  int64_t max_seq_len = 0, images_assumed = 0, image_tokens = 0, image_token_id = 0;
  std::vector<int64_t> eos_token_ids;
  std::optional<std::pair<int64_t, int64_t>> image_grid;
  std::optional<int64_t> video_token_id;
  std::map<std::string, std::vector<std::string>> chains;
  Guide guide = Guide::kNone;
  std::vector<Packed> packed;
  std::optional<CachePolicy> cache;

  const GraphSpec& graph(const std::string& name) const { return graphs.at(name); }
  // Names of the graphs that do a whole one's work one after the other; itself where it has no pieces.
  std::vector<std::string> chain(const std::string& whole) const;
  // Graphs that are no piece of another one.
  std::vector<std::string> wholes() const;
  bool removes() const;
  // Numbers of a visual token: as wide as the decoder, and what layers add behind it.
  int64_t feature_width() const;
  // Group of every layer.
  std::vector<size_t> groups_of_layers() const;
  // Whether pictures reach the decoder through cross-attention instead of as tokens of the sequence.
  bool crosses() const;

  // Throws BundleError where the text is not a contract of a known schema; `where` names it.
  static Contract from_json(const std::string& text, const std::string& where);
};

// What is added behind the first layers to the states of visual tokens, an input of some decoders.
constexpr const char* kDeepstack = "deepstack_features";
// The last token that each one attends to, where visual tokens see those behind them: an input of some decoders.
constexpr const char* kLastSeen = "last_seen";

// Input and output name of a cache of a layer; `kind` is "key" or "value".
std::string past_name(int64_t layer, const char* kind);
std::string present_name(int64_t layer, const char* kind);

struct DecoderShape {
  DType dtype;
  int64_t hidden, vocabulary;
  bool selects;
  int64_t position_axes;
  bool guided, emits;
  int64_t query_heads;  // of the queries that it returns; 0 where it returns none
  bool rings;           // whether what tokens see is told apart from where they are written
  int64_t deepstack;    // first layers behind which features are added to visual tokens
  bool sees_ahead;      // whether visual tokens that lie together attend to each other both ways
};
// The decoder's boundary as the table in graphs/contract.py states it.
GraphSpec decoder_spec(const DecoderShape& shape, const std::vector<CacheGroup>& groups);

// Throws BundleError naming `where` and the first promise of a contract that another one contradicts.
void check_agreement(const Contract& contract, const std::string& where);

}  // namespace vlmtrim
