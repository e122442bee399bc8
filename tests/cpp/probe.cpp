// Shows the tests of the C++ runtime what is inside it.
#include "probe.hpp"

#include <cstring>
#include <map>
#include <memory>
#include <string>
#include <vector>

#include "core/error.hpp"
#include "core/sha256.hpp"
#include "picture/picture.hpp"
#include "session.hpp"

namespace {

using namespace vlmtrim;

void keep_pictures(const Pictures& pictures) {
  keep("tokens", pictures.tokens);
  Json inputs = Json::object();
  for (const auto& [name, tensor] : pictures.inputs) {
    results()[name].assign(tensor.as<char>(), tensor.nbytes());
    inputs[name] = {{"shape", tensor.shape}, {"dtype", name_of(tensor.dtype)}};
  }
  results()["json"] = Json{{"inputs", inputs}, {"grids", pictures.grids}, {"words", pictures.words}}.dump();
}

struct Probed {
  std::shared_ptr<Model> model;
  std::unique_ptr<Session> session;
};

// Tensors of the host from {"name": {"shape": [...], "dtype": "..."}} and their memory in the order of the names.
Pictures pictures_of(const char* description, const void* const* data) {
  const Json described = Json::parse(description);
  Pictures pictures;
  pictures.tokens = described.at("tokens").get<std::vector<int64_t>>();
  pictures.grids = described.at("grids").get<std::vector<std::vector<int64_t>>>();
  for (const auto& [name, tensor] : described.at("inputs").items()) {
    Tensor made = Tensor::empty(*dtype_named(tensor.at("dtype")), tensor.at("shape").get<Shape>());
    std::memcpy(made.data, *data++, made.nbytes());
    pictures.inputs[name] = made;
  }
  return pictures;
}

void keep_prefill(const Prefill& done) {
  keep("logits", done.logits);
  keep("visual_positions", done.visual_positions);
  if (done.kept_indices) keep("kept_indices", *done.kept_indices);
  if (done.visual_scores) keep("visual_scores", *done.visual_scores);
  if (done.kept_features) keep("kept_features", *done.kept_features);
  Json record{{"visual", done.visual}, {"kept", done.kept}};
  if (done.kept_by_layer) record["kept_by_layer"] = *done.kept_by_layer;
  if (done.held) record["held"] = *done.held;
  results()["json"] = record.dump();
}

}  // namespace

std::map<std::string, std::string>& results() {
  thread_local std::map<std::string, std::string> held;
  return held;
}

PROBE const char* probe_result(const char* name, size_t* size) {
  const auto found = results().find(name);
  *size = found == results().end() ? 0 : found->second.size();
  return found == results().end() ? nullptr : found->second.data();
}

PROBE int probe_bundle(const char* folder, int verify) {
  return guarded([&] { open_bundle(folder, verify != 0); });
}

PROBE int probe_sha256(const char* data, size_t size) {
  return guarded([&] {
    Sha256 digest;
    for (size_t at = 0; at < size; at += 1000) digest.update(data + at, std::min<size_t>(1000, size - at));
    results()["digest"] = digest.finish();
  });
}

PROBE int probe_cast(const float* values, size_t count, const char* dtype) {
  return guarded([&] {
    const Tensor wide = Tensor::of(std::vector<float>(values, values + count), {static_cast<int64_t>(count)});
    const Tensor narrow = cast(wide, *dtype_named(dtype));
    results()["bits"].assign(narrow.as<char>(), narrow.nbytes());
    keep("back", floats_of(narrow));
  });
}

PROBE void* probe_open(const char* folder, const char* backend, const char* cuda_graphs, int exact) {
  Probed* opened = nullptr;
  guarded([&] {
    ModelOptions options;
    options.backend = backend;
    options.library.cuda_graphs = cuda_graphs;
    options.library.exact_activations = exact != 0;
    auto made = std::make_unique<Probed>();
    made->model = Model::open(folder, options);
    made->session = std::make_unique<Session>(made->model);
    opened = made.release();
  });
  return opened;
}

PROBE void probe_close(void* opened) { delete static_cast<Probed*>(opened); }

PROBE int probe_reset(void* opened) {
  return guarded([&] { static_cast<Probed*>(opened)->session->reset(); });
}

PROBE int probe_caches(void* opened, double share, int64_t every) {
  return guarded([&] {
    Caching& caching = static_cast<Probed*>(opened)->session->caching();
    if (every != 0) caching.set_every(every);
    if (share >= 0) caching.set_share(share);
  });
}

PROBE int probe_sum_attention(void* opened) {
  return guarded([&] { static_cast<Probed*>(opened)->session->attention().sum(); });
}

PROBE int probe_received(void* opened) {
  return guarded([&] { keep("received", static_cast<Probed*>(opened)->session->attention().received()); });
}

PROBE int probe_prefill(void* opened, const int64_t* ids, size_t count, const char* pictures, const void* const* data,
                        const float* guide, size_t scores) {
  return guarded([&] {
    Session& session = *static_cast<Probed*>(opened)->session;
    const Pictures given = pictures != nullptr ? pictures_of(pictures, data) : Pictures{};
    const std::vector<float> ranks(guide, guide + scores);
    keep_prefill(session.prefill({ids, ids + count}, pictures != nullptr ? &given : nullptr,
                                 guide != nullptr ? &ranks : nullptr));
    keep("entries", session.entries());
  });
}

PROBE int probe_decode(void* opened, int64_t token) {
  return guarded([&] {
    Session& session = *static_cast<Probed*>(opened)->session;
    keep("logits", session.decode(token));
    keep("entries", session.entries());
  });
}

PROBE int probe_picture(const char* data, size_t size) {
  return guarded([&] {
    const Picture picture = decode_picture({data, size}, "the picture");
    keep("rgb", picture.rgb);
    keep("size", std::vector<int64_t>{picture.height, picture.width});
  });
}

PROBE int probe_resize(const uint8_t* pixels, int width, int height, int to_width, int to_height, int filter,
                       const float* box) {
  return guarded([&] {
    const Picture picture = from_pixels(pixels, width, height, int64_t{3} * width, 3);
    keep("rgb", box == nullptr ? resized(picture, to_width, to_height, filter).rgb
                               : resized(picture, to_width, to_height, filter, {box[0], box[1], box[2], box[3]}).rgb);
  });
}

// What the bundle's processor makes of pictures and videos: RGB one after the other; of each (height, width, frames)
// and frames a second, 0 for a picture.
PROBE int probe_process(void* opened, const uint8_t* pixels, const int* sizes, const double* fps, int count) {
  return guarded([&] {
    std::vector<Shown> shown;
    for (int i = 0; i < count; ++i) {
      const int height = sizes[3 * i], width = sizes[3 * i + 1], frames = sizes[3 * i + 2];
      const auto open = [&](size_t) {
        const uint8_t* const from = pixels;
        pixels += size_t{3} * height * width;
        return from_pixels(from, width, height, int64_t{3} * width, 3);
      };
      shown.push_back(fps[i] > 0 ? Shown::video(frames, fps[i], open) : Shown::of(open(0)));
    }
    keep_pictures(static_cast<Probed*>(opened)->model->processor().prepare(shown));
  });
}
