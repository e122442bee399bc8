#include "processors/processor.hpp"

#include "core/error.hpp"
#include "processors/families.hpp"
#include "text/unicode.hpp"

namespace vlmtrim {
namespace {

using Maker = std::unique_ptr<Processor> (*)(const Folder&, const Contract&);
constexpr std::pair<const char*, Maker> kFamilies[] = {
    {"gemma3", make_gemma3},     {"idefics3", make_idefics3},     {"internvl", make_internvl},
    {"llava", make_llava},       {"llava_next", make_llava_next}, {"llava_onevision", make_llava_onevision},
    {"mllama", make_mllama},     {"qwen2_5_vl", make_qwen2_5_vl}, {"qwen2_vl", make_qwen2_vl},
    {"qwen3_vl", make_qwen3_vl}, {"smolvlm", make_smolvlm},       {"video_llava", make_video_llava}};

constexpr size_t kLongestMark = 64;  // characters of a special token

// What an object names; null where that is nothing.
Json named(const Json& place, const char* role) {
  const auto found = place.is_object() ? place.find(role) : place.end();
  if (!place.is_object() || found == place.end()) return {};
  const bool nothing = found->empty() || *found == "" || *found == false || *found == 0;
  return nothing ? Json() : Json(*found);
}

}  // namespace

Positions Processor::positions(const std::vector<int64_t>& ids, int64_t start, const Pictures* /*pictures*/) const {
  const auto count = static_cast<int64_t>(ids.size());
  Positions found{Tensor::empty(DType::kInt64, {1, count}), start + count};
  for (int64_t i = 0; i < count; ++i) found.ids.as<int64_t>()[i] = start + i;
  return found;
}

std::vector<int64_t> Processor::image_numbers(const Pictures& /*pictures*/, const View& /*view*/) const {
  throw Refusal(said("pictures of family ", contract_.family, " do not reach the decoder through cross-attention"));
}

std::vector<int64_t> Processor::seen_images(const std::vector<int64_t>& /*ids*/, View& /*view*/,
                                            bool /*brings*/) const {
  throw Refusal(said("pictures of family ", contract_.family, " do not reach the decoder through cross-attention"));
}

void Processor::check_tiles(size_t pictures, int64_t tiles) const {
  if (const int64_t most = contract_.dims.at("T").second; tiles > most) {
    throw Refusal(said(pictures, " pictures become ", tiles, " tiles, the bundle takes ", most,
                       " in one step; give fewer pictures at once, or export with a larger --max-seq-len"));
  }
}

void Processor::check_frames(const std::vector<Shown>& shown) const {
  int64_t frames = 0;
  for (const Shown& one : shown) frames += one.is_video() ? static_cast<int64_t>(one.frames.size()) : 0;
  check_tiles(shown.size(), frames);
}

std::vector<std::string> special_tokens(const Folder& files,
                                        const std::vector<std::pair<const char*, const char*>>& usual) {
  const std::string name = "tokenizer_config.json";
  const Json raw = files.contains(name) ? files.json(name) : Json::object();
  const Json extra = raw.value("extra_special_tokens", Json());
  std::vector<std::string> found;
  for (const auto& [role, token] : usual) {
    Json value = named(extra, role);
    if (value.is_null()) value = named(raw, role);
    if (value.is_null()) value = token;
    if (value.is_object()) value = value.value("content", Json());
    const size_t length = value.is_string() ? characters_of(value.get_ref<const std::string&>()) : 0;
    if (length < 1 || length > kLongestMark) {
      throw BundleError(said((files.path() / name).string(), ": ", role, " is ", shown(value),
                             "; expected a token of at most ", kLongestMark, " characters"));
    }
    found.push_back(value);
  }
  return found;
}

std::unique_ptr<Processor> load_processor(const Bundle& bundle) {
  std::string names;
  for (const auto& [family, maker] : kFamilies) {
    if (bundle.contract.family == family) return maker(bundle.files(), bundle.contract);
    names += (names.empty() ? "" : ", ") + std::string(family);
  }
  throw Refusal(said("the bundle is of family ", shown(bundle.contract.family), "; this vlmtrim runs ", names));
}

}  // namespace vlmtrim
