#include "backends/chain.hpp"

#include <algorithm>

#include "core/error.hpp"

namespace vlmtrim {
namespace {

// The first `count` columns of a row of numbers on the host.
Tensor first_columns(const Tensor& row, int64_t count) {
  if (count < 0 || count > row.shape.at(1)) {
    throw Refusal(said("the decoder says that it kept ", count, " of ", row.shape.at(1),
                       " image features; export the model again"));
  }
  const auto* numbers = row.as<int64_t>();
  return Tensor::of(std::vector<int64_t>(numbers, numbers + count), {1, count});
}

class ChainGraph final : public Graph {
 public:
  ChainGraph(const GraphSpec& whole, const Dims& dims, const std::vector<std::unique_ptr<Program>>& pieces,
             Backend& backend)
      : Graph(whole, dims), backend_(backend) {
    for (const auto& piece : pieces) graphs_.push_back(piece->graph());
  }

 protected:
  Tensors execute(const Tensors& feeds, const Sizes& /*sizes*/) override {
    Tensors known = feeds, results;
    for (const auto& graph : graphs_) {
      Tensors given;
      for (const auto& tensor : graph->spec().inputs) {
        const auto value = known.find(tensor.name);
        if (value != known.end()) given.insert(*value);
      }
      Tensors found = graph->run(given);
      if (found.count("kept_counts") > 0 && known.at("image_numbers").shape.at(1) > 0) {
        Tensor counts = backend_.to_host(found.at("kept_counts"));
        found["kept_features"] = first_columns(backend_.to_host(found.at("kept_features")), integers_of(counts).at(0));
        found["kept_counts"] = std::move(counts);
      }
      for (auto& [name, value] : found) known[name] = std::move(value);
    }
    for (const auto& tensor : spec_.outputs) {
      const auto value = known.find(tensor.name);
      if (value != known.end()) results.insert(*value);
    }
    return results;
  }

  void bind(const Tensors& caches) override {
    for (const auto& graph : graphs_) {
      Tensors own;
      for (const auto& tensor : graph->spec().inputs) {
        const auto cache = caches.find(tensor.name);
        if (cache != caches.end()) own.insert(*cache);
      }
      graph->bind_caches(own);
    }
  }

 private:
  Backend& backend_;
  std::vector<std::unique_ptr<Graph>> graphs_;
};

class ChainProgram final : public Program {
 public:
  ChainProgram(const GraphSpec& whole, const Dims& dims, std::vector<std::unique_ptr<Program>> pieces, Backend& backend)
      : whole_(whole), dims_(dims), pieces_(std::move(pieces)), backend_(backend) {}

  std::unique_ptr<Graph> graph() const override {
    return std::make_unique<ChainGraph>(whole_, dims_, pieces_, backend_);
  }

 private:
  const GraphSpec& whole_;
  const Dims& dims_;
  std::vector<std::unique_ptr<Program>> pieces_;
  Backend& backend_;
};

}  // namespace

std::unique_ptr<Program> make_chain(const GraphSpec& whole, const Dims& dims,
                                    std::vector<std::unique_ptr<Program>> pieces, Backend& backend) {
  return std::make_unique<ChainProgram>(whole, dims, std::move(pieces), backend);
}

}  // namespace vlmtrim
