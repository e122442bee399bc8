#include "text/prompter.hpp"

#include <algorithm>
#include <cstdio>
#include <random>

#include "core/error.hpp"
#include "text/unicode.hpp"

namespace vlmtrim {
namespace {

constexpr int kFormSchema = 1;
constexpr size_t kCharactersAToken = 32;  // of a conversation
constexpr const char* kGiveIds = "give token ids";

// Names that nobody can guess, made of a private character and a number of 128 bits.
std::string secret_name(int64_t id) {
  static const std::string nonce = [] {
    std::random_device device;
    std::string digits;
    for (int i = 0; i < 4; ++i) {
      char part[16];
      std::snprintf(part, sizeof part, "%08x", device());
      digits += part;
    }
    return digits;
  }();
  return said("\xEE\x80\x80", nonce, id, "\xEE\x80\x81");
}

std::string trimmed(std::string_view text, Trim trim) {
  if (trim == Trim::kLeft || trim == Trim::kBoth) text = strip_left(text);
  if (trim == Trim::kRight || trim == Trim::kBoth) text = strip_right(text);
  return std::string(text);
}

const Json& need(const Json& form, const char* name, const std::string& where) {
  const auto found = form.find(name);
  if (found == form.end()) throw BundleError(said(where, " has no ", name));
  return *found;
}

Json form_of(const Folder& files) {
  if (!files.contains("prompt.json")) {
    throw Refusal(said(files.path().string(),
                       " has no prompt.json: its chat template is no list of segments, or it was exported by an older "
                       "vlmtrim; ",
                       kGiveIds, ", or export again"));
  }
  return files.json("prompt.json");
}

size_t characters_of(std::string_view text) {
  return static_cast<size_t>(
      std::count_if(text.begin(), text.end(), [](char c) { return (static_cast<unsigned char>(c) & 0xC0) != 0x80; }));
}

}  // namespace

Prompter::Prompter(const Folder& files, const Contract& contract, std::shared_ptr<const Tokenizer> tokenizer)
    : Prompter(form_of(files), (files.path() / "prompt.json").string(), contract, std::move(tokenizer)) {}

Prompter::Prompter(const Json& form, std::string where, const Contract& contract,
                   std::shared_ptr<const Tokenizer> tokenizer)
    : tokenizer_(std::move(tokenizer)),
      where_(std::move(where)),
      image_token_id_(contract.image_token_id),
      most_characters_(kCharactersAToken * static_cast<size_t>(contract.max_seq_len)) {
  if (need(form, "schema", where_) != kFormSchema) {
    throw BundleError(said(where_, " has schema ", shown(form["schema"]), ", this vlmtrim reads ", kFormSchema));
  }
  for (const auto& [id, text] : tokenizer_->control_tokens()) names_[id] = secret_name(id);
  if (names_.count(image_token_id_) == 0) {
    throw BundleError(
        said(where_, ": the image token, ", image_token_id_, ", is no control token of tokenizer.json; ", kGiveIds));
  }
  secret_ = tokenizer_->renamed(names_);
  start_ = text_value(need(form, "start", where_), where_ + ": start");
  spaced_ = text_value(need(form, "spaced", where_), where_ + ": spaced");
  const Json& openings = need(form, "openings", where_);
  if (!openings.is_array() || openings.size() > 4) throw BundleError(said(where_, ": openings is ", shown(openings)));
  for (const auto& entry : openings) {
    if (!entry.is_object()) throw BundleError(said(where_, ": an opening is ", shown(entry)));
    Opening opening{boolean(need(entry, "pictures", where_), where_ + ": pictures"),
                    boolean(need(entry, "system", where_), where_ + ": system"),
                    segments(entry, "before"),
                    {}};
    if (opening.system) opening.between = segments(entry, "between");
    openings_.push_back(std::move(opening));
  }
  image_ = segments(form, "image");
  joint_ = segments(form, "joint");
  text_ = segments(form, "text");
  asked_ = segments(form, "asked");
  again_ = segments(form, "again");
  const Json& trims = need(form, "trims", where_);
  if (!trims.is_object()) throw BundleError(said(where_, ": trims is ", shown(trims)));
  system_trim_ = trim(trims, "system");
  question_trim_ = trim(trims, "question");
  answer_trim_ = trim(trims, "answer");
  keeps_order_ = boolean(need(form, "keeps_order", where_), where_ + ": keeps_order");
  late_pictures_ = boolean(need(form, "late_pictures", where_), where_ + ": late_pictures");
  videos_ = boolean(form.value("videos", Json(false)), where_ + ": videos");  // older ones do not say
}

void Prompter::check_videos() const {
  if (videos_) return;
  throw Refusal(said(where_, " does not say that videos are written as pictures are; ", kGiveIds, ", or export again"));
}

Segments Prompter::segments(const Json& form, const char* name) const {
  const Json& list = need(form, name, where_);
  const std::string place = where_ + ": " + name;
  if (!list.is_array() || list.size() > 4096) throw BundleError(said(place, " is ", shown(list), "; expected a list"));
  Segments made;
  for (const auto& entry : list) {
    if (entry.is_string()) {
      made.push_back({Segment::Kind::kText, text_value(entry, place, 1 << 16), 0});
    } else if (entry.is_object()) {
      made.push_back({Segment::Kind::kDate, text_value(need(entry, "date", place), place, 64), 0});
    } else {
      const int64_t id = integer(entry, place, 0, kLargestSize);
      if (names_.count(id) == 0) throw BundleError(said(place, " holds ", id, ", which is no control token"));
      made.push_back({Segment::Kind::kToken, *tokenizer_->token_of(id), id});
    }
  }
  return made;
}

Trim Prompter::trim(const Json& form, const char* name) const {
  const Json& value = need(form, name, where_);
  if (value == "") return Trim::kNone;
  if (value == "left") return Trim::kLeft;
  if (value == "right") return Trim::kRight;
  if (value == "both") return Trim::kBoth;
  throw BundleError(said(where_, ": trims.", name, " is ", shown(value)));
}

std::vector<int64_t> expand_images(const std::vector<int64_t>& ids, int64_t image_token,
                                   const std::vector<int64_t>& tokens) {
  std::vector<int64_t> expanded;
  size_t picture = 0;
  for (const int64_t id : ids) {
    const bool mark = id == image_token;
    const int64_t count = !mark ? 1 : picture < tokens.size() ? tokens[picture] : 0;
    expanded.insert(expanded.end(), static_cast<size_t>(count), id);
    if (mark) ++picture;
  }
  if (picture != tokens.size()) {
    throw Refusal(said("the prompt holds ", picture, " image mark(s) for ", tokens.size(), " image(s)"));
  }
  return expanded;
}

std::vector<int64_t> tell_images(const std::vector<int64_t>& ids, int64_t image_token,
                                 const std::vector<std::string>& words, const std::vector<int64_t>& tokens,
                                 const Tokenizer& tokenizer) {
  const auto is_mark = [&](int64_t id) { return id == image_token; };
  const auto marks = static_cast<size_t>(std::count_if(ids.begin(), ids.end(), is_mark));
  if (marks != words.size()) {
    throw Refusal(said("the prompt holds ", marks, " image mark(s) for ", words.size(), " image(s)"));
  }
  std::vector<int64_t> told;
  size_t picture = 0;
  for (const int64_t id : ids) {
    if (!is_mark(id)) {
      told.push_back(id);
      continue;
    }
    // Between control tokens: cut alone as among the words around it.
    const std::vector<int64_t> own = tokenizer.encode(words[picture], false);
    const int64_t found = std::count_if(own.begin(), own.end(), is_mark);
    if (found != tokens[picture]) {
      throw Refusal(said("the tokenizer makes ", found, " image tokens of a picture of ", tokens[picture],
                         "; export the model again from one checkpoint"));
    }
    told.insert(told.end(), own.begin(), own.end());
    ++picture;
  }
  return told;
}

Conversation::Conversation(const Prompter& prompter, std::string system)
    : prompter_(prompter), system_(std::move(system)) {
  if (first_bad_utf8(system_)) throw Refusal("the system text is no valid Unicode text; give UTF-8");
  const std::time_t now = std::time(nullptr);
  localtime_r(&now, &began_);  // another date in a later turn would rewrite the first one
  now_.characters = characters_of(system_);
}

std::vector<int64_t> Conversation::ask(const std::vector<Part>& parts) {
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
  write_question(written, parts);
  write(written, prompter_.asked_);
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

void Conversation::write_question(Written& target, const std::vector<Part>& parts) const {
  const bool first =
      std::is_sorted(parts.begin(), parts.end(), [](const Part& a, const Part& b) { return a.picture && !b.picture; });
  if (first || prompter_.keeps_order_) {
    bool texts = false, marks = false;
    for (const Part& part : parts) {
      if (part.picture) {
        write(target, prompter_.image_);
        marks = true;
        texts = false;
        continue;
      }
      if (texts) write(target, prompter_.joint_);
      else if (!marks || first) write(target, prompter_.text_);
      texts = true;
      target.type(trimmed(part.text, prompter_.question_trim_));
    }
    return;
  }
  // The template writes pictures first, so the question is one text with the marks in it.
  Written whole;
  for (const Part& part : parts) {
    const Segment mark{Segment::Kind::kToken, *prompter_.tokenizer_->token_of(prompter_.image_token_id_),
                       prompter_.image_token_id_};
    if (part.picture) {
      write(whole, {mark});
    } else {
      whole.plain += part.text;
      whole.secret += part.text;
    }
  }
  write(target, prompter_.text_);
  target.typed = std::min(target.typed, target.plain.size());
  target.plain += trimmed(whole.plain, prompter_.question_trim_);
  target.secret += trimmed(whole.secret, prompter_.question_trim_);
}

// The directives that prompt.json may hold, in English whatever the locale is.
std::string Conversation::date(const std::string& format) const {
  static const char* const kDays[] = {"Sunday", "Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday"};
  static const char* const kMonths[] = {"January", "February", "March",     "April",   "May",      "June",
                                        "July",    "August",   "September", "October", "November", "December"};
  const auto number = [](int value, int width) {
    char text[16];
    std::snprintf(text, sizeof text, "%0*d", width, value);
    return std::string(text);
  };
  const std::string day = kDays[began_.tm_wday], month = kMonths[began_.tm_mon];
  std::string made;
  for (size_t i = 0; i < format.size(); ++i) {
    if (format[i] != '%' || i + 1 == format.size()) {
      made += format[i];
      continue;
    }
    switch (format[++i]) {
      case 'a':
        made += day.substr(0, 3);
        break;
      case 'A':
        made += day;
        break;
      case 'b':
        made += month.substr(0, 3);
        break;
      case 'B':
        made += month;
        break;
      case 'd':
        made += number(began_.tm_mday, 2);
        break;
      case 'e':
        made += (began_.tm_mday < 10 ? " " : "") + number(began_.tm_mday, 1);
        break;
      case 'D':
        made += number(began_.tm_mon + 1, 2) + "/" + number(began_.tm_mday, 2) + "/" + number(began_.tm_year % 100, 2);
        break;
      case 'H':
        made += number(began_.tm_hour, 2);
        break;
      case 'I':
        made += number((began_.tm_hour + 11) % 12 + 1, 2);
        break;
      case 'j':
        made += number(began_.tm_yday + 1, 3);
        break;
      case 'M':
        made += number(began_.tm_min, 2);
        break;
      case 'm':
        made += number(began_.tm_mon + 1, 2);
        break;
      case 'p':
        made += began_.tm_hour < 12 ? "AM" : "PM";
        break;
      case 'S':
        made += number(began_.tm_sec, 2);
        break;
      case 'y':
        made += number(began_.tm_year % 100, 2);
        break;
      case 'Y':
        made += number(began_.tm_year + 1900, 1);
        break;
      case '%':
        made += '%';
        break;
      default:
        throw BundleError(said(prompter_.where_, " writes a date as ", shown(format)));
    }
  }
  return made;
}

}  // namespace vlmtrim
