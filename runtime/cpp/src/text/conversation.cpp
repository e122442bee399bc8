// The turns of a conversation, by a prompter's segments.
#include <algorithm>

#include "core/error.hpp"
#include "text/prompter.hpp"
#include "text/unicode.hpp"

namespace vlmtrim {
namespace {

std::string trimmed(std::string_view text, Trim trim) {
  if (trim == Trim::kLeft || trim == Trim::kBoth) text = strip_left(text);
  if (trim == Trim::kRight || trim == Trim::kBoth) text = strip_right(text);
  return std::string(text);
}

}  // namespace

Conversation::Conversation(const Prompter& prompter, std::string system)
    : prompter_(prompter), system_(std::move(system)) {
  if (first_bad_utf8(system_)) throw Refusal("the system text is no valid Unicode text; give UTF-8");
  const std::time_t now = std::time(nullptr);
  localtime_r(&now, &began_);  // another date in a later turn would rewrite the first one
  now_.characters = characters_of(system_);
}

std::vector<int64_t> Conversation::ask(const std::vector<Part>& parts, const std::vector<std::string>& words) {
  size_t pictures = 0, characters = now_.characters;
  for (const Part& part : parts) {
    if (first_bad_utf8(part.text)) throw Refusal("the prompt is no valid Unicode text; give UTF-8");
    if (part.picture) ++pictures;
    characters += characters_of(part.text);
  }
  if (characters > prompter_.most_characters_) {
    throw Refusal(said("the conversation has ", characters, " characters, this bundle takes ",
                       prompter_.most_characters_,
                       "; shorten the prompt, reset the conversation, or export with a larger --max-seq-len"));
  }
  if (now_.open) answer("");  // nobody waited for it
  Written written;
  if (now_.begun) write_later(written, pictures);
  else write_opening(written, pictures);
  write_question(written, parts, words);
  // A start token that people spell is none.
  const std::string& start = prompter_.start_;
  const bool starts =
      !start.empty() && written.typed >= start.size() && written.plain.compare(0, start.size(), start) == 0;
  const std::vector<int64_t> ids = prompter_.secret_->encode(written.secret, !now_.begun && !starts);
  before_ = now_;
  now_.begun = now_.open = true;
  now_.pictured = now_.pictured || pictures > 0;
  now_.characters = characters;
  return ids;
}

void Conversation::answer(const std::string& text) {
  now_.said = text;
  now_.open = false;
  now_.characters += characters_of(text);
}

void Conversation::Written::type(const std::string& text) {
  if (!text.empty()) typed = std::min(typed, plain.size());
  plain += text;
  secret += text;
}

void Conversation::write(Written& target, const Segments& segments) const {
  for (const Segment& segment : segments) {
    const std::string text = segment.kind == Segment::Kind::kDate ? date(segment.text) : segment.text;
    target.plain += text;
    target.secret += segment.kind == Segment::Kind::kToken ? prompter_.names_.at(segment.id) : text;
  }
}

void Conversation::write_opening(Written& target, size_t pictures) const {
  for (const Opening& opening : prompter_.openings_) {
    if (opening.pictures != (pictures > 0) || opening.system == system_.empty()) continue;
    write(target, opening.before);
    if (system_.empty()) return;
    target.type(trimmed(system_, prompter_.system_trim_));
    write(target, opening.between);
    return;
  }
  throw Refusal(said("the chat template refuses a conversation with a system text",
                     pictures > 0 ? " and pictures; leave one of them out" : "; leave it out"));
}

// What stands behind the answer: the caches hold what was said, not what the template writes around it.
void Conversation::write_later(Written& target, size_t pictures) const {
  const Refusal rewrites(
      "the chat template rewrites earlier turns, so the caches cannot be continued; start a new conversation");
  if (pictures > 0 && !now_.pictured && !prompter_.late_pictures_) throw rewrites;
  Written behind;
  write(behind, prompter_.again_);
  const std::string head = prompter_.spaced_ + trimmed(now_.said, prompter_.answer_trim_);
  const std::string whole = head + behind.plain;
  std::string said = now_.said;
  if (whole.find(said) == std::string::npos) said = trimmed(said, Trim::kBoth);
  const size_t at = whole.find(said);
  if (at == std::string::npos || !strip_left(std::string_view(whole).substr(0, at)).empty()) throw rewrites;
  const size_t end = at + said.size();
  if (end > head.size()) throw rewrites;
  target.plain = whole.substr(end);
  target.secret = head.substr(end) + behind.secret;
}

// Up to the answer. `words`: what stands in place of the pictures' marks, in order; empty for the marks.
void Conversation::write_question(Written& target, const std::vector<Part>& parts,
                                  const std::vector<std::string>& words) const {
  const bool first =
      std::is_sorted(parts.begin(), parts.end(), [](const Part& a, const Part& b) { return a.picture && !b.picture; });
  if (!first && !prompter_.keeps_order_) {
    throw Refusal(
        said("the chat template writes pictures between words in another way than before them; put them before the "
             "words, or ",
             kGiveIds));
  }
  if (!first && !*prompter_.keeps_order_) return write_one_text(target, parts, words);
  auto word = words.begin();
  const Part* before = nullptr;
  for (const Part& part : parts) {
    const bool joins = before != nullptr && !before->picture;
    if (joins) write(target, prompter_.joint_);
    if (part.picture) {
      write_picture(target, part.video, word == words.end() ? nullptr : &*word++);
    } else {
      if (!joins) write(target, prompter_.text_);
      target.type(trimmed(part.text, prompter_.question_trim_));
    }
    before = &part;
  }
  if (before == nullptr || !before->picture) return write(target, prompter_.asked_);
  if (!prompter_.ended_) {
    throw Refusal(
        said("the chat template writes a question that ends with a picture in another way; put words behind it, or ",
             kGiveIds));
  }
  write(target, *prompter_.ended_);
}

// A question of a template that writes pictures first: one text with the marks in it.
void Conversation::write_one_text(Written& target, std::vector<Part> parts,
                                  const std::vector<std::string>& words) const {
  const Trim trim = prompter_.question_trim_;
  const auto strip = [](auto part, const auto& end, Trim side) {
    for (; part != end && !part->picture; ++part) {
      part->text = trimmed(part->text, side);
      if (!part->text.empty()) break;
    }
  };
  if (trim == Trim::kLeft || trim == Trim::kBoth) strip(parts.begin(), parts.end(), Trim::kLeft);
  if (trim == Trim::kRight || trim == Trim::kBoth) strip(parts.rbegin(), parts.rend(), Trim::kRight);
  write(target, prompter_.text_);
  auto word = words.begin();
  for (const Part& part : parts) {
    if (!part.picture) target.type(part.text);
    else if (word == words.end()) write(target, {mark()});
    else write_words(target, *word++);
  }
  write(target, prompter_.asked_);
}

Segment Conversation::mark() const {
  return {Segment::Kind::kToken, *prompter_.tokenizer_->token_of(prompter_.mark_), prompter_.mark_};
}

void Conversation::write_words(Written& target, const std::string& words) const {
  target.plain += words;
  target.secret += prompter_.tokenizer_->with_names(words, prompter_.names_);
}

// A picture or a video as the template writes it, with words in place of its mark where there are any.
void Conversation::write_picture(Written& target, bool video, const std::string* words) const {
  if (words != nullptr && video) {
    prompter_.check_videos(true);
    write(target, prompter_.video_->first);
    write_words(target, *words);
    return write(target, prompter_.video_->second);
  }
  for (const Segment& segment : prompter_.image_) {
    const bool told = segment.kind == Segment::Kind::kToken && segment.id == prompter_.mark_;
    if (words != nullptr && told) write_words(target, *words);
    else write(target, {segment});
  }
}

}  // namespace vlmtrim
