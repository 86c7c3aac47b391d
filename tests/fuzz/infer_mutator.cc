// Requests stay requests under most mutations.
#include <cstring>

#include "inference/grpc_service.pb.h"
#include "tests/fuzz/fuzzer.h"
#include "tests/fuzz/mutate_message.h"

extern "C" size_t LLVMFuzzerCustomMutator(uint8_t* data, size_t size, size_t max_size,
                                          unsigned int seed) {
  std::mt19937 random(seed);
  std::string bytes(tern::fuzz::Text(data, size));
  if (random() % 8 == 0) {
    tern::fuzz::MutateBytes(max_size, bytes);
  } else {
    tern::fuzz::MutateMessage(*inference::ModelInferRequest::descriptor(), random, bytes);
  }
  if (bytes.size() > max_size) bytes.resize(max_size);
  std::memcpy(data, bytes.data(), bytes.size());
  return bytes.size();
}
