#include "text/unicode.hpp"

#include <algorithm>
#include <iterator>

#include "core/reading.hpp"

namespace vlmtrim {
namespace {

struct Range {
  uint32_t first, last;
};
struct Ranked {
  uint32_t first, last, rank;
};
struct Apart {
  uint32_t code, parts[4];
};
struct Together {
  uint32_t first, second, composed;
};

#include "text/unicode_tables.inc"

// Hangul syllables are composed by arithmetic (Unicode, section 3.12).
constexpr uint32_t kSyllables = 0xAC00, kLeads = 0x1100, kVowels = 0x1161, kTails = 0x11A7;
constexpr uint32_t kVowelCount = 21, kTailCount = 28, kSyllableCount = 19 * kVowelCount * kTailCount;

template <size_t N>
bool among(const Range (&ranges)[N], uint32_t code) {
  const auto* found = std::upper_bound(std::begin(ranges), std::end(ranges), code,
                                       [](uint32_t value, const Range& range) { return value < range.first; });
  return found != std::begin(ranges) && code <= std::prev(found)->last;
}

uint32_t rank_of(uint32_t code) {
  const auto* found = std::upper_bound(std::begin(kClasses), std::end(kClasses), code,
                                       [](uint32_t value, const Ranked& range) { return value < range.first; });
  if (found == std::begin(kClasses) || code > std::prev(found)->last) return 0;
  return std::prev(found)->rank;
}

void append_apart(std::vector<uint32_t>& codes, uint32_t code) {
  if (code >= kSyllables && code < kSyllables + kSyllableCount) {
    const uint32_t index = code - kSyllables;
    codes.push_back(kLeads + index / (kVowelCount * kTailCount));
    codes.push_back(kVowels + index / kTailCount % kVowelCount);
    if (index % kTailCount != 0) codes.push_back(kTails + index % kTailCount);
    return;
  }
  const auto* found = std::lower_bound(std::begin(kApart), std::end(kApart), code,
                                       [](const Apart& entry, uint32_t value) { return entry.code < value; });
  if (found == std::end(kApart) || found->code != code) {
    codes.push_back(code);
    return;
  }
  for (const uint32_t part : found->parts) {
    if (part != 0) codes.push_back(part);
  }
}

// 0 where the two do not compose.
uint32_t composed(uint32_t first, uint32_t second) {
  if (first >= kLeads && first < kLeads + 19 && second >= kVowels && second < kVowels + kVowelCount) {
    return kSyllables + ((first - kLeads) * kVowelCount + second - kVowels) * kTailCount;
  }
  const bool open =
      first >= kSyllables && first < kSyllables + kSyllableCount && (first - kSyllables) % kTailCount == 0;
  if (open && second > kTails && second < kTails + kTailCount) return first + second - kTails;
  const auto* found = std::lower_bound(std::begin(kTogether), std::end(kTogether), std::make_pair(first, second),
                                       [](const Together& entry, const std::pair<uint32_t, uint32_t>& pair) {
                                         return std::make_pair(entry.first, entry.second) < pair;
                                       });
  const bool same = found != std::end(kTogether) && found->first == first && found->second == second;
  return same ? found->composed : 0;
}

// Marks behind a character in the order of their classes.
void order_marks(std::vector<uint32_t>& codes) {
  for (size_t start = 0; start < codes.size();) {
    if (rank_of(codes[start]) == 0) {
      ++start;
      continue;
    }
    size_t end = start;
    while (end < codes.size() && rank_of(codes[end]) != 0) ++end;
    std::stable_sort(codes.begin() + static_cast<ptrdiff_t>(start), codes.begin() + static_cast<ptrdiff_t>(end),
                     [](uint32_t a, uint32_t b) { return rank_of(a) < rank_of(b); });
    start = end;
  }
}

void compose(std::vector<uint32_t>& codes) {
  size_t kept = 0, starter = SIZE_MAX;
  uint32_t last_rank = 0;
  for (const uint32_t code : codes) {
    const uint32_t rank = rank_of(code);
    const bool adjacent = starter != SIZE_MAX && kept == starter + 1;
    if (starter != SIZE_MAX && (adjacent || (last_rank != 0 && last_rank < rank))) {
      if (const uint32_t one = composed(codes[starter], code); one != 0) {
        codes[starter] = one;
        continue;
      }
    }
    if (rank == 0) starter = kept;
    last_rank = rank;
    codes[kept++] = code;
  }
  codes.resize(kept);
}

bool python_space(uint32_t code) { return is_space(code) || (code >= 0x1C && code <= 0x1F); }

}  // namespace

bool is_letter(uint32_t code) { return among(kLetters, code); }
bool is_number(uint32_t code) { return among(kNumbers, code); }
bool is_space(uint32_t code) { return among(kSpaces, code); }

size_t characters_of(std::string_view text) {
  return static_cast<size_t>(
      std::count_if(text.begin(), text.end(), [](char c) { return (static_cast<unsigned char>(c) & 0xC0) != 0x80; }));
}

size_t length_of(char lead) {
  const auto byte = static_cast<unsigned char>(lead);
  return byte < 0x80 ? 1 : byte < 0xE0 ? 2 : byte < 0xF0 ? 3 : 4;
}

uint32_t next_code(std::string_view text, size_t& at) {
  const auto lead = static_cast<unsigned char>(text[at]);
  const size_t length = length_of(text[at]);
  uint32_t code = length == 1 ? lead : lead & (0xFFu >> (length + 1));
  for (size_t i = 1; i < length && at + i < text.size(); ++i)
    code = code << 6 | (static_cast<unsigned char>(text[at + i]) & 0x3Fu);
  at = std::min(at + length, text.size());
  return code;
}

void append_code(std::string& text, uint32_t code) {
  if (code < 0x80) {
    text += static_cast<char>(code);
    return;
  }
  const int more = code < 0x800 ? 1 : code < 0x10000 ? 2 : 3;
  const unsigned lead = more == 1 ? 0xC0 : more == 2 ? 0xE0 : 0xF0;
  text += static_cast<char>(lead | code >> (6 * more));
  for (int i = more - 1; i >= 0; --i) text += static_cast<char>(0x80 | (code >> (6 * i) & 0x3F));
}

std::string nfc(std::string_view text) {
  if (std::all_of(text.begin(), text.end(), [](char c) { return static_cast<unsigned char>(c) < 0x80; })) {
    return std::string(text);
  }
  std::vector<uint32_t> codes;
  for (size_t at = 0; at < text.size();) append_apart(codes, next_code(text, at));
  order_marks(codes);
  compose(codes);
  std::string made;
  for (const uint32_t code : codes) append_code(made, code);
  return made;
}

std::string_view strip_left(std::string_view text) {
  size_t at = 0;
  while (at < text.size()) {
    size_t next = at;
    if (!python_space(next_code(text, next))) break;
    at = next;
  }
  return text.substr(at);
}

std::string_view strip_right(std::string_view text) {
  while (!text.empty()) {
    size_t start = text.size() - 1;
    while (start > 0 && (static_cast<unsigned char>(text[start]) & 0xC0) == 0x80) --start;
    size_t at = start;
    if (!python_space(next_code(text, at))) break;
    text = text.substr(0, start);
  }
  return text;
}

std::string lossy_utf8(std::string_view bytes) {
  std::string text;
  for (;;) {
    const auto bad = first_bad_utf8(bytes);
    text += bytes.substr(0, bad.value_or(bytes.size()));
    if (!bad) return text;
    text += "\xEF\xBF\xBD";
    // As much as could have begun a character is one mistake.
    const auto lead = static_cast<unsigned char>(bytes[*bad]);
    const size_t whole = lead >= 0xC2 && lead < 0xF5 ? length_of(bytes[*bad]) : 1;
    size_t taken = 1;
    while (taken < whole && *bad + taken < bytes.size()) {
      const auto byte = static_cast<unsigned char>(bytes[*bad + taken]);
      unsigned char low = 0x80, high = 0xBF;
      if (taken == 1) {
        if (lead == 0xE0) low = 0xA0;
        if (lead == 0xED) high = 0x9F;
        if (lead == 0xF0) low = 0x90;
        if (lead == 0xF4) high = 0x8F;
      }
      if (byte < low || byte > high) break;
      ++taken;
    }
    bytes.remove_prefix(*bad + taken);
  }
}

}  // namespace vlmtrim
