// vlmtrim in C++17, header only, over the C interface of vlmtrim.h: no exceptions, results hold a value or a sentence.
//
//   auto model = vlmtrim::Model::open("bundles/demo-fastv-k2-r0.5");
//   if (!model) return fail(model.error());
//   auto session = vlmtrim::Session::open(*model);
//   if (!session) return fail(session.error());
//   auto answer = session->generate({vlmtrim::Picture::file("word.png"), "Which word is written?"});
//   if (answer) std::puts(answer->text.c_str());
//
// A Model may be shared between threads and copied; a Session is of one thread at a time, but for cancel().
#pragma once

#include <vlmtrim.h>

#include <cstdint>
#include <functional>
#include <initializer_list>
#include <memory>
#include <optional>
#include <string>
#include <utility>
#include <vector>

namespace vlmtrim {

struct Error {
  vlmtrim_status status = VLMTRIM_FAILED;
  std::string message;
};

// A value, or why there is none.
template <class T>
class [[nodiscard]] Result {
 public:
  Result(T value) : value_(std::move(value)) {}      // NOLINT(google-explicit-constructor)
  Result(Error error) : error_(std::move(error)) {}  // NOLINT(google-explicit-constructor)
  explicit operator bool() const { return value_.has_value(); }
  bool has_value() const { return value_.has_value(); }
  // Only where there is a value.
  T& operator*() { return *value_; }
  const T& operator*() const { return *value_; }
  T* operator->() { return &*value_; }
  const T* operator->() const { return &*value_; }
  // Only where there is none.
  const Error& error() const { return error_; }

 private:
  std::optional<T> value_;
  Error error_;
};

inline Error last_error(vlmtrim_status status) { return {status, vlmtrim_error()}; }

struct ModelOptions {
  std::string backend = "auto";
  std::string onnxruntime;           // path of the library; empty: where it was found
  int threads = 0;                   // 0: one per core
  bool exact = false;                // multiply packed weights exactly, and slowly
  bool verify = false;               // hash every byte
  std::string tensorrt;              // path of the library; empty: where it was found
  std::string cuda_graphs = "auto";  // of TensorRT's decode steps: "auto", "capture" or "off"
};

class Model {
 public:
  static Result<Model> open(const std::string& folder, const ModelOptions& options = {}) {
    vlmtrim_model_options given{};
    given.size = sizeof given;
    given.backend = options.backend.c_str();
    given.onnxruntime = options.onnxruntime.empty() ? nullptr : options.onnxruntime.c_str();
    given.threads = options.threads;
    given.exact = options.exact ? 1 : 0;
    given.verify = options.verify ? 1 : 0;
    given.tensorrt = options.tensorrt.empty() ? nullptr : options.tensorrt.c_str();
    given.cuda_graphs = options.cuda_graphs.c_str();
    vlmtrim_model* opened = nullptr;
    const vlmtrim_status status = vlmtrim_model_open(folder.c_str(), &given, &opened);
    if (status != VLMTRIM_OK) return last_error(status);
    return Model(opened);
  }

  // JSON, see vlmtrim_model_description.
  std::string description() const { return vlmtrim_model_description(model_.get()); }
  vlmtrim_model* get() const { return model_.get(); }

 private:
  explicit Model(vlmtrim_model* model) : model_(model, vlmtrim_model_close) {}
  std::shared_ptr<vlmtrim_model> model_;
};

// A picture, named or in memory; memory must live until the call returns.
class Picture {
 public:
  static Picture file(std::string path) {
    Picture made(VLMTRIM_FILE);
    made.path_ = std::move(path);
    return made;
  }
  static Picture bytes(const uint8_t* data, size_t length) {
    Picture made(VLMTRIM_BYTES);
    made.part_.data = data;
    made.part_.length = length;
    return made;
  }
  // RGB rows, e.g. of a camera; `stride` bytes from row to row, 0 where they touch.
  static Picture pixels(const uint8_t* data, int width, int height, int64_t stride = 0, int channels = 3) {
    Picture made(VLMTRIM_PIXELS);
    made.part_.data = data;
    made.part_.width = width;
    made.part_.height = height;
    made.part_.channels = channels;
    made.part_.stride = stride != 0 ? stride : static_cast<int64_t>(width) * channels;
    return made;
  }

