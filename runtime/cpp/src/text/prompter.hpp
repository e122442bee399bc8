// Questions -> token ids, by the segments of prompt.json and the bundle's tokenizer. What people type is text and stays
// text: the template alone writes control tokens. Mirrors runtime/prompt.py; prompt.json is export/prompt_form.py's.
#pragma once

#include <ctime>
#include <memory>
#include <optional>
#include <string>
#include <string_view>
#include <variant>
#include <vector>

#include "core/bundle.hpp"
#include "text/tokenizer.hpp"

namespace vlmtrim {

constexpr const char* kGiveIds = "give token ids";  // what else to do where a template or tokenizer is not known

// A piece of a question: text, or a picture or a video in its place.
struct Part {
  std::string text;
  bool picture = false;
  bool video = false;  // a picture that is a video
};

// Of the template: text, a control token, or a date by its strftime format.
struct Segment {
  enum class Kind { kText, kToken, kDate } kind;
  std::string text;
  int64_t id = 0;
};
using Segments = std::vector<Segment>;

enum class Trim { kNone, kLeft, kRight, kBoth };

struct Opening {
  bool pictures = false, system = false;
  Segments before, between;
};

// Holds no state of a conversation: one serves all sessions of a model.
class Prompter {
 public:
  // Throws BundleError or Refusal.
  Prompter(const Folder& files, const Contract& contract, std::shared_ptr<const Tokenizer> tokenizer);
  // The same of what prompt.json holds; `where` is for messages.
  Prompter(const Json& form, std::string where, const Contract& contract, std::shared_ptr<const Tokenizer> tokenizer);

  // Throws Refusal where the form does not say how videos are written; `told`: whether words stand in their places.
  void check_videos(bool told) const;

 private:
  friend class Conversation;

  Segments segments(const Json& form, const char* name) const;
  Trim trim(const Json& form, const char* name) const;

  std::shared_ptr<const Tokenizer> tokenizer_, secret_;
  std::map<int64_t, std::string> names_;  // of control tokens in the secret tokenizer
  std::string where_, start_, spaced_;
  std::vector<Opening> openings_;
  Segments image_, joint_, text_, asked_, again_;
  Trim system_trim_ = Trim::kNone, question_trim_ = Trim::kNone, answer_trim_ = Trim::kNone;
  std::optional<std::pair<Segments, Segments>> video_;  // what stands around a video's words
  std::optional<Segments> ended_;  // behind a question that ends with a picture; unknown where that is no list
  std::optional<bool> keeps_order_;
  bool late_pictures_ = false, videos_ = false;
  int64_t image_token_id_, mark_;  // what words stand in place of, among the segments of a picture
  size_t most_characters_;
};

// Repeats the image token of every picture for each of its visual tokens. Throws Refusal.
std::vector<int64_t> expand_images(const std::vector<int64_t>& ids, int64_t image_token,
                                   const std::vector<int64_t>& tokens);

// Puts what the prompt says of every picture, which has all its image tokens, in place of its mark among ids from
// outside: cut into tokens on its own, whatever stands around it. Throws Refusal.
std::vector<int64_t> tell_images(const std::vector<int64_t>& ids, int64_t image_token,
                                 const std::vector<std::string>& words, const std::vector<int64_t>& tokens,
                                 const Tokenizer& tokenizer);

// The turns of a conversation; knows what the caches already hold of it.
class Conversation {
 public:
  Conversation(const Prompter& prompter, std::string system);

  // Ids that continue the caches with a question; image tokens are not repeated yet. `words` stand in place of the
  // pictures' marks; empty for the marks. Throws Refusal.
  std::vector<int64_t> ask(const std::vector<Part>& parts, const std::vector<std::string>& words = {});
  // Forgets the question that was just asked: the caches did not take it.
  void take_back() { now_ = before_; }
  // Records what the assistant said.
  void answer(const std::string& text);

 private:
  struct State {
    bool begun = false, pictured = false, open = false;
    std::string said;
    size_t characters = 0;
  };
  // Text for the secret tokenizer, the same with the tokens' own names, and where in that the first words stand which
  // people wrote.
  struct Written {
    std::string secret, plain;
    size_t typed = SIZE_MAX;

    void type(const std::string& text);
  };

  void write(Written& target, const Segments& segments) const;
  void write_opening(Written& target, size_t pictures) const;
  void write_later(Written& target, size_t pictures) const;
  void write_question(Written& target, const std::vector<Part>& parts, const std::vector<std::string>& words) const;
  void write_one_text(Written& target, std::vector<Part> parts, const std::vector<std::string>& words) const;
  void write_picture(Written& target, bool video, const std::string* words) const;
  void write_words(Written& target, const std::string& words) const;
  Segment mark() const;
  std::string date(const std::string& format) const;

  const Prompter& prompter_;
  std::string system_;
  std::tm began_{};
  State now_, before_;
};

}  // namespace vlmtrim
