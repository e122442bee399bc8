// Optimisation profiles of engines, as engines.json holds them. Mirrors runtime/engines/profiles.py.
#pragma once

#include <cstdint>
#include <map>
#include <string>
#include <utility>
#include <vector>

#include "core/reading.hpp"

namespace vlmtrim {

// Smallest, most likely and largest size of a dimension.
struct SizeRange {
  int64_t least = 0, likely = 0, most = 0;
};

using Profile = std::map<std::string, SizeRange>;
using Profiles = std::vector<std::pair<std::string, Profile>>;  // by name, in the engine's order

constexpr const char* kDecode = "decode";

// Throws BundleError naming `where` where limits are missing or out of order.
Profiles profiles_of(const nlohmann::ordered_json& raw, const std::string& where);

// Index of the profile for these sizes: the last that admits them, since later ones are for narrower steps. Throws
// Refusal naming the dimension, its size and the limits of the widest profile; `file` is the graph's.
size_t choose_profile(const Profiles& profiles, const std::map<std::string, int64_t>& sizes, const std::string& file);

// The live window for `length` entries: in steps, so that decode steps repeat their shapes, at most the capacity.
int64_t bucket(int64_t length, int64_t capacity);

}  // namespace vlmtrim