 private:
  friend class Part;
  friend class Video;
  explicit Picture(vlmtrim_kind kind) { part_.kind = kind; }
  vlmtrim_part part_{};
  std::string path_;
};

// Frames of one size in order, `fps` of them a second as they are given. All of them are seen.
class Video {
 public:
  explicit Video(const std::vector<Picture>& frames, double fps = 2) : fps_(fps), frames_(std::make_shared<Frames>()) {
    for (const Picture& frame : frames) {
      frames_->paths.push_back(frame.path_);
      frames_->parts.push_back(frame.part_);
    }
    for (size_t i = 0; i < frames.size(); ++i) frames_->parts[i].text = frames_->paths[i].c_str();
  }

 private:
  friend class Part;
  struct Frames {
    std::vector<std::string> paths;
    std::vector<vlmtrim_part> parts;
  };
  double fps_;
  std::shared_ptr<Frames> frames_;
};

// Words, a picture or a video.
class Part {
 public:
  Part(std::string words) : text_(std::move(words)) {}  // NOLINT(google-explicit-constructor)
  Part(const char* words) : text_(words) {}             // NOLINT(google-explicit-constructor)
  Part(Picture picture) : part_(picture.part_), text_(std::move(picture.path_)) {}  // NOLINT
  Part(Video video) : frames_(std::move(video.frames_)) {                           // NOLINT
    part_.kind = VLMTRIM_VIDEO;
    part_.frames = frames_->parts.data();
    part_.frame_count = frames_->parts.size();
    part_.fps = video.fps_;
  }
  vlmtrim_part get() const {
    vlmtrim_part part = part_;
    part.text = text_.c_str();
    return part;
  }

 private:
  vlmtrim_part part_{};
  std::string text_;
  std::shared_ptr<Video::Frames> frames_;
};

struct GenerateOptions {
  int max_new_tokens = 128;
  double temperature = 0;  // greedy
  int64_t top_k = 0;
  double top_p = 1;
  std::optional<uint64_t> seed;
  std::vector<std::string> stop;
  std::vector<float> guide;
};

struct Step {
  int64_t index = 0, token = 0;
  std::string text;
  vlmtrim_ended ended = VLMTRIM_GOES_ON;
};

// What became of a question with pictures that a guide was asked first, see vlmtrim_session_guide.
struct Guidance {
  double confidence = 0;
  bool exited = false;          // the guide's answer was given
  double small = 0, large = 0;  // seconds that guide and guided bundle took
};

struct Answer {
  std::string text;
  std::vector<int64_t> tokens;
  vlmtrim_ended ended = VLMTRIM_GOES_ON;
  int64_t visual = 0, kept = 0;
  std::optional<std::vector<int64_t>> kept_by_layer;
  double vision_seconds = 0, prefill_seconds = 0, decode_seconds = 0;  // since the session was opened or reset
  int64_t decode_steps = 0;
  std::string caches;  // JSON of what a cache policy left; empty without one
  double caches_seconds = 0;
  std::optional<Guidance> guidance;
};

// Called with every token; false ends the answer. It must not throw.
using Listener = std::function<bool(const Step&)>;

class Session {
 public:
  static Result<Session> open(const Model& model) {
    vlmtrim_session* opened = nullptr;
    const vlmtrim_status status = vlmtrim_session_open(model.get(), &opened);
    if (status != VLMTRIM_OK) return last_error(status);
    return Session(opened);
  }

  std::optional<Error> reset(const std::string& system = "") {
    const vlmtrim_status status = vlmtrim_session_reset(session_.get(), system.c_str());
    if (status != VLMTRIM_OK) return last_error(status);
    return std::nullopt;
  }

  // See vlmtrim_session_caches.
  std::optional<Error> caches(double share, int64_t every = 0) {
    const vlmtrim_status status = vlmtrim_session_caches(session_.get(), share, every);
    if (status != VLMTRIM_OK) return last_error(status);
    return std::nullopt;
  }

