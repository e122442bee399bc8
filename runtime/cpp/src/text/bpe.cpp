#include "text/bpe.hpp"

#include <cstdio>
#include <queue>
#include <tuple>

#include "core/error.hpp"
#include "text/unicode.hpp"

namespace vlmtrim {
namespace {

constexpr int64_t kLargestId = 1 << 24;

uint64_t key_of(int64_t first, int64_t second) {
  return static_cast<uint64_t>(first) << 32 | static_cast<uint64_t>(second);
}

bool flag(const Json& model, const char* name, const std::string& where) {
  const auto found = model.find(name);
  return found != model.end() && !found->is_null() && boolean(*found, where + ": model." + name);
}

void refuse_other(const Json& model, const std::string& where) {
  const auto kind = model.find("type");
  if (kind != model.end() && *kind != "BPE") {
    throw BundleError(said(where, ": a model of type ", shown(*kind), "; the C++ runtime knows BPE: give token ids"));
  }
  for (const char* name : {"dropout", "continuing_subword_prefix", "end_of_word_suffix"}) {
    const auto found = model.find(name);
    if (found == model.end() || found->is_null() || *found == "" || *found == 0.0) continue;
    throw BundleError(
        said(where, ": model.", name, " is ", shown(*found), ", which the C++ runtime does not know: give token ids"));
  }
}

}  // namespace

Bpe::Bpe(const Json& model, const std::string& where) {
  if (!model.is_object()) throw BundleError(said(where, " has no model; export the model again"));
  refuse_other(model, where);
  const auto vocabulary = model.find("vocab"), merges = model.find("merges");
  if (vocabulary == model.end() || !vocabulary->is_object() || merges == model.end() || !merges->is_array()) {
    throw BundleError(said(where, " has no vocab and merges of BPE; export the model again"));
  }
  ids_.reserve(vocabulary->size());
  tokens_.reserve(vocabulary->size());
  for (const auto& [token, id] : vocabulary->items()) {
    const int64_t number = integer(id, where + ": an id", 0, kLargestId);
    ids_.emplace(token, number);
    tokens_.emplace(number, token);
  }
  merges_.reserve(merges->size());
  int64_t rank = 0;
  for (const auto& pair : *merges) {
    const bool one = pair.is_string(),
               two = pair.is_array() && pair.size() == 2 && pair[0].is_string() && pair[1].is_string();
    const std::string joined = one ? pair.get<std::string>() : "";
    const size_t space = joined.find(' ');
    if (!two && (!one || space == std::string::npos)) throw BundleError(said(where, ": a merge is ", shown(pair)));
    const std::string first = two ? pair[0].get<std::string>() : joined.substr(0, space);
    const std::string second = two ? pair[1].get<std::string>() : joined.substr(space + 1);
    const int64_t a = id_of(first), b = id_of(second), made = id_of(first + second);
    if (a < 0 || b < 0 || made < 0) throw BundleError(said(where, ": merge ", rank, " names no tokens"));
    merges_[key_of(a, b)] = {rank++, made};
  }
  byte_fallback_ = flag(model, "byte_fallback", where);
  fuses_unknown_ = flag(model, "fuse_unk", where);
  ignores_merges_ = flag(model, "ignore_merges", where);
  if (const auto unknown = model.find("unk_token"); unknown != model.end() && unknown->is_string()) {
    unknown_ = id_of(unknown->get<std::string>());
    if (unknown_ < 0) throw BundleError(said(where, ": unk_token is no token"));
  }
  for (unsigned byte = 0; byte < 256; ++byte) {
    char name[8];
    std::snprintf(name, sizeof name, "<0x%02X>", byte);
    bytes_[byte] = id_of(name);
  }
}

int64_t Bpe::id_of(const std::string& token) const {
  const auto found = ids_.find(token);
  return found == ids_.end() ? -1 : found->second;
}

const std::string* Bpe::token_of(int64_t id) const {
  const auto found = tokens_.find(id);
  return found == tokens_.end() ? nullptr : &found->second;
}

const Bpe::Merge* Bpe::merge_of(int64_t first, int64_t second) const {
  const auto found = merges_.find(key_of(first, second));
  return found == merges_.end() ? nullptr : &found->second;
}

// False where the vocabulary lacks a byte of a character.
bool Bpe::add_bytes(std::string_view character, std::vector<int64_t>& ids) const {
  for (const char byte : character) {
    if (bytes_[static_cast<unsigned char>(byte)] < 0) return false;
  }
  for (const char byte : character) ids.push_back(bytes_[static_cast<unsigned char>(byte)]);
  return true;
}

std::vector<Bpe::Symbol> Bpe::symbols_of(std::string_view word, const std::set<int64_t>& hidden) const {
  std::vector<int64_t> ids;
  bool pending = false;  // an unknown character that is not written yet, as others may join it
  for (size_t at = 0; at < word.size();) {
    const size_t length = std::min(length_of(word[at]), word.size() - at);
    const std::string_view character = word.substr(at, length);
    at += length;
    const int64_t id = id_of(std::string(character));
    if (id >= 0 && hidden.count(id) == 0) {
      if (pending) ids.push_back(unknown_);
      pending = false;
      ids.push_back(id);
      continue;
    }
    if (byte_fallback_ && add_bytes(character, ids)) continue;
    if (unknown_ < 0) continue;
    if (pending && !fuses_unknown_) ids.push_back(unknown_);
    pending = true;
  }
  if (pending) ids.push_back(unknown_);
  std::vector<Symbol> symbols;
  const auto count = static_cast<ptrdiff_t>(ids.size());
  for (ptrdiff_t i = 0; i < count; ++i) {
    symbols.push_back({ids[static_cast<size_t>(i)], i - 1, i + 1 < count ? i + 1 : -1, true});
  }
  return symbols;
}

void Bpe::encode(std::string_view word, const std::set<int64_t>& hidden, std::vector<int64_t>& ids) const {
  if (word.empty()) return;
  if (ignores_merges_) {
    const int64_t whole = id_of(std::string(word));
    if (whole >= 0 && hidden.count(whole) == 0) {
      ids.push_back(whole);
      return;
    }
  }
  std::vector<Symbol> symbols = symbols_of(word, hidden);
  using Candidate = std::tuple<int64_t, ptrdiff_t, int64_t>;  // rank, place, made
  std::priority_queue<Candidate, std::vector<Candidate>, std::greater<>> queue;
  const auto look = [&](ptrdiff_t place) {
    const Symbol& left = symbols[static_cast<size_t>(place)];
    if (left.behind < 0) return;
    const int64_t a = left.id, b = symbols[static_cast<size_t>(left.behind)].id;
    const Merge* merge = merge_of(a, b);
    if (merge == nullptr) return;
    if (hidden.count(a) + hidden.count(b) + hidden.count(merge->made) == 0)
      queue.emplace(merge->rank, place, merge->made);
  };
  for (size_t i = 0; i < symbols.size(); ++i) look(static_cast<ptrdiff_t>(i));
  while (!queue.empty()) {
    const auto [rank, place, made] = queue.top();
    queue.pop();
    Symbol& left = symbols[static_cast<size_t>(place)];
    if (!left.alive || left.behind < 0) continue;
    Symbol& right = symbols[static_cast<size_t>(left.behind)];
    const Merge* merge = merge_of(left.id, right.id);
    if (merge == nullptr || merge->made != made) continue;  // one of the two has been merged since
    left.id = made;
    right.alive = false;
    left.behind = right.behind;
    if (right.behind >= 0) symbols[static_cast<size_t>(right.behind)].before = place;
    if (left.before >= 0) look(left.before);
    look(place);
  }
  for (const Symbol& symbol : symbols) {
    if (symbol.alive) ids.push_back(symbol.id);
  }
}

}  // namespace vlmtrim
