// The parts of a tokenizer.json: read, and what each of their steps does.
#include <algorithm>
#include <array>
#include <functional>

#include "core/error.hpp"
#include "text/tokenizer.hpp"
#include "text/unicode.hpp"

namespace vlmtrim {
namespace {

constexpr size_t kMostSteps = 64, kLongest = 64;  // steps of a part; bytes that a step may make of one
// GPT-2's way to split, of byte-level pre-tokenizers that name no other.
constexpr const char* kBytePattern = R"('s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+)";

[[noreturn]] void refuse(const std::string& where, const std::string& what) {
  throw BundleError(said(where, " has ", what, ", which the C++ runtime does not know: give token ids"));
}

// Calls `one` with every step of a part, those in sequences too.
void each_step(const Json& part, const std::string& where, const char* inner,
               const std::function<void(const std::string&, const Json&)>& one, size_t depth = 0) {
  if (part.is_null()) return;
  if (!part.is_object() || !part.contains("type") || !part["type"].is_string() || depth > kMostSteps) {
    throw BundleError(said(where, " is ", shown(part), "; expected an object with a type"));
  }
  const std::string type = part["type"];
  if (type != "Sequence") return one(type, part);
  const auto steps = part.find(inner);
  if (steps == part.end() || !steps->is_array() || steps->size() > kMostSteps) {
    throw BundleError(said(where, " is a sequence without ", inner));
  }
  for (const auto& step : *steps) each_step(step, where, inner, one, depth + 1);
}

std::string text_of(const Json& step, const char* name, const std::string& where) {
  const auto found = step.find(name);
  std::string text = text_value(found == step.end() ? Json() : *found, said(where, ".", name));
  if (text.size() > kLongest) throw BundleError(said(where, ".", name, " has more than ", kLongest, " bytes"));
  return text;
}

bool flag_of(const Json& step, const char* name, const std::string& where, bool fallback) {
  const auto found = step.find(name);
  return found == step.end() ? fallback : boolean(*found, said(where, ".", name));
}

// The plain text of a pattern; empty where it is a regular expression.
std::string plain_pattern(const Json& step, const std::string& where) {
  const auto pattern = step.find("pattern");
  if (pattern == step.end() || !pattern->is_object()) throw BundleError(said(where, " has no pattern"));
  return pattern->contains("String") ? text_of(*pattern, "String", where) : "";
}

// GPT-2's characters for bytes: printable ones stand for themselves, the others are moved behind them.
const std::array<uint32_t, 256>& byte_characters() {
  static const auto table = [] {
    std::array<uint32_t, 256> made{};
    uint32_t next = 256;
    for (uint32_t byte = 0; byte < 256; ++byte) {
      const bool plain = (byte >= 33 && byte <= 126) || (byte >= 161 && byte <= 172) || byte >= 174;
      made[byte] = plain ? byte : next++;
    }
    return made;
  }();
  return table;
}

std::shared_ptr<const Regex> byte_pattern() {
  static const auto pattern = std::make_shared<const Regex>(kBytePattern);
  return pattern;
}

PreTokenizer metaspace_of(const Json& step, const std::string& where) {
  PreTokenizer made{};
  made.kind = PreTokenizer::Kind::kMetaspace;
  made.text = text_of(step, "replacement", where);
  const std::string scheme = step.contains("prepend_scheme")                  ? text_of(step, "prepend_scheme", where)
                             : flag_of(step, "add_prefix_space", where, true) ? "always"
                                                                              : "never";
  if (scheme != "always" && scheme != "first" && scheme != "never") refuse(where, "prepend_scheme " + shown(scheme));
  made.prefixes = scheme != "never";
  made.first_only = scheme == "first";
  made.splits = flag_of(step, "split", where, true);
  made.behaviour = PreTokenizer::Behaviour::kNext;
  return made;
}

PreTokenizer split_of(const Json& step, const std::string& where) {
  PreTokenizer made{};
  made.kind = PreTokenizer::Kind::kSplit;
  made.text = plain_pattern(step, where);
  if (made.text.empty()) {
    const auto regex = step["pattern"].find("Regex");
    if (regex == step["pattern"].end()) refuse(where, "an empty pattern");
    made.pattern = std::make_shared<const Regex>(text_value(*regex, where + ".pattern"));
  }
  const std::string behaviour = text_of(step, "behavior", where);
  using Behaviour = PreTokenizer::Behaviour;
  if (behaviour == "Removed") made.behaviour = Behaviour::kRemoved;
  else if (behaviour == "Isolated") made.behaviour = Behaviour::kIsolated;
  else if (behaviour == "MergedWithPrevious") made.behaviour = Behaviour::kPrevious;
  else if (behaviour == "MergedWithNext") made.behaviour = Behaviour::kNext;
  else if (behaviour == "Contiguous") made.behaviour = Behaviour::kContiguous;
  else refuse(where, "behavior " + shown(behaviour));
  made.inverted = flag_of(step, "invert", where, false);
  return made;
}

struct Span {
  size_t start, end;
  bool matches;
};

// The whole text as matches and what is between them.
std::vector<Span> spans_of(const PreTokenizer& step, std::string_view text) {
  std::vector<std::pair<size_t, size_t>> found;
  if (step.pattern) {
    found = step.pattern->matches(text);
  } else {
    for (size_t at = 0; (at = text.find(step.text, at)) != std::string_view::npos; at += step.text.size()) {
      found.emplace_back(at, at + step.text.size());
    }
  }
  std::vector<Span> spans;
  size_t done = 0;
  for (const auto& [start, end] : found) {
    if (start > done) spans.push_back({done, start, step.inverted});
    spans.push_back({start, end, !step.inverted});
    done = end;
  }
  if (done < text.size()) spans.push_back({done, text.size(), step.inverted});
  return spans;
}

// Spans put together as a behaviour says.
std::vector<Span> merged(const std::vector<Span>& spans, PreTokenizer::Behaviour behaviour) {
  using Behaviour = PreTokenizer::Behaviour;
  std::vector<Span> made;
  if (behaviour == Behaviour::kNext) {
    bool before = false;
    for (auto span = spans.rbegin(); span != spans.rend(); ++span) {
      if (span->matches && !before && !made.empty()) made.back().start = span->start;
      else made.push_back(*span);
      before = span->matches;
    }
    std::reverse(made.begin(), made.end());
    return made;
  }
  bool before = false;
  for (const Span& span : spans) {
    const bool joins = !made.empty() && ((behaviour == Behaviour::kPrevious && span.matches && !before) ||
                                         (behaviour == Behaviour::kContiguous && span.matches == before));
    if (behaviour == Behaviour::kRemoved && span.matches) continue;
    if (joins) made.back().end = span.end;
    else made.push_back(span);
    before = span.matches;
  }
  return made;
}

std::vector<std::string> from_bytes(const std::vector<std::string>& tokens) {
  std::vector<std::string> made;
  std::string bytes;
  const auto flush = [&] {
    if (bytes.empty()) return;
    if (!first_bad_utf8(bytes)) made.push_back(bytes);
    else made.insert(made.end(), bytes.size(), "\xEF\xBF\xBD");
    bytes.clear();
  };
  const auto digit = [](char c) {
    return c >= '0' && c <= '9'   ? c - '0'
           : c >= 'A' && c <= 'F' ? c - 'A' + 10
           : c >= 'a' && c <= 'f' ? c - 'a' + 10
                                  : -1;
  };
  for (const auto& token : tokens) {
    const bool form = token.size() == 6 && token.compare(0, 3, "<0x") == 0 && token[5] == '>';
    if (form && digit(token[3]) >= 0 && digit(token[4]) >= 0) {
      bytes += static_cast<char>(digit(token[3]) * 16 + digit(token[4]));
      continue;
    }
    flush();
    made.push_back(token);
  }
  flush();
  return made;
}

std::string of_byte_level(const std::vector<std::string>& tokens) {
  static const auto bytes = [] {
    std::map<uint32_t, char> made;
    for (size_t byte = 0; byte < 256; ++byte) made[byte_characters()[byte]] = static_cast<char>(byte);
    return made;
  }();
  std::string all;
  for (const auto& token : tokens) {
    std::string own;
    bool known = true;
    for (size_t at = 0; at < token.size() && known;) {
      const auto byte = bytes.find(next_code(token, at));
      known = byte != bytes.end();
      if (known) own += byte->second;
    }
    all += known ? own : token;
  }
  return lossy_utf8(all);
}

std::string stripped(const std::string& token, const Decoder& step) {
  std::string_view left = token;
  for (int64_t i = 0; i < step.start && left.substr(0, step.from.size()) == step.from; ++i) {
    left.remove_prefix(step.from.size());
  }
  for (int64_t i = 0;
       i < step.stop && left.size() >= step.from.size() && left.substr(left.size() - step.from.size()) == step.from;
       ++i) {
    left.remove_suffix(step.from.size());
  }
  return std::string(left);
}

}  // namespace

std::vector<Normalizer> read_normalizers(const Json& part, const std::string& where) {
  std::vector<Normalizer> steps;
  each_step(part, where, "normalizers", [&](const std::string& type, const Json& step) {
    if (type == "NFC") steps.push_back({Normalizer::Kind::kNfc, "", ""});
    else if (type == "Prepend") steps.push_back({Normalizer::Kind::kPrepend, "", text_of(step, "prepend", where)});
    else if (type == "Replace" && !plain_pattern(step, where).empty())
      steps.push_back({Normalizer::Kind::kReplace, plain_pattern(step, where), text_of(step, "content", where)});
    else refuse(where, shown(type));
  });
  return steps;
}

std::vector<PreTokenizer> read_pre_tokenizers(const Json& part, const std::string& where) {
  std::vector<PreTokenizer> steps;
  each_step(part, where, "pretokenizers", [&](const std::string& type, const Json& step) {
    if (type == "ByteLevel") {
      PreTokenizer made{};
      made.kind = PreTokenizer::Kind::kByteLevel;
      made.prefixes = flag_of(step, "add_prefix_space", where, true);
      if (flag_of(step, "use_regex", where, true)) made.pattern = byte_pattern();
      steps.push_back(made);
    } else if (type == "Metaspace") {
      steps.push_back(metaspace_of(step, where));
    } else if (type == "Split") {
      steps.push_back(split_of(step, where));
    } else if (type == "Digits") {
      PreTokenizer made{};
      made.kind = PreTokenizer::Kind::kSplit;
      const bool each = flag_of(step, "individual_digits", where, false);
      made.pattern = std::make_shared<const Regex>(each ? "\\p{N}" : "\\p{N}+");
      steps.push_back(made);
    } else {
      refuse(where, shown(type));
    }
  });
  return steps;
}

std::vector<Decoder> read_decoders(const Json& part, const std::string& where) {
  std::vector<Decoder> steps;
  using Kind = Decoder::Kind;
  each_step(part, where, "decoders", [&](const std::string& type, const Json& step) {
    if (type == "ByteLevel") steps.push_back({Kind::kByteLevel, "", "", 0, 0, false});
    else if (type == "ByteFallback") steps.push_back({Kind::kByteFallback, "", "", 0, 0, false});
    else if (type == "Fuse") steps.push_back({Kind::kFuse, "", "", 0, 0, false});
    else if (type == "Replace" && !plain_pattern(step, where).empty())
      steps.push_back({Kind::kReplace, plain_pattern(step, where), text_of(step, "content", where), 0, 0, false});
    else if (type == "Strip")
      steps.push_back({Kind::kStrip, text_of(step, "content", where), "",
                       integer(step.value("start", Json()), where + ".start", 0, kMostSteps),
                       integer(step.value("stop", Json()), where + ".stop", 0, kMostSteps), false});
    else if (type == "Metaspace") {
      const PreTokenizer metaspace = metaspace_of(step, where);
      steps.push_back({Kind::kMetaspace, metaspace.text, " ", 0, 0, metaspace.prefixes});
    } else {
      refuse(where, shown(type));
    }
  });
  return steps;
}

void read_post_processor(const Json& part, const std::string& where, std::vector<int64_t>& before,
                         std::vector<int64_t>& behind) {
  each_step(part, where, "processors", [&](const std::string& type, const Json& step) {
    if (type == "ByteLevel") return;
    const Json single = step.value("single", Json()), special = step.value("special_tokens", Json());
    if (type != "TemplateProcessing" || !single.is_array() || single.size() > kMostSteps || !special.is_object()) {
      refuse(where, shown(type));
    }
    std::vector<int64_t> ids[2];
    size_t side = 0;
    for (const auto& piece : single) {
      if (piece.contains("Sequence") && side == 0) {
        side = 1;
        continue;
      }
      const Json name = piece.contains("SpecialToken") ? piece["SpecialToken"].value("id", Json()) : Json();
      if (!name.is_string() || !special.contains(name)) refuse(where, "a template of another kind");
      const Json numbers = special[name.get<std::string>()].value("ids", Json());
      if (!numbers.is_array() || numbers.size() > kMostSteps) refuse(where, "a template of another kind");
      for (const auto& id : numbers) ids[side].push_back(integer(id, where, 0, 1 << 24));
    }
    if (side == 0) refuse(where, "a template without the text");
    before.insert(before.begin(), ids[0].begin(), ids[0].end());
    behind.insert(behind.end(), ids[1].begin(), ids[1].end());
  });
}

std::vector<std::pair<std::string, bool>> pre_tokenized(const PreTokenizer& step, const std::string& given,
                                                        bool first) {
  std::string text = given;
  const bool byte_level = step.kind == PreTokenizer::Kind::kByteLevel;
  const std::string space = byte_level ? " " : step.text;
  if (step.kind == PreTokenizer::Kind::kMetaspace) text = replaced(text, " ", step.text);
  const bool wanted = step.prefixes && (first || !step.first_only);
  if (step.kind != PreTokenizer::Kind::kSplit && wanted && text.compare(0, space.size(), space) != 0) {
    text = space + text;
  }
  std::vector<Span> spans{{0, text.size(), false}};
  const bool splits = byte_level ? step.pattern != nullptr : step.splits;
  if (splits) spans = merged(spans_of(step, text), step.behaviour);
  std::vector<std::pair<std::string, bool>> pieces;
  for (const Span& span : spans) {
    std::string piece = text.substr(span.start, span.end - span.start);
    if (byte_level) {
      std::string characters;
      for (const char byte : piece) append_code(characters, byte_characters()[static_cast<unsigned char>(byte)]);
      piece = std::move(characters);
    }
    if (!piece.empty()) pieces.emplace_back(std::move(piece), first && span.start == 0);
  }
  return pieces;
}

std::vector<std::string> decoded(const Decoder& step, const std::vector<std::string>& tokens) {
  std::vector<std::string> made;
  std::string all;
  switch (step.kind) {
    case Decoder::Kind::kByteLevel:
      return {of_byte_level(tokens)};
    case Decoder::Kind::kByteFallback:
      return from_bytes(tokens);
    case Decoder::Kind::kFuse:
      for (const auto& token : tokens) all += token;
      return {all};
    case Decoder::Kind::kReplace:
      for (const auto& token : tokens) made.push_back(replaced(token, step.from, step.to));
      return made;
    case Decoder::Kind::kStrip:
      for (const auto& token : tokens) made.push_back(stripped(token, step));
      return made;
    case Decoder::Kind::kMetaspace:
      for (const auto& token : tokens) {
        const bool drops = made.empty() && step.prefixed;
        made.push_back(replaced(token, step.from, drops ? "" : step.to));
      }
      return made;
  }
  return made;
}

std::string replaced(std::string_view text, std::string_view from, std::string_view to) {
  if (from.empty()) return std::string(text);
  std::string made;
  size_t done = 0;
  for (size_t at = 0; (at = text.find(from, at)) != std::string_view::npos; at += from.size(), done = at) {
    made += text.substr(done, at - done);
    made += to;
  }
  return made += text.substr(done);
}

}  // namespace vlmtrim
