// Byte-pair encoding as `tokenizers` does it: characters, bytes in place of unknown ones, then merges by rank.
#pragma once

#include <cstdint>
#include <set>
#include <string>
#include <string_view>
#include <unordered_map>
#include <vector>

#include "core/reading.hpp"

namespace vlmtrim {

class Bpe {
 public:
  // The "model" part of a tokenizer.json. Throws BundleError.
  Bpe(const Json& model, const std::string& where);

  // Appends the ids of one piece of text; those of `hidden` are never made, but for unknown characters.
  void encode(std::string_view word, const std::set<int64_t>& hidden, std::vector<int64_t>& ids) const;
  // -1 where the vocabulary has no such token; nullptr where it has no such id.
  int64_t id_of(const std::string& token) const;
  const std::string* token_of(int64_t id) const;
  int64_t size() const { return static_cast<int64_t>(ids_.size()); }

 private:
  struct Merge {
    int64_t rank, made;
  };
  struct Symbol {
    int64_t id;
    ptrdiff_t before, behind;  // neighbours, -1 where there is none
    bool alive;
  };

  std::vector<Symbol> symbols_of(std::string_view word, const std::set<int64_t>& hidden) const;
  bool add_bytes(std::string_view character, std::vector<int64_t>& ids) const;
  const Merge* merge_of(int64_t first, int64_t second) const;

  std::unordered_map<std::string, int64_t> ids_;
  std::unordered_map<int64_t, std::string> tokens_;
  std::unordered_map<uint64_t, Merge> merges_;
  int64_t bytes_[256];
  int64_t unknown_ = -1;
  bool byte_fallback_ = false, fuses_unknown_ = false, ignores_merges_ = false;
};

}  // namespace vlmtrim
