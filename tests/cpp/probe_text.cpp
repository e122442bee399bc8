// Shows the tests what is inside the C++ tokenizer; results as in probe.cpp.
#include "probe.hpp"
#include "sampling.hpp"
#include "text/prompter.hpp"
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

namespace {

struct Talk {
  Contract contract;
  std::unique_ptr<Prompter> prompter;
  std::unique_ptr<Conversation> conversation;
};

}  // namespace

// A conversation by the prompt.json and tokenizer.json of a folder.
PROBE void* probe_talk(const char* folder, int64_t image_token, int64_t max_seq_len, const char* system) {
  Talk* talk = nullptr;
  guarded([&] {
    auto made = std::make_unique<Talk>();
    made->contract.image_token_id = image_token;
    made->contract.max_seq_len = max_seq_len;
    const Folder files{std::filesystem::path(folder)};
    auto tokenizer = Tokenizer::from_json(files.bytes("tokenizer.json"), "tokenizer.json");
    made->prompter = std::make_unique<Prompter>(files, made->contract, tokenizer);
    made->conversation = std::make_unique<Conversation>(*made->prompter, system);
    talk = made.release();
  });
  return talk;
}

PROBE void probe_talk_close(void* talk) { delete static_cast<Talk*>(talk); }

// `parts`: JSON, a list of texts, null for a picture; `words`: a list of what stands in place of their marks.
PROBE int probe_ask(void* talk, const char* parts, const char* words) {
  return guarded([&] {
    std::vector<Part> given;
    for (const auto& part : Json::parse(parts)) {
      given.push_back(part.is_null() ? Part{"", true} : Part{part.get<std::string>(), false});
    }
    keep("ids", static_cast<Talk*>(talk)->conversation->ask(given, Json::parse(words).get<std::vector<std::string>>()));
  });
}

PROBE int probe_answer(void* talk, const char* text) {
  return guarded([&] { static_cast<Talk*>(talk)->conversation->answer(text); });
}

PROBE int probe_take_back(void* talk) {
  return guarded([&] { static_cast<Talk*>(talk)->conversation->take_back(); });
}

// Tokens drawn one after the other from rows of logits.
PROBE int probe_sample(const float* logits, size_t rows, size_t width, double temperature, int64_t top_k, double top_p,
                       uint64_t seed) {
  return guarded([&] {
    Sampler sampler({temperature, top_k, top_p, seed});
    std::vector<int64_t> drawn;
    for (size_t row = 0; row < rows; ++row) {
      drawn.push_back(sampler({logits + row * width, logits + (row + 1) * width}));
    }
    keep("drawn", drawn);
  });
}

PROBE int probe_uniform(uint64_t seed, size_t count) {
  return guarded([&] {
    Pcg64 generator(seed);
    std::vector<double> values;
    for (size_t i = 0; i < count; ++i) values.push_back(generator.uniform());
    keep("values", values);
  });
}

// Pieces of an answer and stop texts, JSON lists of texts; the last piece is the answer's end.
PROBE int probe_stop(const char* pieces, const char* stops) {
  return guarded([&] {
    Stopper stopper(Json::parse(stops).get<std::vector<std::string>>());
    const auto texts = Json::parse(pieces).get<std::vector<std::string>>();
    Json taken = Json::array();
    for (size_t i = 0; i < texts.size(); ++i) {
      const auto [certain, stopped] = stopper.take(texts[i], i + 1 == texts.size());
      taken.push_back({certain, stopped});
    }
    results()["json"] = taken.dump();
  });
}
