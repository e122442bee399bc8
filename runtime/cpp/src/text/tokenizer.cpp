#include "text/tokenizer.hpp"

#include <algorithm>

#include "core/error.hpp"
#include "text/unicode.hpp"

namespace vlmtrim {
namespace {

bool flag(const Json& entry, const char* name) {
  const auto found = entry.find(name);
  return found != entry.end() && found->is_boolean() && found->get<bool>();
}

// Where the white space begins that a text ends with, and where it ends that a text begins with.
size_t spaces_at_end(std::string_view text) {
  while (!text.empty()) {
    size_t start = text.size() - 1;
    while (start > 0 && (static_cast<unsigned char>(text[start]) & 0xC0) == 0x80) --start;
    size_t at = start;
    if (!is_space(next_code(text, at))) break;
    text = text.substr(0, start);
  }
  return text.size();
}

size_t spaces_at_start(std::string_view text) {
  size_t at = 0;
  while (at < text.size()) {
    size_t next = at;
    if (!is_space(next_code(text, next))) break;
    at = next;
  }
  return at;
}

}  // namespace

std::shared_ptr<const Tokenizer> Tokenizer::from_json(std::string_view source, const std::string& where) {
  const Json raw = json_object(source, where);
  const auto part = [&](const char* name) {
    const auto found = raw.find(name);
    return found == raw.end() ? Json() : *found;
  };
  const std::shared_ptr<Tokenizer> made(new Tokenizer);
  const auto model = raw.find("model");
  made->model_ = std::make_shared<Bpe>(model == raw.end() ? Json() : *model, where);
  made->normalizers_ = read_normalizers(part("normalizer"), where + ": normalizer");
  made->pre_tokenizers_ = read_pre_tokenizers(part("pre_tokenizer"), where + ": pre_tokenizer");
  made->decodes_ = !part("decoder").is_null();
  made->decoders_ = read_decoders(part("decoder"), where + ": decoder");
  read_post_processor(part("post_processor"), where + ": post_processor", made->before_, made->behind_);
  made->read_added(part("added_tokens"), where);
  made->index_added();
  return made;
}

void Tokenizer::read_added(const Json& entries, const std::string& where) {
  if (entries.is_null()) return;
  if (!entries.is_array()) throw BundleError(said(where, ": added_tokens is ", shown(entries), "; expected a list"));
  for (const auto& entry : entries) {
    if (!entry.is_object() || !entry.contains("content") || !entry.contains("id")) {
      throw BundleError(said(where, ": an added token is ", shown(entry)));
    }
    AddedToken token;
    token.text = text_value(entry["content"], where + ": an added token");
    token.id = integer(entry["id"], where + ": an added token's id", 0, 1 << 24);
    if (const int64_t known = model_->id_of(token.text); known >= 0) token.id = known;
    token.left_strip = flag(entry, "lstrip");
    token.right_strip = flag(entry, "rstrip");
    token.normalized = flag(entry, "normalized");
    token.special = flag(entry, "special");
    if (flag(entry, "single_word")) {
      throw BundleError(said(where, ": ", shown(token.text),
                             " is found as a single word only, which the C++ runtime does not know: give token ids"));
    }
    if (token.text.empty()) continue;
    added_by_id_[token.id] = added_.size();
    added_.push_back(std::move(token));
  }
}

void Tokenizer::index_added() {
  for (auto& index : index_) index.clear();
  for (size_t i = 0; i < added_.size(); ++i) {
    const bool late = added_[i].normalized;
    const std::string text = late ? normalized(added_[i].text) : added_[i].text;
    added_[i].said = text;
    if (!text.empty()) index_[late ? 1 : 0][text[0]].emplace_back(text, i);
  }
  for (auto& index : index_) {
    for (auto& [lead, entries] : index) {
      std::stable_sort(entries.begin(), entries.end(),
                       [](const auto& a, const auto& b) { return a.first.size() > b.first.size(); });
    }
  }
}

std::shared_ptr<const Tokenizer> Tokenizer::renamed(const std::map<int64_t, std::string>& names) const {
  const std::shared_ptr<Tokenizer> made(new Tokenizer(*this));
  for (auto& token : made->added_) {
    const auto name = names.find(token.id);
    if (name != names.end()) token.text = name->second;
  }
  for (const auto& [id, name] : names) made->hidden_.insert(id);
  made->index_added();
  return made;
}

std::string Tokenizer::with_names(std::string_view text, const std::map<int64_t, std::string>& names) const {
  Pieces pieces;
  split_added({std::string(text), -1, true}, false, pieces);
  std::string made;
  for (const Piece& piece : pieces) {
    const auto name = names.find(piece.id);
    made += name == names.end() ? piece.text : name->second;
  }
  return made;
}

const std::string* Tokenizer::token_of(int64_t id) const {
  const auto found = added_by_id_.find(id);
  return found != added_by_id_.end() ? &added_[found->second].said : model_->token_of(id);
}

std::map<int64_t, std::string> Tokenizer::control_tokens() const {
  std::map<int64_t, std::string> found;
  for (const auto& [id, place] : added_by_id_) {
    const AddedToken& token = added_[place];
    const std::string words = replaced(token.text, "\xE2\x96\x81", " ");
    if (token.special || !strip_left(words).empty()) found[id] = token.text;
  }
  return found;
}

std::vector<int64_t> Tokenizer::encode(std::string_view text, bool add) const {
  Pieces raw, pieces;
  split_added({std::string(text), -1, true}, false, raw);
  for (const Piece& piece : raw) {
    if (piece.id >= 0) {
      pieces.push_back(piece);
    } else {
      split_added({normalized(piece.text), -1, piece.first}, true, pieces);
    }
  }
  std::vector<int64_t> ids = add ? before_ : std::vector<int64_t>{};
  for (const Piece& piece : pieces) {
    if (piece.id >= 0) {
      ids.push_back(piece.id);
      continue;
    }
    std::vector<std::pair<std::string, bool>> words{{piece.text, piece.first}};
    for (const PreTokenizer& step : pre_tokenizers_) {
      std::vector<std::pair<std::string, bool>> next;
      for (const auto& [word, first] : words) {
        for (auto& part : pre_tokenized(step, word, first)) next.push_back(std::move(part));
      }
      words = std::move(next);
    }
    for (const auto& [word, first] : words) model_->encode(word, hidden_, ids);
  }
  if (add) ids.insert(ids.end(), behind_.begin(), behind_.end());
  return ids;
}

std::string Tokenizer::normalized(std::string text) const {
  for (const Normalizer& step : normalizers_) {
    switch (step.kind) {
      case Normalizer::Kind::kNfc:
        text = nfc(text);
        break;
      case Normalizer::Kind::kPrepend:
        if (!text.empty()) text.insert(0, step.to);
        break;
      case Normalizer::Kind::kReplace:
        text = replaced(text, step.from, step.to);
        break;
    }
  }
  return text;
}

const AddedToken* Tokenizer::added_at(std::string_view text, size_t at, bool late, size_t& length) const {
  const auto& index = index_[late ? 1 : 0];
  const auto entries = index.find(text[at]);
  if (entries == index.end()) return nullptr;
  for (const auto& [wanted, place] : entries->second) {
    if (text.compare(at, wanted.size(), wanted) != 0) continue;
    length = wanted.size();
    return &added_[place];
  }
  return nullptr;
}

void Tokenizer::split_added(const Piece& piece, bool late, Pieces& pieces) const {
  const std::string_view text = piece.text;
  size_t done = 0;
  const auto pass = [&](size_t end) {
    if (end > done) pieces.push_back({std::string(text.substr(done, end - done)), -1, piece.first && done == 0});
  };
  for (size_t at = 0; at < text.size();) {
    size_t length = 0;
    const AddedToken* token = added_at(text, at, late, length);
    if (token == nullptr) {
      ++at;
      continue;
    }
    size_t start = at, end = at + length;
    if (token->left_strip) start = std::max(spaces_at_end(text.substr(0, at)), done);
    if (token->right_strip) end += spaces_at_start(text.substr(end));
    pass(std::max(start, done));
    pieces.push_back({std::string(text.substr(start, end - start)), token->id, piece.first && start == 0});
    done = end;
    at = std::max(at + length, end);
  }
  pass(text.size());
}

std::string Tokenizer::decode(const std::vector<int64_t>& ids) const {
  std::vector<std::string> tokens;
  for (const int64_t id : ids) {
    const auto added = added_by_id_.find(id);
    if (added != added_by_id_.end() && added_[added->second].special) continue;
    if (const std::string* token = token_of(id)) tokens.push_back(*token);
  }
  return joined(std::move(tokens));
}

std::string Tokenizer::joined(std::vector<std::string> tokens) const {
  for (const Decoder& step : decoders_) tokens = decoded(step, tokens);
  std::string text;
  for (size_t i = 0; i < tokens.size(); ++i) text += (i > 0 && !decodes_ ? " " : "") + tokens[i];
  return text;
}

std::string TextStream::step(int64_t token) {
  const auto ends_open = [](const std::string& text) {
    return text.size() >= 3 && text.compare(text.size() - 3, 3, "\xEF\xBF\xBD") == 0;
  };
  held_.push_back(token);
  if (prefix_.empty() && !ids_.empty()) {
    const std::string text = tokenizer_->decode(ids_);
    if (!ends_open(text)) {
      prefix_ = text;
      prefix_ids_ = ids_.size();
    }
  }
  ids_.push_back(token);
  const std::string text = tokenizer_->decode(ids_);
  if (text.size() <= prefix_.size() || ends_open(text)) return "";
  if (text.compare(0, prefix_.size(), prefix_) != 0) {  // bytes that form no text: decoded on their own, begun anew
    const std::string alone = tokenizer_->decode(held_);
    ids_.clear();
    prefix_.clear();
    prefix_ids_ = 0;
    if (!alone.empty()) held_.clear();
    return alone;
  }
  std::string added = text.substr(prefix_.size());
  const size_t kept = ids_.size() - prefix_ids_;
  ids_.erase(ids_.begin(), ids_.begin() + static_cast<ptrdiff_t>(prefix_ids_));
  prefix_ = tokenizer_->decode(ids_);
  prefix_ids_ = kept;
  held_.clear();
  return added;
}

}  // namespace vlmtrim
