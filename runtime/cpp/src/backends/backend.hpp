// What a backend is: it opens graphs, holds caches, runs; the checks are written once, here.
// Mirrors runtime/backends/base.py.
#pragma once

#include <functional>
#include <map>
#include <memory>
#include <set>
#include <string>
#include <vector>

#include "core/bundle.hpp"
#include "core/contract.hpp"
#include "core/tensor.hpp"

namespace vlmtrim {

using Dims = std::map<std::string, std::pair<int64_t, int64_t>>;
using Sizes = std::map<std::string, int64_t>;  // of symbolic dimensions

// One opened graph with its own bindings, of one thread. Inputs that are bound as caches are not fed, and their outputs
// are not returned: the graph updates them in place. What a run returns holds until the graph's next run.
class Graph {
 public:
  Graph(const GraphSpec& spec, const Dims& dims) : spec_(spec), dims_(dims) {}
  Graph(const Graph&) = delete;
  Graph& operator=(const Graph&) = delete;
  virtual ~Graph() = default;

  const GraphSpec& spec() const { return spec_; }
  // Checks the feeds against the contract, runs, checks what came back. Throws Refusal naming the tensor at fault.
  Tensors run(const Tensors& feeds);
  // Binds every cache input, and the output that updates it, to one buffer.
  void bind_caches(const Tensors& caches);

 protected:
  // Runs on feeds that fit the contract; `sizes` are those of the symbolic dims that the feeds have.
  virtual Tensors execute(const Tensors& feeds, const Sizes& sizes) = 0;
  virtual void bind(const Tensors& caches) = 0;

  const GraphSpec& spec_;
  const Dims& dims_;

 private:
  static bool fits(const TensorSpec& promised, const Tensor& found, Sizes& sizes);
  void check(const TensorSpec& promised, const Tensor& fed, Sizes& sizes) const;

  std::set<std::string> bound_;
};

// An opened file, shared by threads; each makes graphs of its own of it. It must outlive them.
class Program {
 public:
  virtual ~Program() = default;
  virtual std::unique_ptr<Graph> graph() const = 0;
};

// An inference library on a device.
class Backend {
 public:
  virtual ~Backend() = default;
  virtual std::string name() const = 0;
  // Throws Refusal where the bundle cannot run on this backend; opens nothing large.
  virtual void check(const Bundle& bundle) = 0;
  // Opens a graph of a bundle by its name in the contract, or the pieces of its chain where the backend runs those; the
  // bundle must outlive it.
  std::unique_ptr<Program> open(const Bundle& bundle, const std::string& graph);
  // Live window to give a decoder whose caches hold `length` entries after the step: `length` at least, `capacity` at
  // most. What is behind a query's own position is masked, so a longer one changes no result.
  virtual int64_t window(int64_t length, int64_t capacity) const;
  // Zeroed caches of all groups, by input name. Throws Refusal where they do not fit into memory.
  virtual Tensors make_caches(const Contract& contract);
  // A copy on the host; waits until it is computed.
  virtual Tensor to_host(const Tensor& tensor) = 0;

 protected:
  virtual bool chained() const { return false; }
  virtual std::unique_ptr<Program> open_one(const Bundle& bundle, const std::string& graph) = 0;
};

// What a library says of an input or output that it opened; a dim is -1 where it is open.
struct Opened {
  std::string name, dtype;
  std::vector<Dim> dims;
};

// Throws Refusal unless a library opened the inputs, or outputs, that the contract promises.
void check_boundary(const std::string& file, const std::vector<TensorSpec>& promised,
                    const std::vector<Opened>& opened);

// Bytes of memory that are free for this process: the machine's, or its control group's where that is less.
int64_t free_memory();

struct BackendOptions {
  int threads = 0;                   // of the CPU; 0: one per core
  bool exact_activations = false;    // multiply packed weights by float32 activations, exactly and slowly
  std::string library;               // path of ONNX Runtime's library; empty: where it was found, or the system's
  std::string tensorrt;              // the same of TensorRT's, or TensorRT-RTX's
  std::string cuda_graphs = "auto";  // how decode steps are replayed: "auto", "capture" or "off"
};

// Throws Refusal for a name that this library does not have, or whose library is not there.
std::unique_ptr<Backend> make_backend(const std::string& name, const BackendOptions& options);

// A backend that can run the bundle; for "auto" the first one. Throws Refusal saying why there is none.
std::unique_ptr<Backend> choose_backend(const std::string& name, const Bundle& bundle, const BackendOptions& options);

// Adds a backend that this library was built with.
bool add_backend(const std::string& name, std::function<std::unique_ptr<Backend>(const BackendOptions&)> make);

}  // namespace vlmtrim
