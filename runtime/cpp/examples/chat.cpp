// A chat about one picture in the terminal: chat BUNDLE PICTURE
#include <iostream>
#include <string>

#include <vlmtrim.hpp>

int main(int count, char** values) {
  if (count != 3) {
    std::cerr << "usage: chat BUNDLE PICTURE\n";
    return 2;
  }
  auto model = vlmtrim::Model::open(values[1]);
  if (!model) {
    std::cerr << model.error().message << "\n";
    return 2;
  }
  auto session = vlmtrim::Session::open(*model);
  if (!session) {
    std::cerr << session.error().message << "\n";
    return 2;
  }
  bool shown = false;  // once asked about, the picture is part of the conversation
  std::cout << "> " << std::flush;
  for (std::string line; std::getline(std::cin, line); std::cout << "> " << std::flush) {
    std::vector<vlmtrim::Part> parts;
    if (!shown) parts.emplace_back(vlmtrim::Picture::file(values[2]));
    parts.emplace_back(line);
    const auto answer = session->generate(parts, {}, [](const vlmtrim::Step& step) {
      std::cout << step.text << std::flush;
      return true;
    });
    shown = shown || answer;
    std::cout << (answer ? "" : answer.error().message) << "\n";
  }
  return 0;
}
