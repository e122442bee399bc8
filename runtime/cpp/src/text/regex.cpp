#include "text/regex.hpp"

#include <algorithm>
#include <memory>

#include "core/error.hpp"
#include "text/unicode.hpp"

namespace vlmtrim {
namespace {

constexpr size_t kMostSteps = 4096, kDeepest = 32;
constexpr int kMostRepeats = 64;
constexpr int64_t kStepsACharacter = 4096;  // of a search, on average; the patterns of models need 20

// The lower-case form where the case does not matter: of ASCII, and of what Unicode folds to it.
uint32_t folded(uint32_t code) {
  if (code >= 'A' && code <= 'Z') return code + 32;
  if (code == 0x17F) return 's';
  return code == 0x212A ? 'k' : code;
}

}  // namespace

bool Regex::Set::has(uint32_t given) const {
  const auto property = [&](char name) {
    return name == 'L' ? is_letter(given) : name == 'N' ? is_number(given) : is_space(given);
  };
  bool found = std::any_of(properties.begin(), properties.end(), property) ||
               std::any_of(without.begin(), without.end(), [&](char name) { return !property(name); });
  const uint32_t code = this->folded ? vlmtrim::folded(given) : given;
  for (const auto& [first, last] : ranges) found = found || (code >= first && code <= last);
  return found != negated;
}

// Writes a Regex's steps while it reads the pattern.
class RegexParser {
 public:
  RegexParser(std::string_view pattern, Regex& target) : pattern_(pattern), target_(target) {}

  void parse() {
    alternatives(0);
    if (at_ < pattern_.size()) refuse("an unmatched )");
    target_.steps_.push_back({Regex::Op::kMatch});
  }

 private:
  [[noreturn]] void refuse(const std::string& what) const {
    throw Refusal(said("the bundle's tokenizer splits by a regular expression with ", what,
                       ", which the C++ runtime does not know; give token ids"));
  }

  bool more() const { return at_ < pattern_.size(); }
  bool next_is(std::string_view text) const { return pattern_.substr(at_, text.size()) == text; }
  bool take(std::string_view text) {
    if (!next_is(text)) return false;
    at_ += text.size();
    return true;
  }

  size_t add(Regex::Step step) {
    if (target_.steps_.size() >= kMostSteps) refuse("too many parts");
    target_.steps_.push_back(step);
    return target_.steps_.size() - 1;
  }

  void alternatives(size_t depth) {
    if (depth > kDeepest) refuse("too many groups in groups");
    std::vector<size_t> ends;
    for (;;) {
      const size_t start = target_.steps_.size();
      sequence(depth);
      if (!take("|")) break;
      // A split goes in front of what was just written, whose own targets move on by one.
      insert_split(start);
      ends.push_back(add({Regex::Op::kJump}));
      target_.steps_[start].second = target_.steps_.size();
    }
    for (const size_t end : ends) target_.steps_[end].first = target_.steps_.size();
  }

  void insert_split(size_t place) {
    add({Regex::Op::kSplit});
    auto& steps = target_.steps_;
    for (size_t i = steps.size() - 1; i > place; --i) steps[i] = moved(steps[i - 1], place, 1);
    steps[place] = {Regex::Op::kSplit, 0, place + 1, 0};
  }

  static Regex::Step moved(Regex::Step step, size_t from, size_t by) {
    const bool goes = step.op == Regex::Op::kSplit || step.op == Regex::Op::kJump || step.op == Regex::Op::kAhead ||
                      step.op == Regex::Op::kNotAhead;
    if (goes && step.first >= from) step.first += by;
    if (goes && step.second >= from) step.second += by;
    return step;
  }

  void sequence(size_t depth) {
    while (more() && !next_is("|") && !next_is(")")) {
      const size_t start = target_.steps_.size();
      atom(depth);
      repetition(start);
    }
  }

  void repetition(size_t start) {
    int least = 1, most = 1;
    if (take("?")) least = 0;
    else if (take("*")) least = 0, most = -1;
    else if (take("+")) most = -1;
    else if (next_is("{")) counts(least, most);
    else return;
    if (next_is("?") || next_is("+") || next_is("*") || next_is("{")) refuse("a lazy or possessive repetition");
    const std::vector<Regex::Step> body(target_.steps_.begin() + static_cast<ptrdiff_t>(start), target_.steps_.end());
    target_.steps_.resize(start);
    const auto write = [&] {
      const size_t by = target_.steps_.size() - start;
      for (const auto& step : body) add(moved(step, start, by));
    };
    for (int i = 0; i < least; ++i) write();
    if (most < 0) {
      const size_t split = add({Regex::Op::kSplit});
      write();
      add({Regex::Op::kJump, 0, split, 0});
      target_.steps_[split].first = split + 1;
      target_.steps_[split].second = target_.steps_.size();
      return;
    }
    std::vector<size_t> splits;
    for (int i = least; i < most; ++i) {
      splits.push_back(add({Regex::Op::kSplit}));
      target_.steps_[splits.back()].first = splits.back() + 1;
      write();
    }
    for (const size_t split : splits) target_.steps_[split].second = target_.steps_.size();
  }

  void counts(int& least, int& most) {
    const size_t end = pattern_.find('}', at_);
    if (end == std::string_view::npos) refuse("an unmatched {");
    const std::string text(pattern_.substr(at_ + 1, end - at_ - 1));
    int read = 0;
    const bool two = std::sscanf(text.c_str(), "%2d,%2d%n", &least, &most, &read) == 2;
    const bool one = !two && std::sscanf(text.c_str(), "%2d%n", &least, &read) == 1;
    if (one) most = least;
    if ((!two && !one) || static_cast<size_t>(read) != text.size() || least < 0 || most < least ||
        most > kMostRepeats) {
      refuse("the repetition {" + text + "}");
    }
    at_ = end + 1;
  }

