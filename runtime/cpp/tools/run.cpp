// vlmtrim-run: asks a bundle about pictures, as run-vlm does.
#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <cinttypes>
#include <cmath>
#include <cstdio>
#include <filesystem>
#include <iterator>
#include <nlohmann/json.hpp>

#include "arguments.hpp"
#include "vlmtrim.hpp"

namespace {

using Json = nlohmann::ordered_json;
using tools::Arguments;
using tools::BadArguments;

constexpr const char* kHelp = R"(usage: vlmtrim-run BUNDLE --prompt TEXT [--image FILE]... [--video FOLDER] [options]

Ask a bundle about a picture; the answer is streamed to stdout.

  BUNDLE                 bundle folder made by export-vlm
  --prompt TEXT          question, or - for stdin
  --image FILE           PNG, JPEG or WebP file; repeat for several
  --video FOLDER         a video: the pictures of a folder by name, all of which are seen; or --video FRAME repeated
  --fps N                frames a second that they are (default 2)
  --system TEXT          what stands before the first question
  --ids "I J ..."        token ids in place of --prompt, with the image token once a picture or video, or all of theirs
  --backend NAME         auto (default), ort-cpu, ort-cuda; tensorrt, tensorrt-rtx where they are built in
  --cuda-graphs HOW      how TensorRT's decode steps are replayed: auto (default), capture or off
  --threads N            CPU threads of ONNX Runtime (default: one per core)
  --activations KIND     what packed weights are multiplied by: int8 (default) or float32 (exact and slow)
  --guide SMALL          with a bundle of --method guided: the bundle (--emit-guide) that shows which tokens to keep
  --exit-confidence C    give the guide's answer where the geometric mean of its tokens' probabilities reaches C
  --cache-share S        with a bundle of --cache: share of the visual tokens that stays in the caches
  --cache-every T        with a bundle of --cache keyformer or scope: decode steps between two rounds
  --max-new-tokens N     at most so many tokens (default 128)
  --stop TEXT            end the answer before this text; repeatable
  --temperature T        0 is greedy (default)
  --top-k K --top-p P    draw from the most probable tokens alone
  --seed S               draws the same tokens again
  --verify               hash every byte of the bundle
  --json                 print one JSON object instead of streaming
  --version, --help

Exit status: 0 done, 1 the work failed, 2 bad input.
)";
constexpr const char* kEndings[] = {"",
                                    "the model ended it",
                                    "ended before a --stop text",
                                    "cut after --max-new-tokens",
                                    "cut where the caches were full",
                                    "cancelled"};
constexpr const char* kNames[] = {"", "eos", "stop", "length", "capacity", "cancelled"};

double seconds() { return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count(); }

double rounded(double value) { return std::round(value * 1e6) / 1e6; }

int refuse(const std::string& message, int status) {
  std::fprintf(stderr, "vlmtrim-run: %s\n", message.c_str());
  return status;
}

int refuse(const vlmtrim::Error& error) { return refuse(error.message, error.status == VLMTRIM_FAILED ? 1 : 2); }

// Text for a terminal: control characters are written out instead of obeyed.
std::string harmless(const std::string& text) {
  static const bool terminal = isatty(STDOUT_FILENO) != 0;
  if (!terminal) return text;
  std::string made;
  for (const char c : text) {
    const auto byte = static_cast<unsigned char>(c);
    char code[8];
    std::snprintf(code, sizeof code, "\\x%02x", byte);
    made += (byte < 32 && c != '\n' && c != '\t') || byte == 127 ? std::string(code) : std::string(1, c);
  }
  return made;
}

vlmtrim::GenerateOptions options_of(const Arguments& arguments) {
  vlmtrim::GenerateOptions options;
  options.max_new_tokens = arguments.number("--max-new-tokens", 128, 1);
  options.temperature = arguments.number("--temperature", 0.0, 0);
  options.top_k = arguments.number("--top-k", int64_t{0}, 0);
  options.top_p = arguments.number("--top-p", 1.0, 0);
  if (arguments.last("--seed")) options.seed = arguments.number("--seed", uint64_t{0}, 0);
  options.stop = arguments.all("--stop");
  return options;
}

