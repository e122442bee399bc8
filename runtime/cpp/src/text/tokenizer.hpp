// A checkpoint's tokenizer.json: byte-level BPE, and Llama's BPE with byte fallback, as `tokenizers` runs them.
#pragma once

#include <cstdint>
#include <map>
#include <memory>
#include <set>
#include <string>
#include <string_view>
#include <vector>

#include "core/reading.hpp"
#include "text/bpe.hpp"
#include "text/regex.hpp"

namespace vlmtrim {

// A token that was added to the vocabulary, found in the text before anything else is done to it.
struct AddedToken {
  int64_t id = 0;
  std::string text;
  std::string
      said;  // what it is decoded to: the text as the normalizers leave it, of a token that is found behind them
  bool left_strip = false, right_strip = false, normalized = false, special = false;
};

// What is done to a text, step by step.
struct Normalizer {
  enum class Kind { kNfc, kPrepend, kReplace } kind;
  std::string from, to;
};
struct PreTokenizer {
  enum class Kind { kByteLevel, kMetaspace, kSplit } kind;
  std::shared_ptr<const Regex> pattern;  // null: by a plain text
  std::string text;                      // to split by; the replacement of spaces
  enum class Behaviour { kRemoved, kIsolated, kPrevious, kNext, kContiguous } behaviour = Behaviour::kIsolated;
  bool inverted = false, splits = true;
  bool prefixes = false;    // a space in front of every piece that has none
  bool first_only = false;  // ... of the text alone
};
struct Decoder {
  enum class Kind { kByteLevel, kByteFallback, kReplace, kFuse, kStrip, kMetaspace } kind;
  std::string from, to;
  int64_t start = 0, stop = 0;
  bool prefixed = false;
};

class Tokenizer {
 public:
  // Throws BundleError or Refusal, naming what this code does not know.
  static std::shared_ptr<const Tokenizer> from_json(std::string_view source, const std::string& where);

  // Ids of a valid UTF-8 text; `add` adds what the tokenizer prescribes.
  std::vector<int64_t> encode(std::string_view text, bool add) const;
  // The text of ids; special tokens leave none.
  std::string decode(const std::vector<int64_t>& ids) const;
  // nullptr where there is none of that id.
  const std::string* token_of(int64_t id) const;
  // Text of every token that is more than its text, by id.
  std::map<int64_t, std::string> control_tokens() const;
  // A text with these tokens, where it spells them, under other names.
  std::string with_names(std::string_view text, const std::map<int64_t, std::string>& names) const;
  // The same tokenizer with other names for these tokens, which text does not have.
  std::shared_ptr<const Tokenizer> renamed(const std::map<int64_t, std::string>& names) const;

 private:
  struct Piece {
    std::string text;
    int64_t id = -1;     // of an added token
    bool first = false;  // whether it begins where the text begins
  };
  using Pieces = std::vector<Piece>;

  Tokenizer() = default;
  void read_added(const Json& entries, const std::string& where);
  void index_added();
  std::string normalized(std::string text) const;
  void split_added(const Piece& piece, bool normalized, Pieces& pieces) const;
  const AddedToken* added_at(std::string_view text, size_t at, bool normalized, size_t& length) const;
  std::string joined(std::vector<std::string> tokens) const;

  std::shared_ptr<const Bpe> model_;
  std::vector<AddedToken> added_;
  // By first byte: (text to find, place in added_), longest first; of plain tokens, and of normalized ones.
  std::map<char, std::vector<std::pair<std::string, size_t>>> index_[2];
  std::map<int64_t, size_t> added_by_id_;
  std::set<int64_t> hidden_;  // ids that the model must not make of text
  std::vector<Normalizer> normalizers_;
  std::vector<PreTokenizer> pre_tokenizers_;
  std::vector<Decoder> decoders_;
  bool decodes_ = false;
  std::vector<int64_t> before_, behind_;  // ids that are added to a text
};

// What the parts of a tokenizer.json stand for. Throw BundleError.
std::vector<Normalizer> read_normalizers(const Json& part, const std::string& where);
std::vector<PreTokenizer> read_pre_tokenizers(const Json& part, const std::string& where);
std::vector<Decoder> read_decoders(const Json& part, const std::string& where);
void read_post_processor(const Json& part, const std::string& where, std::vector<int64_t>& before,
                         std::vector<int64_t>& behind);

// Pieces of a text that a pre-tokenizer makes; `first`: whether it begins where the whole text begins.
std::vector<std::pair<std::string, bool>> pre_tokenized(const PreTokenizer& step, const std::string& text, bool first);
std::vector<std::string> decoded(const Decoder& step, const std::vector<std::string>& tokens);
std::string replaced(std::string_view text, std::string_view from, std::string_view to);

// Ids of one answer -> text, as soon as their bytes form characters.
class TextStream {
 public:
  explicit TextStream(std::shared_ptr<const Tokenizer> tokenizer) : tokenizer_(std::move(tokenizer)) {}
  // What the token adds to the text; empty while bytes are missing.
  std::string step(int64_t token);

 private:
  std::shared_ptr<const Tokenizer> tokenizer_;
  std::vector<int64_t> ids_, held_;
  std::string prefix_;
  size_t prefix_ids_ = 0;
};

}  // namespace vlmtrim
