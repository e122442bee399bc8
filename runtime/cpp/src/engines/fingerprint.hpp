// Whether the engines of a bundle are made for this library, this GPU and these graphs: engines.json.
// Mirrors runtime/engines/fingerprint.py.
#pragma once

#include <string>
#include <utility>
#include <vector>

#include "core/bundle.hpp"
#include "engines/profiles.hpp"

namespace vlmtrim {

// What an engine is made for.
struct Fingerprint {
  std::string library, version;
  std::vector<std::string> compute_capabilities;  // GPUs it runs on, as "8.9"; none named: 8.0 and later
  std::string onnx_sha256;                        // of the graph it was built from
  int64_t bytes = 0;
  Profiles profiles;
};

// What is here: a library of a version, and a GPU's compute capability.
struct Place {
  std::string library, version;
  std::pair<int, int> capability;
};

// What builds the engines of an existing bundle.
std::string build_command(const Bundle& bundle, const std::string& library);

// Fingerprint of GRAPH.engine, made for what is here. Throws Refusal where there is no engine, or one that is made for
// something else; it ends with the command that builds it.
Fingerprint find_fingerprint(const Bundle& bundle, const std::string& graph, const Place& here);

// A name for what is compiled out of one engine on one kind of GPU.
std::string kernels_key(const Bundle& bundle, const std::string& graph, const std::string& gpu);

}  // namespace vlmtrim
