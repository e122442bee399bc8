// The C interface: exceptions end here.
#include <atomic>
#include <cstddef>

#include "core/error.hpp"
#include "guided.hpp"
#include "text/unicode.hpp"
#include "vlmtrim.h"

#ifndef VLMTRIM_VERSION
#define VLMTRIM_VERSION "0.0.0"
#endif

struct vlmtrim_model {
  std::shared_ptr<vlmtrim::Model> model;
  std::string description;
};

struct vlmtrim_session {
  vlmtrim::Chat chat;
  std::unique_ptr<vlmtrim::Guided> guided;  // null: asked without a guide
  std::atomic<vlmtrim::Guided*> cancelled_too{nullptr};
  std::atomic<bool> busy{false};
  vlmtrim::Answer answer;

  explicit vlmtrim_session(std::shared_ptr<vlmtrim::Model> model) : chat(std::move(model)) {}
};

namespace {

using namespace vlmtrim;

thread_local std::string message;

template <class Work>
vlmtrim_status guarded(const Work& work) noexcept {
  try {
    work();
    return VLMTRIM_OK;
  } catch (const BundleError& error) {
    message = lossy_utf8(error.what());
    return VLMTRIM_BAD_BUNDLE;
  } catch (const Refusal& error) {
    message = lossy_utf8(error.what());
    return VLMTRIM_REFUSED;
  } catch (const std::bad_alloc&) {
    message = "there is not enough memory";
  } catch (const std::exception& error) {
    message = "an error inside the library: " + lossy_utf8(error.what());
  } catch (...) {
    message = "an error inside the library";
  }
  return VLMTRIM_FAILED;
}

// A session that is not waited for.
class Alone {
 public:
  explicit Alone(vlmtrim_session& session) : session_(session) {
    if (session_.busy.exchange(true)) {
      throw Refusal("another thread is using this session; wait for it, or open a session for each thread");
    }
  }
  ~Alone() { session_.busy = false; }
  Alone(const Alone&) = delete;
  Alone& operator=(const Alone&) = delete;

