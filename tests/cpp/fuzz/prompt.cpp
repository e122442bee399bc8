// libFuzzer: a prompt.json of any bytes and a conversation by it, or sentences. Behind the first zero byte is the
// conversation: the system text, then turns. A byte of 1 to 4 begins a picture, a text, the answer, the next question;
// a byte of 5 takes the question back, one of 6 begins a video. Behind a system text of an odd length, words stand in
// place of pictures and videos.
//
// What people and models wrote never becomes a control token: the same conversation about letters has the same ones.
#include <algorithm>
#include <cstdlib>

#include "core/error.hpp"
#include "core/reading.hpp"
#include "text/prompter.hpp"
#include "text/unicode.hpp"

namespace {

using namespace vlmtrim;

constexpr int64_t kImage = 259;
const char* const kControls[] = {"<s>", "</s>", "<pad>", "<image>"};  // 256 and on, behind the bytes

// The character that byte-level tokenizers write for a byte.
std::string letter(int byte) {
  static int odd = 0;
  const bool plain = (byte > 32 && byte < 127) || (byte > 160 && byte != 173);
  const int code = plain ? byte : 256 + odd++;
  if (code < 128) return {static_cast<char>(code)};
  return {static_cast<char>(0xC0 | code >> 6), static_cast<char>(0x80 | (code & 0x3F))};
}

// Its merges make control tokens of text, were it not kept from that.
std::shared_ptr<const Tokenizer> tokenizer() {
  Json vocabulary = Json::object(), merges = Json::array(), added = Json::array();
  for (int byte = 0; byte < 256; ++byte) vocabulary[letter(byte)] = byte;
  int64_t id = 256, part = 300;
  for (const std::string text : kControls) {
    for (size_t end = 2; end <= text.size(); ++end) {
      merges.push_back({text.substr(0, end - 1), text.substr(end - 1, 1)});
      const auto& made = vocabulary.emplace(text.substr(0, end), end < text.size() ? part : id);
      if (made.second) ++part;
    }
    added.push_back({{"id", id++},
                     {"content", text},
                     {"special", true},
                     {"normalized", false},
                     {"single_word", false},
                     {"lstrip", false},
                     {"rstrip", false}});
  }
  const Json level{{"type", "ByteLevel"}, {"add_prefix_space", false}, {"trim_offsets", true}, {"use_regex", false}};
  const Json start = {{"SpecialToken", {{"id", "<s>"}, {"type_id", 0}}}},
             text = {{"Sequence", {{"id", "A"}, {"type_id", 0}}}};
  const Json post{{"type", "TemplateProcessing"},
                  {"single", {start, text}},
                  {"pair", Json::array()},
                  {"special_tokens", {{"<s>", {{"id", "<s>"}, {"ids", {256}}, {"tokens", {"<s>"}}}}}}};
  const Json whole{{"added_tokens", added},  {"normalizer", nullptr},
                   {"pre_tokenizer", level}, {"decoder", level},
                   {"post_processor", post}, {"model", {{"type", "BPE"}, {"vocab", vocabulary}, {"merges", merges}}}};
  return Tokenizer::from_json(whole.dump(), "tokenizer.json");
}

// What is done in a conversation, one after the other.
struct Move {
  char what;  // 'a'sk, 's'ay (the answer), 't'ake back
  std::vector<Part> parts;
};

std::vector<Move> moves_of(std::string_view text) {
  std::vector<Move> moves{{'a', {}}};
  for (const char c : text) {
    auto& parts = moves.back().parts;
    if (c == 1 || c == 2 || c == 6)
      parts.push_back({"", c != 2, c == 6});
    else if (c >= 3 && c <= 5)
      moves.push_back({"sat" [c - 3], {}});
    else if (parts.empty() || parts.back().picture)
      parts.push_back({std::string(1, c), false});
    else
      parts.back().text += c;
  }
  return moves;
}

// A letter for a text; white space, which templates trim, stays.
std::string lettered(const std::string& text) { return strip_left(text).empty() ? text : "x"; }

// Control tokens of every question, without one where it was refused.
std::vector<std::vector<int64_t>> controls(const Prompter& prompter, const std::string& system, std::vector<Move> moves,
                                           bool told, bool letters) {
  std::vector<std::vector<int64_t>> found;
  try {
    Conversation talk(prompter, letters ? lettered(system) : system);
    for (Move& move : moves) {
      if (letters) {
        for (Part& part : move.parts) part.text = lettered(part.text);
      }
      if (move.what == 's')
        talk.answer(move.parts.empty() ? "" : move.parts[0].text);
      else if (move.what == 't')
        talk.take_back();
      if (move.what != 'a') continue;
      const auto pictures =
          std::count_if(move.parts.begin(), move.parts.end(), [](const Part& part) { return part.picture; });
      found.push_back(talk.ask(move.parts, std::vector<std::string>(told ? pictures : 0, "\n Frame: <image></s>x")));
      auto& ids = found.back();
      ids.erase(std::remove_if(ids.begin(), ids.end(), [](int64_t id) { return id < 256 || id > kImage; }), ids.end());
    }
  } catch (const BundleError&) {
  } catch (const Refusal&) {
  }
  return found;
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  static const auto kTokenizer = tokenizer();
  const std::string_view all(reinterpret_cast<const char*>(data), size);
  const size_t end = std::min(all.find('\0'), all.size());
  const std::string_view rest = all.substr(std::min(end + 1, all.size()));
  // Control tokens have secret names that begin so; libFuzzer finds them in memory, where nobody else looks.
  if (rest.find("\xEE\x80\x80") != std::string_view::npos) return 0;
  const size_t asked = std::min(rest.find_first_of("\1\2\3\4\5\6"), rest.size());
  const std::string system(rest.substr(0, asked));
  Contract contract;
  contract.image_token_id = kImage;
  contract.max_seq_len = 512;
  try {
    const Prompter prompter(json_object(all.substr(0, end), "prompt.json"), "prompt.json", contract, kTokenizer);
    const auto moves = moves_of(rest.substr(asked));
    const bool told = system.size() % 2 == 1;
    const auto found = controls(prompter, system, moves, told, false),
               expected = controls(prompter, system, moves, told, true);
    for (size_t i = 0; i < std::min(found.size(), expected.size()); ++i) {
      if (found[i] != expected[i]) std::abort();
    }
  } catch (const BundleError&) {
  } catch (const Refusal&) {
  }
  return 0;
}
