// The bundle on disk: every file under a sha256, refused when one differs. Mirrors graphs/bundle.py.
#pragma once

#include <filesystem>
#include <map>
#include <string>
#include <string_view>

#include "core/contract.hpp"
#include "core/reading.hpp"

namespace vlmtrim {

struct Bundle {
  std::filesystem::path folder;
  Contract contract;
  std::map<std::string, std::string> sums;

  // The files under a checksum, the only ones that may be read.
  Folder files() const;
};

// Checks every file and reads the contract; `verify` hashes large files that were hashed before once more.
// Throws BundleError naming the file at fault.
Bundle open_bundle(const std::filesystem::path& folder, bool verify = false);

// Names of the files that a serialised ONNX model takes weights from. Throws BundleError where it is no model.
std::set<std::string> external_files(std::string_view model, const std::string& where);

}  // namespace vlmtrim
