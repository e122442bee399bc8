// Several graphs that do one's work one after the other; to the outside they are one. Mirrors Chain in
// runtime/backends/base.py.
#pragma once

#include <memory>
#include <vector>

#include "backends/backend.hpp"

namespace vlmtrim {

// `pieces`, in order, of `whole`. Behind a selection of image features whose number depends on the data, a chain does
// what one graph cannot: it reads the number, and the later graphs run on so many features instead of the bound.
std::unique_ptr<Program> make_chain(const GraphSpec& whole, const Dims& dims,
                                    std::vector<std::unique_ptr<Program>> pieces, Backend& backend);

}  // namespace vlmtrim
