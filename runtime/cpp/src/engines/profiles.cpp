#include "engines/profiles.hpp"

#include <algorithm>

#include "core/contract.hpp"
#include "core/error.hpp"
#include "core/fields.hpp"

namespace vlmtrim {
namespace {

constexpr int64_t kBucket = 128;

SizeRange range_of(const Json& value, const std::string& where) {
  const auto limits = listed<int64_t>(
      value, where, [](const Json& one, const std::string& at) { return integer(one, at, 0, kLargestSize); });
  if (limits.size() != 3 || limits[0] > limits[1] || limits[1] > limits[2]) {
    throw BundleError(said(where, " is ", shown(value), "; a profile needs three sizes, min <= opt <= max"));
  }
  return {limits[0], limits[1], limits[2]};
}

bool admits(const SizeRange& range, int64_t size) { return range.least <= size && size <= range.most; }

bool admits(const Profile& profile, const std::map<std::string, int64_t>& sizes) {
  return std::all_of(sizes.begin(), sizes.end(), [&](const auto& size) {
    const auto range = profile.find(size.first);
    return range == profile.end() || admits(range->second, size.second);
  });
}

}  // namespace

Profiles profiles_of(const nlohmann::ordered_json& raw, const std::string& where) {
  if (!raw.is_object() || raw.empty()) throw BundleError(said(where, " holds no profile"));
  Profiles profiles;
  for (const auto& [name, ranges] : raw.items()) {
    profiles.emplace_back(name, mapped<SizeRange>(Json(ranges), said(where, ".", name.substr(0, 60)), range_of));
  }
  return profiles;
}

size_t choose_profile(const Profiles& profiles, const std::map<std::string, int64_t>& sizes, const std::string& file) {
  for (size_t index = profiles.size(); index-- > 0;) {
    if (admits(profiles[index].second, sizes)) return index;
  }
  const auto& [widest, ranges] = profiles.front();
  std::string wrong;
  for (const auto& [dim, size] : sizes) {
    const auto range = ranges.find(dim);
    if (range == ranges.end() || admits(range->second, size)) continue;
    wrong += said(wrong.empty() ? "" : ", ", dim, " is ", size, ", ", range->second.least, " to ", range->second.most,
                  " fit");
  }
  throw Refusal(said(file, ": a step does not fit the engine's profiles (", widest, ": ", wrong,
                     "); shorten the prompt, or export with larger limits (--max-seq-len, --max-batch) and build the "
                     "engines again"));
}

int64_t bucket(int64_t length, int64_t capacity) {
  return std::max(length, std::min((length + kBucket - 1) / kBucket * kBucket, capacity));
}

}  // namespace vlmtrim