 private:
  vlmtrim_session& session_;
};

template <class T>
T& there(T* pointer, const char* what) {
  if (pointer == nullptr) throw Refusal(said(what, " is NULL"));
  return *pointer;
}

// The part of a caller's struct that it has, which may be of an older or newer header; the rest is zero.
template <class T>
T known(const T* given, const char* what) {
  T made{};
  if (given == nullptr) return made;
  if (given->size < sizeof(size_t) || given->size > 65536) {
    throw Refusal(said(what, ".size is ", given->size, "; set it to sizeof ", what));
  }
  std::memcpy(&made, given, std::min(given->size, sizeof made));
  return made;
}

std::string text_of(const char* text) { return text == nullptr ? "" : text; }

Picture picture_of(const vlmtrim_part& part) {
  switch (part.kind) {
    case VLMTRIM_FILE:
      return load_picture(text_of(part.text));
    case VLMTRIM_BYTES:
      there(part.data, "data");
      return decode_picture({reinterpret_cast<const char*>(part.data), part.length}, "the picture");
    case VLMTRIM_PIXELS:
      return from_pixels(part.data, part.width, part.height, part.stride, part.channels);
    default:
      throw Refusal("a picture is of no kind that there is; give VLMTRIM_FILE, VLMTRIM_BYTES or VLMTRIM_PIXELS");
  }
}

Shown shown_of(const vlmtrim_part& part) {
  if (part.kind != VLMTRIM_VIDEO) return Shown::of(picture_of(part));
  const auto open = [&](size_t number) { return picture_of((&there(part.frames, "frames"))[number]); };
  return Shown::video(part.frame_count, part.fps == 0 ? 2 : part.fps, open);
}

GenerateOptions options_of(const vlmtrim_generate_options* given) {
  const auto raw = known(given, "vlmtrim_generate_options");
  GenerateOptions options;
  if (raw.max_new_tokens != 0) options.max_new_tokens = raw.max_new_tokens;
  options.sampling.temperature = raw.temperature;
  options.sampling.top_k = raw.top_k;
  if (raw.top_p != 0) options.sampling.top_p = raw.top_p;
  if (raw.has_seed != 0) options.sampling.seed = raw.seed;
  for (size_t i = 0; i < raw.stops; ++i) options.stop.push_back(text_of((&there(raw.stop, "stop"))[i]));
  if (raw.guides > 0) options.guide.assign(&there(raw.guide, "guide"), raw.guide + raw.guides);
  return options;
}

Listener listener_of(vlmtrim_callback callback, void* user) {
  if (callback == nullptr) return nullptr;
  return [callback, user](const Step& step) {
    const vlmtrim_step shown{sizeof shown,      step.index,       step.token,
                             step.text.c_str(), step.text.size(), static_cast<vlmtrim_ended>(step.ended)};
    return callback(user, &shown) == 0;
  };
}

void fill(vlmtrim_session& session, Answer answer, vlmtrim_answer* target) {
  session.answer = std::move(answer);
  if (target == nullptr) return;
  const Answer& held = session.answer;
  const bool guided = session.guided && session.guided->guidance();
  const Times& times = (guided ? session.guided->session() : session.chat.session()).times();
  vlmtrim_answer made{};
  made.size = target->size;
  made.text = held.text.c_str();
  made.text_length = held.text.size();
  made.tokens = held.tokens.data();
  made.token_count = held.tokens.size();
  made.ended = static_cast<vlmtrim_ended>(held.ended);
  made.visual = held.visual;
  made.kept = held.kept;
  made.kept_by_layer = held.kept_by_layer ? held.kept_by_layer->data() : nullptr;
  made.layers = held.kept_by_layer ? held.kept_by_layer->size() : 0;
  made.vision_seconds = times.vision;
  made.prefill_seconds = times.prefill;
  made.decode_seconds = times.decode;
  made.decode_steps = times.steps;
  made.caches = held.caches.empty() ? nullptr : held.caches.c_str();
  made.caches_seconds = times.caches;
  if (guided) {
    const Guidance& guidance = *session.guided->guidance();
    made.guided = 1;
    made.exited = guidance.exited ? 1 : 0;
    made.confidence = guidance.confidence;
    made.guide_seconds = guidance.small;
    made.guided_seconds = guidance.large;
  }
  std::memcpy(target, &made, std::min(target->size, sizeof made));
}

std::string described(Model& model) {
  const Contract& contract = model.contract();
  return Json{{"family", contract.family},
              {"backend", model.backend().name()},
              {"selection", contract.selection},
              {"max_seq_len", contract.max_seq_len},
              {"image_tokens", contract.image_tokens},
              {"image_token_id", contract.image_token_id},
              {"crosses", contract.crosses()}}
      .dump(-1, ' ', true, Json::error_handler_t::replace);
}

}  // namespace

