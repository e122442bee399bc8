#include "model.hpp"

#include "core/error.hpp"

namespace vlmtrim {

std::shared_ptr<Model> Model::open(const std::string& folder, const ModelOptions& options) {
  if (options.library.threads < 0) {
    throw Refusal(said("threads is ", options.library.threads, "; give 1 or more, or 0 for one per core"));
  }
  const std::shared_ptr<Model> model(new Model);
  model->bundle_ = open_bundle(folder, options.verify);
  model->backend_ = choose_backend(options.backend, model->bundle_, options.library);
  model->processor_ = load_processor(model->bundle_);
  for (const char* name : {"embed", "decoder"}) {
    model->programs_[name] = model->backend_->open(model->bundle_, name);
  }
  return model;
}

std::shared_ptr<const Tokenizer> Model::tokenizer() {
  const std::lock_guard<std::mutex> lock(text_mutex_);
  if (!tokenizer_) {
    const std::string where = (bundle_.folder / "tokenizer.json").string();
    tokenizer_ = Tokenizer::from_json(bundle_.files().bytes("tokenizer.json"), where);
  }
  return tokenizer_;
}

const Prompter& Model::prompter() {
  auto tokenizer = this->tokenizer();
  const std::lock_guard<std::mutex> lock(text_mutex_);
  if (!prompter_) prompter_ = std::make_unique<Prompter>(bundle_.files(), bundle_.contract, std::move(tokenizer));
  return *prompter_;
}

std::unique_ptr<Graph> Model::graph(const std::string& name) {
  const std::lock_guard<std::mutex> lock(mutex_);
  auto& program = programs_[name];
  if (!program) program = backend_->open(bundle_, name);
  return program->graph();
}

}  // namespace vlmtrim
