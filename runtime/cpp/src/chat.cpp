#include "chat.hpp"

#include <algorithm>
#include <numeric>

#include "core/error.hpp"
#include "text/unicode.hpp"

namespace vlmtrim {
namespace {

bool has_video(const std::vector<Shown>& shown) {
  return std::any_of(shown.begin(), shown.end(), [](const Shown& one) { return one.is_video(); });
}

}  // namespace

Chat::Chat(std::shared_ptr<Model> model) : session_(std::move(model)) {}

void Chat::reset(const std::string& system) {
  session_.reset();
  conversation_.reset();
  system_ = system;
  pending_ = -1;
}

Answer Chat::generate(const std::vector<Part>& parts, const std::vector<Shown>& shown, const GenerateOptions& options,
                      const Listener& listener) {
  cancelled_ = false;
  const Prompter& prompter = session_.model().prompter();
  const auto marks = std::count_if(parts.begin(), parts.end(), [](const Part& part) { return part.picture; });
  if (marks != static_cast<ptrdiff_t>(shown.size())) throw Refusal("parts and pictures of a question differ");
  const bool words =
      std::any_of(parts.begin(), parts.end(), [](const Part& part) { return !strip_left(part.text).empty(); });
  if (!words && shown.empty()) throw Refusal("the prompt is empty; ask something, or give a picture");
  const auto prepared = this->prepared(shown);
  if (has_video(shown)) prompter.check_videos(!prepared->words.empty());
  if (!conversation_) conversation_ = std::make_unique<Conversation>(prompter, system_);
  Prefill prefill;
  const std::vector<int64_t> fresh = conversation_->ask(parts, prepared ? prepared->words : std::vector<std::string>{});
  try {
    prefill = fed(expanded(fresh, prepared, true), prepared, options);
  } catch (...) {
    conversation_->take_back();
    throw;
  }
  Answer answer;
  try {
    speak(prefill, options, listener, session_.model().tokenizer(), answer);
  } catch (...) {
    conversation_->answer(answer.text);
    throw;
  }
  conversation_->answer(answer.text);
  return answer;
}

Answer Chat::generate_ids(const std::vector<int64_t>& ids, const std::vector<Shown>& shown,
                          const GenerateOptions& options, const Listener& listener) {
  cancelled_ = false;
  const auto prepared = this->prepared(shown);
  const auto expanded = this->expanded(ids, prepared, false);
  std::shared_ptr<const Tokenizer> tokenizer;
  try {
    tokenizer = session_.model().tokenizer();
  } catch (const std::exception&) {  // one that this code does not know: the answer is its ids
  }
  Answer answer;
  speak(fed(expanded, prepared, options), options, listener, tokenizer, answer);
  return answer;
}

std::vector<int64_t> Chat::expanded(std::vector<int64_t> ids, const std::optional<Pictures>& pictures, bool told) {
  const int64_t image = session_.contract().image_token_id;
  // Features take their places all the same.
  if (const auto video = session_.contract().video_token_id) std::replace(ids.begin(), ids.end(), *video, image);
  if (!pictures) return expand_images(ids, image, {});
  if (pictures->words.empty()) return expand_images(ids, image, pictures->tokens);
  const auto tokens = std::accumulate(pictures->tokens.begin(), pictures->tokens.end(), int64_t{0});
  if (told) return expand_images(ids, image, std::vector<int64_t>(static_cast<size_t>(tokens), 1));
  if (std::count(ids.begin(), ids.end(), image) == tokens) return ids;
  return tell_images(ids, image, pictures->words, pictures->tokens, *session_.model().tokenizer());
}

std::optional<Pictures> Chat::prepared(const std::vector<Shown>& shown) const {
  if (shown.empty()) return std::nullopt;
  if (has_video(shown) && !session_.model().processor().takes_videos()) {
    throw Refusal(said("bundles of ", session_.contract().family, " take no videos; give the frames as pictures"));
  }
  Pictures made = session_.model().processor().prepare(shown);
  const int64_t brought = std::accumulate(made.tokens.begin(), made.tokens.end(), int64_t{0});
  if (const int64_t most = session_.contract().dims.at("N").second; brought > most) {
    throw Refusal(said(shown.size(), " images of ", brought, " visual tokens for one prompt; a conversation of ",
                       session_.contract().max_seq_len, " tokens holds at most ", most, " of them"));
  }
  return made;
}

Prefill Chat::fed(const std::vector<int64_t>& ids, const std::optional<Pictures>& pictures,
                  const GenerateOptions& options) {
  if (options.max_new_tokens < 1) {
    throw Refusal(said("max_new_tokens is ", options.max_new_tokens, "; give 1 or more"));
  }
  options.sampling.check();
  const Stopper checked(options.stop);
  // Fed on its own: were it the image token, the prefill would take it for a visual token.
  if (pending_ >= 0 && session_.room() > 0) session_.decode(pending_);
  pending_ = -1;
  return session_.prefill(ids, pictures ? &*pictures : nullptr, options.guide.empty() ? nullptr : &options.guide);
}

void Chat::speak(const Prefill& prefill, const GenerateOptions& options, const Listener& listener,
                 const std::shared_ptr<const Tokenizer>& tokenizer, Answer& answer) {
  answer.visual = prefill.visual;
  answer.kept = prefill.kept;
  if (prefill.kept_by_layer) answer.kept_by_layer = prefill.visual_kept_by_layer();
  Sampler sample(options.sampling);
  Stopper stopper(options.stop);
  std::optional<TextStream> stream;
  if (tokenizer) stream.emplace(tokenizer);
  const auto& eos = session_.contract().eos_token_ids;
  std::vector<float> logits = prefill.logits;
  for (int64_t index = 0;; ++index) {
    Step step{index, sample(logits), "", Ended::kNot, options.sure ? largest_probability(logits) : 0};
    step.ended = end_of(step.token, index, options);
    const bool ends = std::find(eos.begin(), eos.end(), step.token) != eos.end();
    const std::string fresh = ends || !stream ? "" : stream->step(step.token);
    bool stopped = false;
    std::tie(step.text, stopped) = stopper.take(fresh, step.ended != Ended::kNot);
    if (stopped) step.ended = Ended::kStop;
    answer.text += step.text;
    answer.tokens.push_back(step.token);
    pending_ = step.ended == Ended::kEos ? -1 : step.token;
    const bool heard = !listener || listener(step);
    if (step.ended == Ended::kNot && (!heard || cancelled_.exchange(false))) step.ended = Ended::kCancelled;
    answer.ended = step.ended;
    if (step.ended != Ended::kNot) break;
    logits = session_.decode(step.token);
  }
  if (session_.caching().on()) answer.caches = left_in_caches(prefill);
}

// What a cache policy left after an answer: of the pictures, entries by layer, their bytes.
std::string Chat::left_in_caches(const Prefill& prefill) {
  const Contract& contract = session_.contract();
  std::vector<int64_t> by_layer;
  for (const size_t group : contract.groups_of_layers()) by_layer.push_back(session_.entries()[group]);
  int64_t filled = 0, allocated = 0;
  for (size_t i = 0; i < contract.groups.size(); ++i) {
    CacheGroup group = contract.groups[i];
    allocated += group.nbytes(1, contract.dtype);
    group.capacity = session_.entries()[i];
    filled += group.nbytes(1, contract.dtype);
  }
  return nlohmann::ordered_json{{"policy", contract.cache->policy},
                                {"share", session_.caching().share()},
                                {"visual_by_layer", prefill.held ? Json(prefill.visual_held_by_layer()) : Json()},
                                {"entries_by_layer", by_layer},
                                {"bytes", filled},
                                {"allocated", allocated}}
      .dump(-1, ' ', true, Json::error_handler_t::replace);
}

Ended Chat::end_of(int64_t token, int64_t index, const GenerateOptions& options) const {
  const auto& eos = session_.contract().eos_token_ids;
  if (std::find(eos.begin(), eos.end(), token) != eos.end()) return Ended::kEos;
  if (index + 1 == options.max_new_tokens) return Ended::kLength;
  return session_.room() < 1 ? Ended::kCapacity : Ended::kNot;
}

}  // namespace vlmtrim
