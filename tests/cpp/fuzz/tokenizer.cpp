// libFuzzer: a tokenizer.json of any bytes encodes, decodes and streams, or is refused in a sentence. What is behind
// the first zero byte is the text.
#include "text/tokenizer.hpp"

#include <string_view>

#include "core/error.hpp"
#include "core/reading.hpp"

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  const std::string_view all(reinterpret_cast<const char*>(data), size);
  const size_t end = std::min(all.find('\0'), all.size());
  std::string_view text = all.substr(std::min(end + 1, all.size()));
  if (const auto bad = vlmtrim::first_bad_utf8(text)) text = text.substr(0, *bad);
  try {
    const auto tokenizer = vlmtrim::Tokenizer::from_json(all.substr(0, end), "tokenizer.json");
    const auto ids = tokenizer->encode(text, true);
    tokenizer->decode(ids);
    vlmtrim::TextStream stream(tokenizer);
    for (const int64_t id : ids) stream.step(id);
    stream.step(-1);
  } catch (const vlmtrim::BundleError&) {
  } catch (const vlmtrim::Refusal&) {
  }
  return 0;
}
