// Shows the tests what is inside the C++ tokenizer; results as in probe.cpp.
#include "probe.hpp"
#include "text/tokenizer.hpp"
#include "text/unicode.hpp"

namespace {

using namespace vlmtrim;

struct Opened {
  std::shared_ptr<const Tokenizer> tokenizer;
  std::unique_ptr<TextStream> stream;
};

const Tokenizer& tokenizer_of(void* opened) { return *static_cast<Opened*>(opened)->tokenizer; }

}  // namespace

PROBE void* probe_tokenizer(const char* source, size_t size) {
  Opened* opened = nullptr;
  guarded([&] { opened = new Opened{Tokenizer::from_json({source, size}, "tokenizer.json"), nullptr}; });
  return opened;
}

PROBE void probe_tokenizer_close(void* opened) { delete static_cast<Opened*>(opened); }

PROBE int probe_encode(void* opened, const char* text, size_t size, int add) {
  return guarded([&] { keep("ids", tokenizer_of(opened).encode({text, size}, add != 0)); });
}

// The same with every control token under another name.
PROBE int probe_encode_hidden(void* opened, const char* text, size_t size, int add) {
  return guarded([&] {
    std::map<int64_t, std::string> names;
    for (const auto& [id, token] : tokenizer_of(opened).control_tokens())
      names[id] = "\xEE\x80\x80" + std::to_string(id);
    keep("ids", tokenizer_of(opened).renamed(names)->encode({text, size}, add != 0));
  });
}

PROBE int probe_decode_ids(void* opened, const int64_t* ids, size_t count) {
  return guarded([&] { results()["text"] = tokenizer_of(opened).decode({ids, ids + count}); });
}

PROBE int probe_stream(void* opened, int64_t id, int fresh) {
  return guarded([&] {
    auto& held = *static_cast<Opened*>(opened);
    if (fresh != 0) held.stream = std::make_unique<TextStream>(held.tokenizer);
    results()["text"] = held.stream->step(id);
  });
}

PROBE int probe_nfc(const char* text, size_t size) {
  return guarded([&] { results()["text"] = nfc({text, size}); });
}

PROBE int probe_matches(const char* pattern, const char* text, size_t size) {
  return guarded([&] {
    std::vector<int64_t> places;
    for (const auto& [start, end] : Regex(pattern).matches({text, size})) {
      places.push_back(static_cast<int64_t>(start));
      places.push_back(static_cast<int64_t>(end));
    }
    keep("places", places);
  });
}

PROBE int probe_lossy(const char* bytes, size_t size) {
  return guarded([&] { results()["text"] = lossy_utf8({bytes, size}); });
}
