// An opened bundle on a backend, shared by sessions and threads.
#pragma once

#include <map>
#include <memory>
#include <mutex>
#include <string>

#include "backends/backend.hpp"
#include "core/bundle.hpp"
#include "processors/processor.hpp"
#include "text/prompter.hpp"

namespace vlmtrim {

struct ModelOptions {
  std::string backend = "auto";
  BackendOptions library;
  bool verify = false;  // hash every byte of the bundle, also of large unchanged files
};

// Everything in it may be used by several threads at once.
class Model {
 public:
  // Throws BundleError or Refusal.
  static std::shared_ptr<Model> open(const std::string& folder, const ModelOptions& options);

  const Bundle& bundle() const { return bundle_; }
  const Contract& contract() const { return bundle_.contract; }
  Backend& backend() const { return *backend_; }
  const Processor& processor() const { return *processor_; }
  // Throws BundleError or Refusal where this code cannot follow the bundle's tokenizer.json.
  std::shared_ptr<const Tokenizer> tokenizer();
  // Throws BundleError or Refusal where the bundle has no prompt.json, or one that this code cannot follow.
  const Prompter& prompter();
  // A graph of its own; the vision graph's file is opened with the first: text-only use should not pay for it.
  std::unique_ptr<Graph> graph(const std::string& name);

 private:
  Model() = default;

  Bundle bundle_;
  std::unique_ptr<Backend> backend_;
  std::unique_ptr<Processor> processor_;
  std::mutex mutex_, text_mutex_;
  std::shared_ptr<const Tokenizer> tokenizer_;
  std::unique_ptr<Prompter> prompter_;
  std::map<std::string, std::unique_ptr<Program>> programs_;
};

}  // namespace vlmtrim