  void atom(size_t depth) {
    if (take("(")) return group(depth);
    Regex::Set set;
    set.folded = folds_;
    if (take("[")) {
      bracket(set);
    } else if (take(".")) {
      set.negated = true;
      set.ranges.emplace_back('\n', '\n');
    } else if (take("\\")) {
      escape(set);
    } else {
      if (next_is("^") || next_is("$") || next_is("*") || next_is("+") || next_is("?")) {
        refuse(std::string("a ") + pattern_[at_]);
      }
      literal(set, next_code(pattern_, at_));
    }
    add_set(set);
  }

  void add_set(const Regex::Set& set) {
    target_.sets_.push_back(set);
    add({Regex::Op::kSet, target_.sets_.size() - 1, 0, 0});
  }

  void literal(Regex::Set& set, uint32_t code) const {
    const uint32_t own = folds_ ? folded(code) : code;
    set.ranges.emplace_back(own, own);
  }

  void group(size_t depth) {
    const bool before = folds_;
    const bool ahead = take("?="), not_ahead = !ahead && take("?!");
    if (!ahead && !not_ahead) {
      if (take("?i:")) folds_ = true;
      else if (!take("?:") && next_is("?")) refuse("a group of another kind");
    }
    size_t look = 0;
    if (ahead || not_ahead) look = add({ahead ? Regex::Op::kAhead : Regex::Op::kNotAhead});
    alternatives(depth + 1);
    if (!take(")")) refuse("an unmatched (");
    if (ahead || not_ahead) {
      add({Regex::Op::kMatch});
      target_.steps_[look].first = look + 1;
      target_.steps_[look].second = target_.steps_.size();
    }
    folds_ = before;
  }

  void escape(Regex::Set& set) {
    if (!more()) refuse("a \\ at its end");
    const char kind = pattern_[at_];
    const size_t before = at_;
    const uint32_t code = next_code(pattern_, at_);
    if (kind == 's') set.properties += 's';
    else if (kind == 'S') set.without += 's';
    else if (kind == 'r') literal(set, '\r');
    else if (kind == 'n') literal(set, '\n');
    else if (kind == 't') literal(set, '\t');
    else if (kind == 'p' || kind == 'P') {
      const bool letters = take("{L}"), numbers = !letters && take("{N}");
      if (!letters && !numbers) refuse("the property " + std::string(pattern_.substr(before - 1, 8)));
      (kind == 'p' ? set.properties : set.without) += letters ? 'L' : 'N';
    } else if ((kind >= 'a' && kind <= 'z') || (kind >= 'A' && kind <= 'Z') || (kind >= '0' && kind <= '9')) {
      refuse(std::string("\\") + kind);
    } else {
      literal(set, code);
    }
  }

  void bracket(Regex::Set& set) {
    set.negated = take("^");
    for (bool first = true; !take("]"); first = false) {
      if (!more() || (first && next_is("]")) || next_is("[") || next_is("&&")) refuse("a class of another kind");
      if (take("\\")) {
        escape(set);
        continue;
      }
      const uint32_t low = next_code(pattern_, at_);
      if (!next_is("-") || next_is("-]")) {
        literal(set, low);
        continue;
      }
      take("-");
      if (!more() || next_is("\\") || next_is("[")) refuse("a range of another kind");
      const uint32_t high = next_code(pattern_, at_);
      if (folds_ || high < low) refuse("a range of another kind");
      set.ranges.emplace_back(low, high);
    }
  }

  std::string_view pattern_;
  Regex& target_;
  size_t at_ = 0;
  bool folds_ = false;
};

Regex::Regex(std::string_view pattern) { RegexParser(pattern, *this).parse(); }

std::vector<std::pair<size_t, size_t>> Regex::matches(std::string_view text) const {
  std::vector<std::pair<size_t, size_t>> found;
  int64_t budget = kStepsACharacter * (static_cast<int64_t>(text.size()) + 16);
  for (size_t at = 0; at < text.size();) {
    const size_t end = match(text, at, 0, budget);
    if (end == std::string_view::npos || end == at) {
      at += length_of(text[at]);
      continue;
    }
    found.emplace_back(at, end);
    at = end;
  }
  return found;
}

size_t Regex::match(std::string_view text, size_t start, size_t step, int64_t& budget) const {
  std::vector<std::pair<size_t, size_t>> pending{{step, start}};
  while (!pending.empty()) {
    auto [now, at] = pending.back();
    pending.pop_back();
    for (bool alive = true; alive;) {
      if (--budget < 0) throw Refusal("the bundle's tokenizer takes too long to split this text; give token ids");
      const Step& todo = steps_[now];
      switch (todo.op) {
        case Op::kMatch:
          return at;
        case Op::kSet: {
          size_t next = at;
          alive = at < text.size() && sets_[todo.set].has(next_code(text, next));
          at = next;
          ++now;
          break;
        }
        case Op::kSplit:
          pending.emplace_back(todo.second, at);
          now = todo.first;
          break;
        case Op::kJump:
          now = todo.first;
          break;
        case Op::kAhead:
        case Op::kNotAhead: {
          const bool there = match(text, at, todo.first, budget) != std::string_view::npos;
          alive = there == (todo.op == Op::kAhead);
          now = todo.second;
          break;
        }
      }
    }
  }
  return std::string_view::npos;
}

}  // namespace vlmtrim