extern "C" {

const char* vlmtrim_version(void) { return VLMTRIM_VERSION; }

const char* vlmtrim_error(void) { return message.c_str(); }

vlmtrim_status vlmtrim_model_open(const char* folder, const vlmtrim_model_options* given, vlmtrim_model** model) {
  return guarded([&] {
    there(model, "model") = nullptr;
    there(folder, "folder");
    const auto raw = known(given, "vlmtrim_model_options");
    ModelOptions options;
    if (raw.backend != nullptr && *raw.backend != 0) options.backend = raw.backend;
    options.library.library = text_of(raw.onnxruntime);
    options.library.threads = raw.threads;
    options.library.exact_activations = raw.exact != 0;
    options.verify = raw.verify != 0;
    options.library.tensorrt = text_of(raw.tensorrt);
    if (raw.cuda_graphs != nullptr && *raw.cuda_graphs != 0) options.library.cuda_graphs = raw.cuda_graphs;
    auto made = std::make_unique<vlmtrim_model>();
    made->model = Model::open(folder, options);
    made->description = described(*made->model);
    *model = made.release();
  });
}

void vlmtrim_model_close(vlmtrim_model* model) { delete model; }

const char* vlmtrim_model_description(const vlmtrim_model* model) {
  return model == nullptr ? "{}" : model->description.c_str();
}

vlmtrim_status vlmtrim_session_open(vlmtrim_model* model, vlmtrim_session** session) {
  return guarded([&] {
    there(session, "session") = nullptr;
    *session = new vlmtrim_session(there(model, "model").model);
  });
}

vlmtrim_status vlmtrim_session_caches(vlmtrim_session* session, double share, int64_t every) {
  return guarded([&] {
    const Alone alone(there(session, "session"));
    Caching& caching = session->chat.session().caching();
    if (every != 0) caching.set_every(every);
    if (share >= 0) caching.set_share(share);
  });
}

void vlmtrim_session_close(vlmtrim_session* session) { delete session; }

vlmtrim_status vlmtrim_session_reset(vlmtrim_session* session, const char* system) {
  return guarded([&] {
    const Alone alone(there(session, "session"));
    if (session->guided) session->guided->reset(text_of(system));
    else session->chat.reset(text_of(system));
  });
}

vlmtrim_status vlmtrim_session_guide(vlmtrim_session* session, vlmtrim_model* small, double exit_confidence) {
  return guarded([&] {
    const Alone alone(there(session, "session"));
    if (session->guided) throw Refusal("the session has a guide already; open another session for another guide");
    const auto exit = exit_confidence == 0 ? std::nullopt : std::make_optional(exit_confidence);
    auto made = std::make_unique<Guided>(there(small, "small").model, session->chat, exit);
    made->reset("");
    session->cancelled_too = made.get();
    session->guided = std::move(made);
  });
}

void vlmtrim_cancel(vlmtrim_session* session) {
  if (session == nullptr) return;
  session->chat.cancel();
  if (Guided* guided = session->cancelled_too) guided->cancel();
}

vlmtrim_status vlmtrim_generate(vlmtrim_session* session, const vlmtrim_part* parts, size_t count,
                                const vlmtrim_generate_options* options, vlmtrim_callback callback, void* user,
                                vlmtrim_answer* answer) {
  return guarded([&] {
    const Alone alone(there(session, "session"));
    known(answer, "vlmtrim_answer");
    std::vector<Part> given;
    std::vector<Shown> shown;
    for (size_t i = 0; i < count; ++i) {
      const vlmtrim_part& part = (&there(parts, "parts"))[i];
      const bool words = part.kind == VLMTRIM_TEXT;
      given.push_back({words ? text_of(part.text) : "", !words, part.kind == VLMTRIM_VIDEO});
      if (!words) shown.push_back(shown_of(part));
    }
    const GenerateOptions settings = options_of(options);
    const Listener listener = listener_of(callback, user);
    fill(*session,
         session->guided ? session->guided->generate(given, shown, settings, listener)
                         : session->chat.generate(given, shown, settings, listener),
         answer);
  });
}

vlmtrim_status vlmtrim_generate_ids(vlmtrim_session* session, const int64_t* ids, size_t id_count,
                                    const vlmtrim_part* pictures, size_t picture_count,
                                    const vlmtrim_generate_options* options, vlmtrim_callback callback, void* user,
                                    vlmtrim_answer* answer) {
  return guarded([&] {
    const Alone alone(there(session, "session"));
    known(answer, "vlmtrim_answer");
    if (session->guided) throw Refusal("a session with a guide takes words; give no token ids, or scores as guide");
    std::vector<Shown> given;
    for (size_t i = 0; i < picture_count; ++i) given.push_back(shown_of((&there(pictures, "pictures"))[i]));
    const std::vector<int64_t> tokens(ids, ids + (ids == nullptr ? 0 : id_count));
    fill(*session, session->chat.generate_ids(tokens, given, options_of(options), listener_of(callback, user)), answer);
  });
}

}  // extern "C"
