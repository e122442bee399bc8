// Which later tokens a step's tokens see: visual tokens that lie together attend to each other both ways.
// Mirrors runtime/looking_ahead.py.
#pragma once

#include <cstdint>
#include <vector>

namespace vlmtrim {

// `last_seen` of the contract for a step of so many tokens; `visual_positions` ascend.
std::vector<int64_t> last_seen(int64_t tokens, const std::vector<int64_t>& visual_positions);

}  // namespace vlmtrim
