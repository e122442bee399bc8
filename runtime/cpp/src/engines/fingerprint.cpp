#include "engines/fingerprint.hpp"

#include <algorithm>
#include <cctype>

#include "core/error.hpp"
#include "core/fields.hpp"

namespace vlmtrim {
namespace {

constexpr const char* kFile = "engines.json";
// Oldest GPUs that an engine runs on when it was built for none in particular (TensorRT-RTX's default).
constexpr std::pair<int, int> kPortableFrom{8, 0};

Fingerprint fingerprint_of(const nlohmann::ordered_json& raw, const std::string& where) {
  const Json plain(raw);
  Fields fields(plain, where);
  Fingerprint made;
  made.library = text_value(fields.need("library"), fields.at("library"));
  made.version = text_value(fields.need("version"), fields.at("version"));
  made.compute_capabilities =
      listed<std::string>(fields.need("compute_capabilities"), fields.at("compute_capabilities"),
                          [](const Json& one, const std::string& at) { return text_value(one, at); });
  made.onnx_sha256 = text_value(fields.need("onnx_sha256"), fields.at("onnx_sha256"));
  made.bytes = fields.whole("bytes", 0, int64_t{1} << 62);
  number(fields.need("seconds"), fields.at("seconds"), 0, 1e9);
  fields.need("profiles");
  fields.finish();
  made.profiles = profiles_of(raw.at("profiles"), where + ": profiles");
  return made;
}

// All fingerprints of a bundle by file name; none where no engine was built.
std::map<std::string, Fingerprint> read(const Bundle& bundle) {
  const Folder files = bundle.files();
  std::map<std::string, Fingerprint> prints;
  if (files.names().count(kFile) == 0) return prints;
  const std::string where = (bundle.folder / kFile).string();
  try {
    const std::string text = files.text(kFile);
    json_object(text, where);                                  // within the limits of what strangers write
    const auto entries = nlohmann::ordered_json::parse(text);  // in the engine's order of profiles
    for (const auto& [name, entry] : entries.items()) {
      prints.emplace(name, fingerprint_of(entry, said(kFile, " of ", shown(name))));
    }
  } catch (const BundleError& error) {
    throw Refusal(said(where, " is damaged (", error.what(), "); build the engines again"));
  }
  return prints;
}

std::string said_of(const std::pair<int, int>& capability) { return said(capability.first, ".", capability.second); }

bool runs_on(const Fingerprint& print, const std::pair<int, int>& capability) {
  const auto& made_for = print.compute_capabilities;
  if (made_for.empty()) return capability >= kPortableFrom;
  return std::find(made_for.begin(), made_for.end(), said_of(capability)) != made_for.end();
}

// What an engine is made for that is not here; nothing where it fits.
std::string mismatch(const Bundle& bundle, const std::string& graph, const Fingerprint& print, const Place& here) {
  if (print.library != here.library) {
    return said("is made for ", print.library, " ", print.version, ", this is ", here.library, " ", here.version);
  }
  if (print.version != here.version) {
    return said("is made for ", here.library, " ", print.version, ", ", here.version, " is installed");
  }
  if (!runs_on(print, here.capability)) {
    std::string list;
    for (const auto& one : print.compute_capabilities) list += (list.empty() ? "" : ", ") + one;
    return said("is made for GPUs of compute capability ", list.empty() ? "8.0 and later" : list, ", this one has ",
                said_of(here.capability));
  }
  const auto onnx = bundle.sums.find(graph + ".onnx");  // every file has the sum that it is listed with
  if (onnx == bundle.sums.end() || onnx->second != print.onnx_sha256) {
    return said("was built from another ", graph, ".onnx");
  }
  const auto size = static_cast<int64_t>(std::filesystem::file_size(bundle.folder / (graph + ".engine")));
  return size == print.bytes ? "" : said("has ", size, " bytes instead of ", print.bytes);
}

}  // namespace

std::string build_command(const Bundle& bundle, const std::string& library) {
  return said("python -m vlmtrim.runtime.engines ", bundle.folder.string(), " --library ", library);
}

Fingerprint find_fingerprint(const Bundle& bundle, const std::string& graph, const Place& here) {
  const std::string build = build_command(bundle, here.library), name = graph + ".engine";
  const auto prints = read(bundle);
  const auto found = prints.find(name);
  if (found == prints.end() || bundle.sums.count(name) == 0) {
    throw Refusal(said(bundle.folder.string(), " has ", prints.empty() ? "no engines" : "no " + name,
                       "; build them with: ", build));
  }
  const std::string reason = mismatch(bundle, graph, found->second, here);
  if (!reason.empty()) throw Refusal(said(name, " ", reason, "; build it again with: ", build));
  return found->second;
}

std::string kernels_key(const Bundle& bundle, const std::string& graph, const std::string& gpu) {
  std::string kind = gpu;
  std::replace_if(kind.begin(), kind.end(), [](unsigned char c) { return std::isalnum(c) == 0; }, '-');
  return said(graph, "-", bundle.sums.at(graph + ".engine").substr(0, 24), "-", kind);
}

}  // namespace vlmtrim