vlmtrim::ModelOptions model_of(const Arguments& arguments) {
  vlmtrim::ModelOptions options;
  options.backend = arguments.last("--backend").value_or("auto");
  options.cuda_graphs = arguments.last("--cuda-graphs").value_or("auto");
  options.threads = arguments.number("--threads", 0, 0);
  const std::string activations = arguments.last("--activations").value_or("int8");
  if (activations != "int8" && activations != "float32") {
    throw BadArguments{"--activations is " + activations + "; give int8 or float32"};
  }
  options.exact = activations == "float32";
  options.verify = arguments.flag("--verify");
  return options;
}

// What --video names: frames, and folders for their files by name.
std::vector<vlmtrim::Picture> frames_of(const std::vector<std::string>& paths) {
  namespace fs = std::filesystem;
  std::vector<vlmtrim::Picture> frames;
  for (const auto& path : paths) {
    std::vector<std::string> files;
    std::error_code problem;
    if (fs::is_directory(path, problem)) {
      for (fs::directory_iterator entry(path, problem), end; !problem && entry != end; entry.increment(problem)) {
        files.push_back(entry->path().string());
      }
      if (problem) throw BadArguments{"the folder " + path + " cannot be read; give one with frames"};
    } else {
      files.push_back(path);
    }
    std::sort(files.begin(), files.end());
    for (auto& file : files) frames.push_back(vlmtrim::Picture::file(std::move(file)));
  }
  return frames;
}

// Pictures, then the video.
std::vector<vlmtrim::Part> shown_of(const Arguments& arguments) {
  std::vector<vlmtrim::Part> parts;
  for (const auto& path : arguments.all("--image")) parts.emplace_back(vlmtrim::Picture::file(path));
  const auto paths = arguments.all("--video");
  const double fps = arguments.number("--fps", 2.0, 0);
  if (fps == 0) throw BadArguments{"--fps is 0; give a number above 0"};
  if (!paths.empty()) parts.emplace_back(vlmtrim::Video(frames_of(paths), fps));
  return parts;
}

std::vector<int64_t> ids_of(const std::string& text) {
  std::vector<int64_t> ids;
  const char* at = text.c_str();
  for (;;) {
    char* end = nullptr;
    const long long id = std::strtoll(at, &end, 10);
    if (end == at) break;
    ids.push_back(id);
    at = end;
  }
  while (*at == ' ') ++at;
  if (*at != 0) throw BadArguments{"--ids holds something else than numbers"};
  return ids;
}

Json guidance_of(const vlmtrim::Guidance& guidance) {
  return {{"confidence", rounded(guidance.confidence)},
          {"exited", guidance.exited},
          {"small", rounded(guidance.small)},
          {"large", rounded(guidance.large)}};
}

// What --json prints: the record of run-vlm.
Json record(const vlmtrim::Answer& answer, const Json& model, double opened) {
  return {{"text", answer.text},
          {"token_ids", answer.tokens},
          {"ended", kNames[answer.ended]},
          {"visual", answer.visual},
          {"kept", answer.kept},
          {"removed", answer.visual - answer.kept},
          {"kept_by_layer", answer.kept_by_layer ? Json(*answer.kept_by_layer) : Json()},
          {"caches", answer.caches.empty() ? Json() : Json::parse(answer.caches)},
          {"backend", model.at("backend")},
          {"selection", model.at("selection")},
          {"guide", answer.guidance ? guidance_of(*answer.guidance) : Json()},
          {"times",
           {{"open", rounded(opened)},
            {"vision", rounded(answer.vision_seconds)},
            {"prefill", rounded(answer.prefill_seconds)},
            {"decode", rounded(answer.decode_seconds)},
            {"caches", rounded(answer.caches_seconds)}}}};
}

// Gives the session the guide of --guide, whose description is left in `description`.
std::optional<vlmtrim::Error> guided(vlmtrim::Session& session, const Arguments& arguments, std::string& description) {
  const auto folder = arguments.last("--guide");
  const bool exits = arguments.last("--exit-confidence").has_value();
  if (exits && !folder) throw BadArguments{"--exit-confidence is of a guide's answer; give --guide SMALL as well"};
  if (!folder) return std::nullopt;
  const double confidence = arguments.number("--exit-confidence", 0.0, 0);
  if (exits && confidence == 0) throw BadArguments{"--exit-confidence is 0; give a probability above 0, at most 1"};
  const auto small = vlmtrim::Model::open(*folder, model_of(arguments));
  if (!small) return small.error();
  description = small->description();
  return session.guide(*small, confidence);
}

