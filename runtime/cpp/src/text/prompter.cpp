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
  ended_ = asked_;  // of older ones
  if (const auto found = form.find("ended"); found != form.end()) {
    if (found->is_null()) ended_.reset();
    else ended_ = segments(form, "ended");
  }
  again_ = segments(form, "again");
  if (const auto video = form.find("video"); video != form.end() && !video->is_null()) {
    if (!video->is_object()) throw BundleError(said(where_, ": video is ", shown(*video), "; expected an object"));
    video_.emplace(segments(*video, "before"), segments(*video, "behind"));
  }
  const Json& trims = need(form, "trims", where_);
  if (!trims.is_object()) throw BundleError(said(where_, ": trims is ", shown(trims)));
  system_trim_ = trim(trims, "system");
  question_trim_ = trim(trims, "question");
  answer_trim_ = trim(trims, "answer");
  mark_ = integer(form.value("mark", Json(image_token_id_)), where_ + ": mark", 0, kLargestSize);  // older ones lack it
  if (names_.count(mark_) == 0) throw BundleError(said(where_, ": mark is ", mark_, ", which is no control token"));
  const Json& order = need(form, "keeps_order", where_);
  if (!order.is_null()) keeps_order_ = boolean(order, where_ + ": keeps_order");
  late_pictures_ = boolean(need(form, "late_pictures", where_), where_ + ": late_pictures");
  videos_ = boolean(form.value("videos", Json(false)), where_ + ": videos");  // older ones do not say
}

void Prompter::check_videos(bool told) const {
  if (told ? video_.has_value() : videos_) return;
  const char* const what = told ? "how videos are written" : "that videos are written as pictures are";
  throw Refusal(said(where_, " does not say ", what, "; ", kGiveIds, ", or export again"));
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

}  // namespace vlmtrim
