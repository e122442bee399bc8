// Asks the same question about every picture of a folder, two a second, each in a conversation of its own, as of a
// camera: frames BUNDLE FOLDER QUESTION
#include <algorithm>
#include <chrono>
#include <filesystem>
#include <iostream>
#include <string>
#include <thread>

#include <vlmtrim.hpp>

int main(int count, char** values) {
  using Clock = std::chrono::steady_clock;
  if (count != 4 || !std::filesystem::is_directory(values[2])) {
    std::cerr << "usage: frames BUNDLE FOLDER QUESTION\n";
    return 2;
  }
  auto model = vlmtrim::Model::open(values[1]);
  auto session = model ? vlmtrim::Session::open(*model) : vlmtrim::Result<vlmtrim::Session>(model.error());
  if (!session) {
    std::cerr << session.error().message << "\n";
    return 2;
  }
  std::vector<std::string> frames;
  for (const auto& entry : std::filesystem::directory_iterator(values[2])) frames.push_back(entry.path().string());
  std::sort(frames.begin(), frames.end());
  vlmtrim::GenerateOptions options;
  options.max_new_tokens = 32;
  auto due = Clock::now();
  for (const auto& frame : frames) {
    std::this_thread::sleep_until(due);
    due = std::max(due + std::chrono::milliseconds(500), Clock::now());  // what comes too late is not made up for
    if (const auto error = session->reset()) std::cerr << error->message << "\n";
    const auto answer = session->generate({vlmtrim::Picture::file(frame), values[3]}, options);
    std::cout << std::filesystem::path(frame).filename().string() << ": "
              << (answer ? answer->text : answer.error().message) << std::endl;
  }
  return 0;
}