void finish(const vlmtrim::Answer& answer, const Json& model, const Arguments& arguments) {
  const double rate = answer.decode_seconds > 0 ? static_cast<double>(answer.decode_steps) / answer.decode_seconds : 0;
  std::printf("\n");
  std::fflush(stdout);
  if (answer.guidance) {
    const std::string who = answer.guidance->exited ? "its answer" : "guided " + arguments.plain[0];
    std::fprintf(stderr, "guide %s: confidence %.3f, %.3f s; %s\n", arguments.last("--guide")->c_str(),
                 answer.guidance->confidence, answer.guidance->small, who.c_str());
  }
  std::fprintf(stderr,
               "%" PRId64 " %s, %" PRId64 " kept, %" PRId64
               " removed; vision %.3f s, prefill %.3f s, decode %.1f tokens/s (%s; %s)\n",
               answer.visual, model.at("crosses").get<bool>() ? "image features" : "visual tokens", answer.kept,
               answer.visual - answer.kept, answer.vision_seconds, answer.prefill_seconds, rate,
               model.at("backend").get<std::string>().c_str(), kEndings[answer.ended]);
}

int run(const Arguments& arguments) {
  if (arguments.plain.size() != 1) throw BadArguments{"give one bundle folder; see --help"};
  auto prompt = arguments.last("--prompt");
  const auto ids = arguments.last("--ids");
  if (prompt.has_value() == ids.has_value()) throw BadArguments{"give --prompt TEXT, or --ids"};
  if (prompt == "-") prompt = std::string(std::istreambuf_iterator<char>(std::cin), {});
  const vlmtrim::GenerateOptions options = options_of(arguments);
  const double start = seconds();
  auto model = vlmtrim::Model::open(arguments.plain[0], model_of(arguments));
  if (!model) return refuse(model.error());
  auto session = vlmtrim::Session::open(*model);
  if (!session) return refuse(session.error());
  std::string guide;
  if (const auto error = guided(*session, arguments, guide)) return refuse(*error);
  const double opened = seconds() - start;
  if (const auto error = session->reset(arguments.last("--system").value_or(""))) return refuse(*error);
  if (arguments.last("--cache-share") || arguments.last("--cache-every")) {
    const double share = arguments.number("--cache-share", -1.0, 0);
    if (const auto error = session->caches(share, arguments.number("--cache-every", int64_t{0}, 1))) {
      return refuse(*error);
    }
  }
  std::vector<vlmtrim::Part> parts = shown_of(arguments);
  const bool json = arguments.flag("--json");
  const vlmtrim::Listener listener = [json](const vlmtrim::Step& step) {
    if (json) return true;
    const std::string text = harmless(step.text);
    return std::fwrite(text.data(), 1, text.size(), stdout) == text.size() && std::fflush(stdout) == 0;
  };
  if (prompt) parts.emplace_back(*prompt);
  const auto answer = prompt ? session->generate(parts, options, listener)
                             : session->generate_ids(ids_of(*ids), parts, options, listener);
  if (!answer) return refuse(answer.error());
  const bool exited = answer->guidance && answer->guidance->exited;
  const Json description = Json::parse(exited ? guide : model->description());
  if (!json) {
    finish(*answer, description, arguments);
    return 0;
  }
  const std::string line = record(*answer, description, opened).dump(-1, ' ', true, Json::error_handler_t::replace);
  std::printf("%s\n", line.c_str());
  return std::fflush(stdout) == 0 ? 0 : 1;
}

}  // namespace

int main(int count, char** values) {
  try {
    const Arguments arguments(count, values,
                              {"--prompt",      "--image",       "--video",       "--fps",         "--system",
                               "--ids",         "--backend",     "--cuda-graphs", "--guide",       "--exit-confidence",
                               "--cache-share", "--cache-every", "--threads",     "--activations", "--max-new-tokens",
                               "--stop",        "--temperature", "--top-k",       "--top-p",       "--seed"},
                              {"--verify", "--json", "--version", "--help"});
    if (arguments.flag("--help")) return std::fputs(kHelp, stdout) < 0 ? 1 : 0;
    if (arguments.flag("--version")) return std::printf("vlmtrim %s\n", vlmtrim_version()) < 0 ? 1 : 0;
    return run(arguments);
  } catch (const BadArguments& problem) {
    return refuse(problem.message, 2);
  } catch (const std::exception& error) {
    return refuse(error.what(), 1);
  }
}
