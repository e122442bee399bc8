#include "core/bundle.hpp"

#include <sys/stat.h>

#include "core/error.hpp"
#include "core/sha256.hpp"

namespace vlmtrim {
namespace {

constexpr const char* kSums = "SHA256SUMS";
constexpr const char* kEngines = "engines.json";
constexpr size_t kLargestSums = 1 << 20;
constexpr size_t kLargestContract = 16 << 20;
constexpr size_t kLargestGraph = 2u << 30;
constexpr int kDeepest = 4 * 32;  // messages in messages

bool is_digest(const std::string& text) {
  return text.size() == 64 && text.find_first_not_of("0123456789abcdef") == std::string::npos;
}

std::map<std::string, std::string> read_sums(const std::filesystem::path& folder) {
  if (!std::filesystem::is_regular_file(folder / kSums)) {
    const bool there = std::filesystem::is_directory(folder);
    throw BundleError(said(folder.string(), " is no bundle: ", there ? "it has no SHA256SUMS" : "no such folder",
                           "; make one with export-vlm"));
  }
  std::map<std::string, std::string> sums;
  const std::string text = Folder(folder).text(kSums, kLargestSums);
  for (size_t at = 0; at < text.size();) {
    const size_t end = std::min(text.find('\n', at), text.size());
    const std::string line = text.substr(at, end - at);
    at = end + 1;
    const std::string name = line.size() > 66 ? line.substr(66) : "";
    const bool fits = is_digest(line.substr(0, 64)) && line.compare(64, 2, "  ") == 0 && is_plain_name(name) &&
                      name != kSums && sums.emplace(name, line.substr(0, 64)).second;
    if (!fits) {
      throw BundleError(said((folder / kSums).string(), " is damaged: ", shown(line), "; export the model again"));
    }
  }
  return sums;
}

// A file that would be used if it were listed must not lie beside the bundle's own.
void refuse_unlisted(const std::filesystem::path& folder, const std::map<std::string, std::string>& sums) {
  for (const auto& entry : std::filesystem::directory_iterator(folder)) {
    const std::string name = entry.path().filename().string(), suffix = entry.path().extension().string();
    const bool used = suffix == ".json" || suffix == ".jinja" || suffix == ".onnx" || suffix == ".safetensors";
    if (used && name != kEngines && sums.count(name) == 0) {
      throw BundleError(
          said(entry.path().string(), " is not listed in SHA256SUMS, so it is no part of the bundle; take it out"));
    }
  }
}

// Messages of onnx.proto3: those that may hold a tensor, by the number of their field.
enum class Kind { kModel, kTraining, kGraph, kFunction, kNode, kAttribute, kSparse, kTensor, kEntry, kOther };

Kind inner(Kind kind, uint64_t field) {
  switch (kind) {
    case Kind::kModel:
      return field == 7 ? Kind::kGraph : field == 20 ? Kind::kTraining : field == 25 ? Kind::kFunction : Kind::kOther;
    case Kind::kTraining:
      return field == 1 || field == 2 ? Kind::kGraph : Kind::kOther;
    case Kind::kGraph:
      return field == 1 ? Kind::kNode : field == 5 ? Kind::kTensor : field == 15 ? Kind::kSparse : Kind::kOther;
    case Kind::kFunction:
      return field == 7 ? Kind::kNode : field == 11 ? Kind::kAttribute : Kind::kOther;
    case Kind::kNode:
      return field == 5 ? Kind::kAttribute : Kind::kOther;
    case Kind::kAttribute:
      if (field == 5 || field == 10) return Kind::kTensor;
      if (field == 6 || field == 11) return Kind::kGraph;
      return field == 22 || field == 23 ? Kind::kSparse : Kind::kOther;
    case Kind::kSparse:
      return field == 1 || field == 2 ? Kind::kTensor : Kind::kOther;
    case Kind::kTensor:
      return field == 13 ? Kind::kEntry : Kind::kOther;
    default:
      return Kind::kOther;
  }
}

// One length-delimited field after the other of a protobuf message.
class Parts {
 public:
  Parts(std::string_view data, const std::string& where) : data_(data), where_(where) {}

