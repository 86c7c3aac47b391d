// Mutations of serialised protobuf messages that keep them parsable: bytes changed blindly seldom
// are, because every length around them would have to change too. Only for builds with libFuzzer.
#ifndef TERN_TESTS_FUZZ_MUTATE_MESSAGE_H_
#define TERN_TESTS_FUZZ_MUTATE_MESSAGE_H_

#include <google/protobuf/descriptor.h>

#include <cstddef>
#include <cstdint>
#include <random>
#include <string>

namespace tern::fuzz {

// One to three changes at random places of `bytes`, a message of type `type`: a field added,
// removed, copied, moved or changed. Numbers become neighbours of what they were, small, or
// extreme; strings also other strings of the message, because names refer to each other. Bytes that
// are no message are mutated as bytes.
void MutateMessage(const google::protobuf::Descriptor& type, std::mt19937& random,
                   std::string& bytes);

// libFuzzer's own mutations of `bytes`; the result has at most `max_size` (1 or more) of them.
void MutateBytes(size_t max_size, std::string& bytes);

// LLVMFuzzerCustomMutator of a target whose inputs are messages of type `type`: they stay messages
// under most mutations.
size_t MutateInput(const google::protobuf::Descriptor& type, uint8_t* data, size_t size,
                   size_t max_size, unsigned int seed);

}  // namespace tern::fuzz

#endif  // TERN_TESTS_FUZZ_MUTATE_MESSAGE_H_
