// What the fuzz targets share. A target is a program around LLVMFuzzerTestOneInput: libFuzzer
// calls it in the preset `fuzz`, replay.cc in every other build.
#ifndef TERN_TESTS_FUZZ_FUZZER_H_
#define TERN_TESTS_FUZZ_FUZZER_H_

#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstdlib>

#include "absl/strings/string_view.h"

// Runs one input; aborts if the code under test breaks a promise. Always returns 0.
extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size);

namespace tern::fuzz {

inline absl::string_view Text(const uint8_t* data, size_t size) {
  return absl::string_view(reinterpret_cast<const char*>(data), size);
}

// Aborts with `what`, which the fuzzer counts as a crash.
inline void Check(bool holds, absl::string_view what) {
  if (holds) return;
  std::fprintf(stderr, "broken promise: %.*s\n", static_cast<int>(what.size()), what.data());
  std::abort();
}

}  // namespace tern::fuzz

#endif  // TERN_TESTS_FUZZ_FUZZER_H_
