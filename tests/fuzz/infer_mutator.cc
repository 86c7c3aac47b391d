#include "inference/grpc_service.pb.h"
#include "tests/fuzz/mutate_message.h"

extern "C" size_t LLVMFuzzerCustomMutator(uint8_t* data, size_t size, size_t max_size,
                                          unsigned int seed) {
  return tern::fuzz::MutateInput(*inference::ModelInferRequest::descriptor(), data, size, max_size,
                                 seed);
}
