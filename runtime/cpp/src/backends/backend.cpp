#include "backends/backend.hpp"

#include <fstream>

#include "backends/chain.hpp"
#include "backends/ort.hpp"
#include "core/error.hpp"

namespace vlmtrim {
namespace {

using Make = std::function<std::unique_ptr<Backend>(const BackendOptions&)>;

// In the order in which auto tries them; some of them are not built into every library.
constexpr const char* kBackends[] = {"tensorrt", "tensorrt-rtx", "ort-cuda", "ort-cpu"};

std::map<std::string, Make>& known() {
  static std::map<std::string, Make> backends{{"ort-cpu", make_ort_cpu}, {"ort-cuda", make_ort_cuda}};
  return backends;
}

// What is wrong, without what to do about it.
std::string brief(std::string reason, const std::string& folder) {
  reason = reason.substr(0, reason.find(';'));
  const size_t at = reason.find(folder + " ");
  return at == std::string::npos ? reason : reason.replace(at, folder.size() + 1, "the bundle ");
}

}  // namespace

Tensors Graph::run(const Tensors& feeds) {
  Sizes sizes;
  size_t expected = 0;
  for (const auto& tensor : spec_.inputs) {
    if (bound_.count(tensor.name) > 0) continue;
    ++expected;
    const auto fed = feeds.find(tensor.name);
    if (fed == feeds.end()) throw Refusal(said(spec_.file, ": fed and promised inputs differ in ", tensor.name));
    check(tensor, fed->second, sizes);
  }
  if (expected != feeds.size()) {
    for (const auto& [name, value] : feeds) {
      if (spec_.input(name) == nullptr || bound_.count(name) > 0) {
        throw Refusal(said(spec_.file, ": fed and promised inputs differ in ", name));
      }
    }
  }
  Tensors outputs = execute(feeds, sizes);
  for (const auto& tensor : spec_.outputs) {
    const auto found = outputs.find(tensor.name);
    if (found != outputs.end() && !fits(tensor, found->second, sizes)) {
      throw Refusal(said(spec_.file, " returned ", tensor.name, " as ", name_of(found->second.dtype), " ",
                         said_of(found->second.shape), ", the contract promises ", said_of(tensor),
                         "; export the model again"));
    }
  }
  return outputs;
}

void Graph::bind_caches(const Tensors& caches) {
  bound_.clear();
  for (const auto& [name, value] : caches) bound_.insert(name);
  bind(caches);
}

bool Graph::fits(const TensorSpec& promised, const Tensor& found, Sizes& sizes) {
  if (found.dtype != promised.dtype || found.shape.size() != promised.shape.size()) return false;
  bool same = true;
  for (size_t i = 0; i < found.shape.size() && same; ++i) {
    const Dim& dim = promised.shape[i];
    same = found.shape[i] == (dim.name.empty() ? dim.size : sizes.emplace(dim.name, found.shape[i]).first->second);
  }
  return same;
}

void Graph::check(const TensorSpec& promised, const Tensor& fed, Sizes& sizes) const {
  const bool fitting = fits(promised, fed, sizes);
  for (size_t i = 0; i < std::min(fed.shape.size(), promised.shape.size()); ++i) {
    const auto limits = dims_.find(promised.shape[i].name);
    if (promised.shape[i].name.empty() || limits == dims_.end()) continue;
    const auto [low, high] = limits->second;
    if (fed.shape[i] < low || fed.shape[i] > high) {
      throw Refusal(said(spec_.file, ": ", promised.shape[i].name, " of ", promised.name, " is ", fed.shape[i],
                         ", the bundle allows ", low, " to ", high,
                         "; export with larger limits (--max-seq-len, --max-batch)"));
    }
  }
  if (!fitting) {
    throw Refusal(said(spec_.file, ": ", promised.name, " is ", name_of(fed.dtype), " ", said_of(fed.shape),
                       ", the contract promises ", said_of(promised)));
  }
}

std::unique_ptr<Program> Backend::open(const Bundle& bundle, const std::string& graph) {
  const std::vector<std::string> names = chained() ? bundle.contract.chain(graph) : std::vector<std::string>{graph};
  if (names.size() == 1) return open_one(bundle, names[0]);
  std::vector<std::unique_ptr<Program>> pieces;
  for (const auto& name : names) pieces.push_back(open_one(bundle, name));
  return make_chain(bundle.contract.graph(graph), bundle.contract.dims, std::move(pieces), *this);
}

int64_t Backend::window(int64_t length, int64_t /*capacity*/) const { return length; }

Tensors Backend::make_caches(const Contract& contract) {
  int64_t needed = 0;
  for (const auto& group : contract.groups) {
    const int64_t bytes = group.nbytes(1, contract.dtype);
    needed = bytes > INT64_MAX - needed ? INT64_MAX : needed + bytes;
  }
  if (const int64_t free = free_memory(); needed > free) {
    throw Refusal(said("the caches take ", static_cast<double>(needed) / 1e9, " GB, ", static_cast<double>(free) / 1e9,
                       " GB of memory are free; export with a smaller --max-seq-len"));
  }
  Tensors caches;
  for (const auto& group : contract.groups) {
    const Shape shape{1, group.kv_heads, group.capacity, group.head_size};
    for (const int64_t layer : group.layers) {
      for (const char* kind : {"key", "value"}) caches[past_name(layer, kind)] = Tensor::zeros(contract.dtype, shape);
    }
  }
  return caches;
}

void check_boundary(const std::string& file, const std::vector<TensorSpec>& promised,
                    const std::vector<Opened>& opened) {
  const auto differ = [&](const std::string& name) {
    throw Refusal(said(file, ": the graph and the contract differ in ", name, "; export the model again"));
  };
  std::map<std::string, const TensorSpec*> wanted;
  for (const auto& tensor : promised) wanted[tensor.name] = &tensor;
  for (const auto& found : opened) {
    const auto match = wanted.find(found.name);
    if (match == wanted.end()) differ(found.name);
    const TensorSpec& tensor = *match->second;
    bool same = found.dtype == name_of(tensor.dtype) && found.dims.size() == tensor.shape.size();
    for (size_t i = 0; same && i < found.dims.size(); ++i) {
      const bool open = found.dims[i].name.empty() && found.dims[i].size < 0 && !tensor.shape[i].name.empty();
      same = open || found.dims[i] == tensor.shape[i];
    }
    if (!same) {
      throw Refusal(said(file, ": the graph has ", found.name, " as ", found.dtype, " ", said_of(found.dims),
                         ", the contract promises ", said_of(tensor), "; export the model again"));
    }
    wanted.erase(match);
  }
  if (!wanted.empty()) differ(wanted.begin()->first);
}

int64_t free_memory() {
  int64_t free = int64_t{8} << 30;  // where nothing is known
  std::ifstream meminfo("/proc/meminfo");
  for (std::string line; std::getline(meminfo, line);) {
    if (line.rfind("MemAvailable:", 0) == 0) free = std::stoll(line.substr(13)) * 1024;
  }
  std::ifstream limit("/sys/fs/cgroup/memory.max"), used("/sys/fs/cgroup/memory.current");
  int64_t most = 0, taken = 0;
  if (limit >> most && used >> taken) free = std::min(free, most - taken);
  return std::max<int64_t>(free, 0);
}

bool add_backend(const std::string& name, Make make) { return known().emplace(name, std::move(make)).second; }

std::unique_ptr<Backend> make_backend(const std::string& name, const BackendOptions& options) {
  const auto found = known().find(name);
  if (found == known().end()) {
    std::string list = "auto";
    for (const char* one : kBackends) list += known().count(one) > 0 ? said(", ", one) : "";
    throw Refusal(said("backend ", shown(name), " is not in this library; supported: ", list));
  }
  if (options.cuda_graphs != "auto" && name.rfind("tensorrt", 0) != 0) {
    throw Refusal(said("cuda_graphs is of the TensorRT backends, not of ", name, "; leave it out"));
  }
  return found->second(options);
}

std::unique_ptr<Backend> choose_backend(const std::string& name, const Bundle& bundle, const BackendOptions& options) {
  if (name != "auto") {
    auto backend = make_backend(name, options);
    backend->check(bundle);
    return backend;
  }
  std::string passed_over, last;
  for (const std::string candidate : kBackends) {
    if (known().count(candidate) == 0) continue;
    try {
      auto backend = make_backend(candidate, options);
      backend->check(bundle);
      return backend;
    } catch (const Refusal& refusal) {
      last = refusal.what();
      passed_over +=
          said(passed_over.empty() ? "" : "; ", candidate, ": ", brief(refusal.what(), bundle.folder.string()));
    }
  }
  if (known().size() == 2) throw Refusal(last);  // without TensorRT the CPU's own words say enough
  throw Refusal(said("no backend can run ", bundle.folder.string(), " here (", passed_over, ")"));
}

}  // namespace vlmtrim
