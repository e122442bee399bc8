// vlmtrim-bench: times of bundles that answer the same question in turns, medians, and the ratio to the first bundle.
#include <algorithm>
#include <cstdio>
#include <fstream>
#include <nlohmann/json.hpp>

#include "arguments.hpp"
#include "vlmtrim.hpp"

namespace {

using Json = nlohmann::ordered_json;
using tools::Arguments;
using tools::BadArguments;

constexpr const char* kHelp = R"(usage: vlmtrim-bench BUNDLE... --image FILE [options]

Time bundles that answer the same question about a picture, in turns: medians in milliseconds, and ratios to the first.

  --prompt TEXT          question (default: Describe the picture.)
  --rounds N             of every bundle, behind one that warms up (default 5)
  --max-new-tokens N     of every answer (default 32)
  --backend NAME         auto (default), ort-cpu, ort-cuda; tensorrt, tensorrt-rtx where they are built in
  --cuda-graphs HOW      how TensorRT's decode steps are replayed: auto (default), capture or off
  --threads N            CPU threads of ONNX Runtime (default: one per core)
  --json                 print one JSON object instead of a table
)";

double median(std::vector<double> values) {
  std::sort(values.begin(), values.end());
  const size_t middle = values.size() / 2;
  return values.size() % 2 == 1 ? values[middle] : (values[middle - 1] + values[middle]) / 2;
}

// Bytes of memory that this process holds, and held at most.
int64_t memory(const std::string& field) {
  std::ifstream status("/proc/self/status");
  for (std::string line; std::getline(status, line);) {
    if (line.rfind(field, 0) == 0) return std::stoll(line.substr(field.size() + 1)) * 1024;
  }
  return 0;
}

struct Bundle {
  std::string folder, backend;
  vlmtrim::Session session;
  std::vector<double> vision, prefill, token;
  int64_t visual = 0, kept = 0;
};

// Raises what a result says.
template <class T>
T& need(vlmtrim::Result<T>& result) {
  if (!result) throw BadArguments{result.error().message};
  return *result;
}

void measure(Bundle& bundle, const std::vector<vlmtrim::Part>& parts, const vlmtrim::GenerateOptions& options,
             bool counts) {
  if (const auto error = bundle.session.reset()) throw BadArguments{error->message};
  auto answer = bundle.session.generate(parts, options);
  need(answer);
  if (!counts) return;
  bundle.visual = answer->visual;
  bundle.kept = answer->kept;
  bundle.vision.push_back(1e3 * answer->vision_seconds);
  bundle.prefill.push_back(1e3 * answer->prefill_seconds);
  if (answer->decode_steps > 0) {
    bundle.token.push_back(1e3 * answer->decode_seconds / static_cast<double>(answer->decode_steps));
  }
}

Json row(const Bundle& bundle) {
  const auto of = [](const std::vector<double>& values) { return values.empty() ? Json() : Json(median(values)); };
  return {{"bundle", bundle.folder},     {"backend", bundle.backend},      {"visual", bundle.visual},
          {"kept", bundle.kept},         {"vision_ms", of(bundle.vision)}, {"prefill_ms", of(bundle.prefill)},
          {"token_ms", of(bundle.token)}};
}

void print(const std::vector<Json>& rows) {
  std::printf("%-40s %-12s %6s %6s %9s %10s %9s\n", "bundle", "backend", "visual", "kept", "vision", "prefill",
              "a token");
  for (const Json& row : rows) {
    std::printf("%-40s %-12s %6ld %6ld", row["bundle"].get<std::string>().c_str(),
                row["backend"].get<std::string>().c_str(), row["visual"].get<long>(), row["kept"].get<long>());
    for (const char* name : {"vision_ms", "prefill_ms", "token_ms"}) {
      const bool known = row[name].is_number() && rows[0][name].is_number();
      const double value = known ? row[name].get<double>() : 0;
      std::printf("  %7.2f ms", value);
      if (&row != &rows[0] && known) std::printf(" (%.2f)", value / rows[0][name].get<double>());
    }
    std::printf("\n");
  }
}

int run(const Arguments& arguments) {
  if (arguments.plain.empty()) throw BadArguments{"give at least one bundle folder; see --help"};
  vlmtrim::ModelOptions settings;
  settings.backend = arguments.last("--backend").value_or("auto");
  settings.cuda_graphs = arguments.last("--cuda-graphs").value_or("auto");
  settings.threads = arguments.number("--threads", 0, 0);
  vlmtrim::GenerateOptions options;
  options.max_new_tokens = arguments.number("--max-new-tokens", 32, 1);
  const int rounds = arguments.number("--rounds", 5, 1);
  std::vector<vlmtrim::Part> parts;
  for (const auto& path : arguments.all("--image")) parts.emplace_back(vlmtrim::Picture::file(path));
  parts.emplace_back(arguments.last("--prompt").value_or("Describe the picture."));
  std::vector<Bundle> bundles;
  for (const auto& folder : arguments.plain) {
    auto model = vlmtrim::Model::open(folder, settings);
    auto session = vlmtrim::Session::open(need(model));
    const Json description = Json::parse(model->description());
    bundles.push_back({folder, description.at("backend"), std::move(need(session)), {}, {}, {}});
  }
  for (int round = 0; round <= rounds; ++round) {
    for (Bundle& bundle : bundles) measure(bundle, parts, options, round > 0);
  }
  std::vector<Json> rows;
  for (const Bundle& bundle : bundles) rows.push_back(row(bundle));
  if (arguments.flag("--json")) {
    const Json all{{"rows", rows}, {"resident", memory("VmRSS:")}, {"resident_peak", memory("VmHWM:")}};
    std::printf("%s\n", all.dump().c_str());
  } else {
    print(rows);
    std::printf("memory %.0f MB, at most %.0f MB\n", static_cast<double>(memory("VmRSS:")) / 1e6,
                static_cast<double>(memory("VmHWM:")) / 1e6);
  }
  return 0;
}

}  // namespace

int main(int count, char** values) {
  try {
    const Arguments arguments(
        count, values,
        {"--image", "--prompt", "--rounds", "--max-new-tokens", "--backend", "--cuda-graphs", "--threads"},
        {"--json", "--help"});
    if (arguments.flag("--help")) return std::fputs(kHelp, stdout) < 0 ? 1 : 0;
    return run(arguments);
  } catch (const BadArguments& problem) {
    std::fprintf(stderr, "vlmtrim-bench: %s\n", problem.message.c_str());
    return 2;
  } catch (const std::exception& error) {
    std::fprintf(stderr, "vlmtrim-bench: %s\n", error.what());
    return 1;
  }
}