  // See vlmtrim_session_guide.
  std::optional<Error> guide(const Model& small, double exit_confidence = 0) {
    const vlmtrim_status status = vlmtrim_session_guide(session_.get(), small.get(), exit_confidence);
    if (status != VLMTRIM_OK) return last_error(status);
    return std::nullopt;
  }

  void cancel() { vlmtrim_cancel(session_.get()); }

  Result<Answer> generate(const std::vector<Part>& parts, const GenerateOptions& options = {},
                          const Listener& listener = nullptr) {
    const std::vector<vlmtrim_part> given = taken(parts);
    return run(options, listener, [&](const auto* settings, auto callback, void* user, vlmtrim_answer* answer) {
      return vlmtrim_generate(session_.get(), given.data(), given.size(), settings, callback, user, answer);
    });
  }

  // Token ids, with the image token once for each picture (or video), or all of their tokens.
  Result<Answer> generate_ids(const std::vector<int64_t>& ids, const std::vector<Part>& pictures = {},
                              const GenerateOptions& options = {}, const Listener& listener = nullptr) {
    const std::vector<vlmtrim_part> given = taken(pictures);
    return run(options, listener, [&](const auto* settings, auto callback, void* user, vlmtrim_answer* answer) {
      return vlmtrim_generate_ids(session_.get(), ids.data(), ids.size(), given.data(), given.size(), settings,
                                  callback, user, answer);
    });
  }

 private:
  explicit Session(vlmtrim_session* session) : session_(session, vlmtrim_session_close) {}

  static std::vector<vlmtrim_part> taken(const std::vector<Part>& parts) {
    std::vector<vlmtrim_part> given;
    for (const Part& part : parts) given.push_back(part.get());
    return given;
  }

  template <class Call>
  Result<Answer> run(const GenerateOptions& options, const Listener& listener, const Call& call) {
    vlmtrim_generate_options settings{};
    settings.size = sizeof settings;
    settings.max_new_tokens = options.max_new_tokens;
    settings.temperature = options.temperature;
    settings.top_k = options.top_k;
    settings.top_p = options.top_p;
    settings.has_seed = options.seed ? 1 : 0;
    settings.seed = options.seed.value_or(0);
    std::vector<const char*> stops;
    for (const auto& stop : options.stop) stops.push_back(stop.c_str());
    settings.stop = stops.data();
    settings.stops = stops.size();
    settings.guide = options.guide.data();
    settings.guides = options.guide.size();
    const vlmtrim_callback callback = [](void* user, const vlmtrim_step* step) -> int32_t {
      const auto& heard = *static_cast<const Listener*>(user);
      return heard({step->index, step->token, {step->text, step->text_length}, step->ended}) ? 0 : 1;
    };
    vlmtrim_answer found{};
    found.size = sizeof found;
    Listener copy = listener;
    const vlmtrim_status status = call(&settings, copy ? callback : nullptr, static_cast<void*>(&copy), &found);
    if (status != VLMTRIM_OK) return last_error(status);
    Answer answer;
    answer.text.assign(found.text, found.text_length);
    answer.tokens.assign(found.tokens, found.tokens + found.token_count);
    answer.ended = found.ended;
    answer.visual = found.visual;
    answer.kept = found.kept;
    if (found.kept_by_layer != nullptr) {
      answer.kept_by_layer.emplace(found.kept_by_layer, found.kept_by_layer + found.layers);
    }
    answer.vision_seconds = found.vision_seconds;
    answer.prefill_seconds = found.prefill_seconds;
    answer.decode_seconds = found.decode_seconds;
    answer.decode_steps = found.decode_steps;
    if (found.caches != nullptr) answer.caches = found.caches;
    answer.caches_seconds = found.caches_seconds;
    if (found.guided != 0) {
      answer.guidance = Guidance{found.confidence, found.exited != 0, found.guide_seconds, found.guided_seconds};
    }
    return answer;
  }

  std::unique_ptr<vlmtrim_session, void (*)(vlmtrim_session*)> session_;
};

}  // namespace vlmtrim
