// To be preloaded: starts a thread before main(), as OpenBLAS does, which takes every signal.
#include <unistd.h>

#include <thread>

namespace {
[[maybe_unused]] const bool started = [] {
  std::thread([] {
    while (true) ::pause();
  }).detach();
  return true;
}();
}  // namespace
