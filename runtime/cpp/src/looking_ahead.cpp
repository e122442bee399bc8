#include "looking_ahead.hpp"

#include <cstddef>
#include <numeric>

namespace vlmtrim {

std::vector<int64_t> last_seen(int64_t tokens, const std::vector<int64_t>& visual_positions) {
  std::vector<int64_t> seen(static_cast<size_t>(tokens));
  std::iota(seen.begin(), seen.end(), 0);
  int64_t end = -1, behind = -1;  // of the run, from its last token back
  for (auto place = visual_positions.rbegin(); place != visual_positions.rend(); ++place) {
    if (*place + 1 != behind) end = *place;
    behind = *place;
    seen[static_cast<size_t>(*place)] = end;
  }
  return seen;
}

}  // namespace vlmtrim