  bool next(uint64_t& field, std::string_view& contents) {
    while (at_ < data_.size()) {
      const uint64_t tag = varint();
      field = tag >> 3;
      switch (tag & 7) {
        case 0:
          varint();
          break;
        case 1:
        case 5:
          skip((tag & 7) == 1 ? 8 : 4);
          break;
        case 2: {
          const uint64_t size = varint(), start = at_;
          skip(size);
          contents = data_.substr(start, size);
          return true;
        }
        default:
          refuse("a field of an unknown wire type");
      }
    }
    return false;
  }

 private:
  [[noreturn]] void refuse(const char* what) const {
    throw BundleError(said(where_, " is no ONNX file: ", what, "; export the model again"));
  }

  void skip(uint64_t size) {
    if (size > data_.size() - at_) refuse("a field is longer than its message");
    at_ += size;
  }

  uint64_t varint() {
    uint64_t value = 0;
    for (unsigned shift = 0; shift < 70 && at_ < data_.size(); shift += 7) {
      const auto byte = static_cast<unsigned char>(data_[at_++]);
      if (shift < 64) value |= static_cast<uint64_t>(byte & 0x7F) << shift;
      if (byte < 0x80) return value;
    }
    refuse("a number is cut off");
  }

  std::string_view data_;
  const std::string& where_;
  size_t at_ = 0;
};

// The value of an entry whose key is "location"; of a field that is there twice the last one counts.
std::optional<std::string> location(std::string_view entry, const std::string& where) {
  Parts parts(entry, where);
  uint64_t field = 0;
  std::string_view contents, key, value;
  while (parts.next(field, contents)) {
    if (field == 1) key = contents;
    if (field == 2) value = contents;
  }
  return key == "location" ? std::optional<std::string>(value) : std::nullopt;
}

void check_graph(const Folder& files, const std::string& name) {
  const std::string where = (files.path() / name).string();
  for (const auto& outside : external_files(files.bytes(name, kLargestGraph), where)) {
    if (files.names().count(outside) == 0) {
      throw BundleError(said(where, " takes weights from ", shown(outside),
                             ", which is no file of the bundle; export the model again"));
    }
  }
}

}  // namespace

std::set<std::string> external_files(std::string_view model, const std::string& where) {
  struct Pending {
    Kind kind;
    std::string_view data;
    int depth;
  };
  std::set<std::string> found;
  std::vector<Pending> pending{{Kind::kModel, model, 0}};
  while (!pending.empty()) {
    const Pending now = pending.back();
    pending.pop_back();
    if (now.depth > kDeepest) throw BundleError(said(where, " is no ONNX file: graphs nest too deep"));
    if (now.kind == Kind::kEntry) {
      if (const auto name = location(now.data, where)) found.insert(*name);
      continue;
    }
    Parts parts(now.data, where);
    uint64_t field = 0;
    std::string_view contents;
    while (parts.next(field, contents)) {
      const Kind kind = inner(now.kind, field);
      if (kind != Kind::kOther) pending.push_back({kind, contents, now.depth + 1});
    }
  }
  return found;
}

Folder Bundle::files() const {
  std::set<std::string> names;
  for (const auto& [name, digest] : sums) names.insert(name);
  return Folder(folder, names);
}

Bundle open_bundle(const std::filesystem::path& folder, bool verify) {
  Bundle bundle{folder, {}, read_sums(folder)};
  const Folder files = bundle.files();
  struct stat found{};
  for (const auto& [name, digest] : bundle.sums) {
    if (lstat((folder / name).c_str(), &found) != 0) {
      throw BundleError(said((folder / name).string(), " is missing; export the model again"));
    }
  }
  for (const auto& [name, digest] : bundle.sums) {
    const auto path = files.file(name);
    if ((verify ? sha256(path) : known_sha256(path)) != digest) {
      throw BundleError(said(path.string(), " is damaged or was edited (its sha256 differs); export the model again"));
    }
  }
  for (const char* required : {"contract.json", "decoder.onnx"}) {
    if (bundle.sums.count(required) == 0) {
      throw BundleError(said(folder.string(), " has no ", required, "; export the model again"));
    }
  }
  refuse_unlisted(folder, bundle.sums);
  const std::string where = (folder / "contract.json").string();
  bundle.contract = Contract::from_json(files.text("contract.json", kLargestContract), where);
  check_agreement(bundle.contract, where);
  for (const auto& [name, spec] : bundle.contract.graphs) check_graph(files, spec.file);
  return bundle;
}

}  // namespace vlmtrim
