// A conversation of a session, turn by turn on the same caches. Mirrors runtime/generate.py for one row.
#pragma once

#include <atomic>
#include <functional>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "sampling.hpp"
#include "session.hpp"
#include "text/prompter.hpp"

namespace vlmtrim {

enum class Ended { kNot, kEos, kStop, kLength, kCapacity, kCancelled };

struct Step {
  int64_t index = 0, token = 0;
  std::string text;  // what the token adds to the answer; may be empty
  Ended ended = Ended::kNot;
  double sure = 0;  // probability of the likeliest token, where that was asked for
};

struct GenerateOptions {
  int64_t max_new_tokens = 128;
  Sampling sampling;
  std::vector<std::string> stop;
  std::vector<float> guide;  // what the visual tokens are ranked by, where another bundle provides that
  bool sure = false;         // tell with every step how probable the likeliest token was
};

struct Answer {
  std::string text;
  std::vector<int64_t> tokens;
  Ended ended = Ended::kNot;
  int64_t visual = 0, kept = 0;
  std::optional<std::vector<int64_t>> kept_by_layer;
  std::string caches;  // JSON of what a cache policy left; empty without one
};

// Called with every token; false ends the answer behind it.
using Listener = std::function<bool(const Step&)>;

// One thread at a time; cancel() from any.
class Chat {
 public:
  explicit Chat(std::shared_ptr<Model> model);

  Session& session() { return session_; }
  // Starts a new conversation; `system` stands before the first question, where the template has a place for it.
  void reset(const std::string& system);
  // Asks; `shown` are the pictures and videos of the parts, in order. Throws Refusal before the first token where they
  // do not fit.
  Answer generate(const std::vector<Part>& parts, const std::vector<Shown>& shown, const GenerateOptions& options,
                  const Listener& listener);
  // The same with token ids from outside, an image or video token for each; for bundles whose template is no
  // prompt.json.
  Answer generate_ids(const std::vector<int64_t>& ids, const std::vector<Shown>& shown, const GenerateOptions& options,
                      const Listener& listener);
  // Ends the answer that is being generated behind its next token.
  void cancel() { cancelled_ = true; }

 private:
  // Ids with the tokens of all pictures in place of their marks; `told`: what the prompt says of them is there.
  std::vector<int64_t> expanded(std::vector<int64_t> ids, const std::optional<Pictures>& pictures, bool told);
  std::optional<Pictures> prepared(const std::vector<Shown>& shown) const;
  Prefill fed(const std::vector<int64_t>& ids, const std::optional<Pictures>& pictures, const GenerateOptions& options);
  // Fills `answer` as far as it gets.
  void speak(const Prefill& prefill, const GenerateOptions& options, const Listener& listener,
             const std::shared_ptr<const Tokenizer>& tokenizer, Answer& answer);
  std::string left_in_caches(const Prefill& prefill);
  Ended end_of(int64_t token, int64_t index, const GenerateOptions& options) const;

  Session session_;
  std::unique_ptr<Conversation> conversation_;
  std::string system_;
  int64_t pending_ = -1;  // last token of an answer that was cut short: said, and not yet in the caches
  std::atomic<bool> cancelled_{false};
};

}  // namespace vlmtrim
