#include "guided.hpp"

#include <chrono>
#include <cmath>

#include "core/error.hpp"

namespace vlmtrim {
namespace {

double seconds() { return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count(); }

std::string name_of(Session& session) { return session.model().bundle().folder.string(); }

template <class T>
std::string listed(const std::vector<T>& values) {
  std::string made;
  for (const T& value : values) made += (made.empty() ? "" : ", ") + said(value);
  return "[" + made + "]";
}

std::string said_grid(const Contract& contract) {
  if (!contract.image_grid) return "None";
  return said("(", contract.image_grid->first, ", ", contract.image_grid->second, ")");
}

constexpr const char* kSame = "; a guide must see the same ";
constexpr const char* kAdvice = "export both with the same --image-tokens, or take another guide";

void check_pair(Session& small, Session& large) {
  if (!small.attention().emitted()) {
    throw Refusal(
        said(name_of(small), " does not return its attention; export the guide with --method none --emit-guide"));
  }
  if (large.contract().guide != Guide::kBundle) {
    throw Refusal(said(name_of(large), " takes no scores of a guide; export it with --method guided"));
  }
  const auto differ = [&](const char* what, const auto& one, const auto& other) {
    throw Refusal(said(name_of(small), " has ", what, " ", one, ", ", name_of(large), " ", other, kSame,
                       "visual tokens: ", kAdvice));
  };
  const Contract &one = small.contract(), &other = large.contract();
  if (one.image_tokens != other.image_tokens) differ("image_tokens", one.image_tokens, other.image_tokens);
  if (one.image_grid != other.image_grid) differ("image_grid", said_grid(one), said_grid(other));
}

// An answer whose steps are told now, as far as the listener wants to hear it.
Answer heard(Answer answer, const std::vector<Step>& steps, const Listener& listener) {
  if (!listener) return answer;
  answer.text.clear();
  answer.tokens.clear();
  for (const Step& step : steps) {
    answer.text += step.text;
    answer.tokens.push_back(step.token);
    if (listener(step) || step.ended != Ended::kNot) continue;
    answer.ended = Ended::kCancelled;
    break;
  }
  return answer;
}

}  // namespace

Guided::Guided(std::shared_ptr<Model> small, Chat& large, std::optional<double> exit_confidence)
    : small_(std::move(small)), large_(large), exit_confidence_(exit_confidence) {
  if (exit_confidence && !(0 < *exit_confidence && *exit_confidence <= 1)) {
    throw Refusal(said("exit_confidence is ", *exit_confidence, "; give a probability above 0, at most 1"));
  }
  check_pair(small_.session(), large_.session());
  small_.session().attention().sum();
}

void Guided::reset(const std::string& system) {
  system_ = system;
  small_.reset(system);
  large_.reset(system);
}

Answer Guided::generate(const std::vector<Part>& parts, const std::vector<Shown>& shown, const GenerateOptions& options,
                        const Listener& listener) {
  guidance_.reset();
  if (exit_confidence_) large_.reset(system_);
  if (shown.empty()) return large_.generate(parts, shown, options, listener);
  check_same(shown);
  double start = seconds();
  small_.reset(system_);
  std::vector<Step> steps;
  double sum = 0;
  GenerateOptions alone = options;
  alone.sure = true;
  const Answer first = small_.generate(parts, shown, alone, [&](const Step& step) {
    steps.push_back(step);
    sum += std::log(step.sure);
    return true;
  });
  const double confidence = std::exp(sum / static_cast<double>(steps.size()));
  const bool sure = exit_confidence_ && confidence >= *exit_confidence_;
  guidance_ = Guidance{confidence, sure || first.ended == Ended::kCancelled, seconds() - start, 0};
  if (guidance_->exited) return heard(first, steps, listener);
  start = seconds();
  GenerateOptions guided = options;
  guided.guide = small_.session().attention().received();
  Answer answer = large_.generate(parts, shown, guided, listener);
  guidance_->large = seconds() - start;
  return answer;
}

// Throws Refusal unless both bundles make the same visual tokens of the pictures.
void Guided::check_same(const std::vector<Shown>& shown) {
  const auto prepared = [&](Chat& chat) { return chat.session().model().processor().prepare(shown); };
  const Pictures small = prepared(small_), large = prepared(large_);
  if (small.tokens == large.tokens && small.grids == large.grids) return;
  throw Refusal(said(name_of(small_.session()), " makes ", listed(small.tokens), " visual tokens of the pictures, ",
                     name_of(large_.session()), " ", listed(large.tokens),
                     small.tokens == large.tokens ? " in other rows" : "", kSame, "tokens: ", kAdvice));
}

}  // namespace vlmtrim
