// ask BUNDLE PICTURE QUESTION
#include <iostream>

#include <vlmtrim.hpp>

int main(int count, char** values) {
  if (count != 4) return 2;
  auto model = vlmtrim::Model::open(values[1]);
  auto session = model ? vlmtrim::Session::open(*model) : vlmtrim::Result<vlmtrim::Session>(model.error());
  if (!session) {
    std::cerr << session.error().message << "\n";
    return 1;
  }
  const auto answer = session->generate({vlmtrim::Picture::file(values[2]), values[3]});
  std::cout << (answer ? answer->text : answer.error().message) << "\n";
  return answer ? 0 : 1;
}
