#include "sampling.hpp"

#include <algorithm>
#include <cmath>
#include <numeric>
#include <random>

#include "core/error.hpp"
#include "core/reading.hpp"

namespace vlmtrim {
namespace {

constexpr uint32_t kMultiplyA = 0x931e8875, kMultiplyB = 0x58f38ded;

uint32_t hashed(uint32_t value, uint32_t& constant, uint32_t multiplier) {
  value ^= constant;
  constant *= multiplier;
  value *= constant;
  return value ^ value >> 16;
}

// numpy's SeedSequence(seed).generate_state(4, uint64).
std::array<uint64_t, 4> seed_state(uint64_t seed) {
  const uint32_t entropy[4] = {static_cast<uint32_t>(seed), static_cast<uint32_t>(seed >> 32), 0, 0};
  uint32_t pool[4], constant = 0x43b0d7e5;
  for (int i = 0; i < 4; ++i) pool[i] = hashed(entropy[i], constant, kMultiplyA);
  for (int from = 0; from < 4; ++from) {
    for (int to = 0; to < 4; ++to) {
      if (from == to) continue;
      const uint32_t mixed = 0xca01f9ddu * pool[to] - 0x4973f715u * hashed(pool[from], constant, kMultiplyA);
      pool[to] = mixed ^ mixed >> 16;
    }
  }
  std::array<uint64_t, 4> state{};
  constant = 0x8b51f9dd;
  for (size_t i = 0; i < 8; ++i) {
    state[i / 2] |= static_cast<uint64_t>(hashed(pool[i % 4], constant, kMultiplyB)) << (32 * (i % 2));
  }
  return state;
}

uint64_t fresh_seed() {
  std::random_device device;
  return static_cast<uint64_t>(device()) << 32 | device();
}

}  // namespace

Pcg64::Pcg64(uint64_t seed) {
  const auto words = seed_state(seed);
  increment_ = (static_cast<unsigned __int128>(words[2]) << 64 | words[3]) << 1 | 1;
  step();
  state_ += static_cast<unsigned __int128>(words[0]) << 64 | words[1];
  step();
}

uint64_t Pcg64::next() {
  step();
  const auto high = static_cast<uint64_t>(state_ >> 64), mixed = high ^ static_cast<uint64_t>(state_);
  const auto by = static_cast<unsigned>(high >> 58);
  return mixed >> by | mixed << (-by & 63);
}

void Sampling::check() const {
  if (!(temperature >= 0 && std::isfinite(temperature))) {
    throw Refusal(said("temperature is ", temperature, "; give 0 (greedy) or more"));
  }
  if (top_k < 0) throw Refusal(said("top-k is ", top_k, "; give 0 (all tokens) or more"));
  if (!(top_p > 0 && top_p <= 1)) throw Refusal(said("top-p is ", top_p, "; give a share above 0 and at most 1"));
}

Sampler::Sampler(const Sampling& sampling)
    : sampling_(sampling), generator_(sampling.seed ? *sampling.seed : fresh_seed()) {
  sampling_.check();
}

int64_t Sampler::operator()(const std::vector<float>& logits) {
  for (const float logit : logits) {
    if (std::isnan(logit) || (std::isinf(logit) && logit > 0)) {
      throw Refusal(
          "the model returned NaN or infinity in place of logits: its weights overflow the bundle's dtype, or its "
          "picture settings are damaged; export it again, with --dtype float32 where the dtype is float16");
    }
  }
  if (sampling_.temperature == 0) return std::max_element(logits.begin(), logits.end()) - logits.begin();
  return draw(logits);
}

int64_t Sampler::draw(const std::vector<float>& logits) {
  std::vector<int64_t> order(logits.size());
  std::iota(order.begin(), order.end(), 0);
  const auto logit = [&](int64_t id) { return static_cast<double>(logits[static_cast<size_t>(id)]); };
  std::stable_sort(order.begin(), order.end(), [&](int64_t a, int64_t b) { return logit(a) > logit(b); });
  if (sampling_.top_k > 0 && sampling_.top_k < static_cast<int64_t>(order.size())) {
    order.resize(static_cast<size_t>(sampling_.top_k));
  }
  std::vector<double> kept;
  double sum = 0;
  for (const int64_t id : order) {
    kept.push_back(std::exp((logit(id) - logit(order[0])) / sampling_.temperature));
    sum += kept.back();
  }
  for (double& share : kept) share /= sum;
  if (sampling_.top_p < 1) {
    double before = 0, left = 0;
    for (double& share : kept) {
      const double own = share;
      if (before >= sampling_.top_p) share = 0;
      before += own;
      left += share;
    }
    for (double& share : kept) share /= left;
  }
  std::vector<double> cumulated(logits.size());
  for (size_t i = 0; i < order.size(); ++i) cumulated[static_cast<size_t>(order[i])] = kept[i];
  std::partial_sum(cumulated.begin(), cumulated.end(), cumulated.begin());
  const double whole = cumulated.back(), point = generator_.uniform();
  for (double& share : cumulated) share /= whole;
  return std::upper_bound(cumulated.begin(), cumulated.end(), point) - cumulated.begin();
}

double largest_probability(const std::vector<float>& logits) {
  const double most = *std::max_element(logits.begin(), logits.end());
  double sum = 0;
  for (const float logit : logits) sum += std::exp(static_cast<double>(logit) - most);
  return 1 / sum;
}

Stopper::Stopper(std::vector<std::string> stops) : stops_(std::move(stops)) {
  for (const auto& stop : stops_) {
    if (stop.empty() || first_bad_utf8(stop))
      throw Refusal("a stop text is empty or no UTF-8; give one of a character or more");
  }
}

std::pair<std::string, bool> Stopper::take(const std::string& text, bool last) {
  held_ += text;
  size_t found = std::string::npos, keep = 0;
  for (const auto& stop : stops_) found = std::min(found, held_.find(stop));
  if (found != std::string::npos) {
    std::string certain = held_.substr(0, found);
    held_.clear();
    return {certain, true};
  }
  for (const auto& stop : stops_) {
    if (last) break;
    for (size_t length = std::min(held_.size(), stop.size() - 1); length > keep; --length) {
      if (held_.compare(held_.size() - length, length, stop, 0, length) == 0) keep = length;
    }
  }
  std::string certain = held_.substr(0, held_.size() - keep);
  held_.erase(0, certain.size());
  return {certain, false};
}

}  // namespace vlmtrim
