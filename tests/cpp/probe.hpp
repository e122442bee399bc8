// Results of C functions for ctypes: they lie in one place a thread, read by name with probe_result; a function that
// fails returns 0 and leaves its sentence under "error".
#pragma once

#include <exception>
#include <map>
#include <string>
#include <vector>

#define PROBE extern "C" __attribute__((visibility("default")))

std::map<std::string, std::string>& results();

template <class T>
void keep(const std::string& name, const std::vector<T>& values) {
  results()[name].assign(reinterpret_cast<const char*>(values.data()), values.size() * sizeof(T));
}

template <class Work>
int guarded(const Work& work) {
  results().clear();
  try {
    work();
    return 1;
  } catch (const std::exception& error) {
    results()["error"] = error.what();
    return 0;
  }
}
