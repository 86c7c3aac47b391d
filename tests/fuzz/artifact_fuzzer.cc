// Bytes -> .tern reader. What is accepted is a valid network and survives being written again.
#include <google/protobuf/stubs/logging.h>

#include "server/artifact/artifact.h"
#include "tests/fuzz/fuzzer.h"

extern "C" int LLVMFuzzerInitialize(int*, char***) {
  google::protobuf::SetLogHandler(nullptr);  // a line for each header that does not parse
  return 0;
}

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  using tern::fuzz::Check;
  const auto artifact = tern::artifact::Parse(tern::fuzz::Text(data, size), "input");
  if (!artifact.ok()) {
    const absl::StatusCode code = artifact.status().code();
    Check(code == absl::StatusCode::kDataLoss || code == absl::StatusCode::kInvalidArgument ||
              code == absl::StatusCode::kUnimplemented,
          artifact.status().ToString());
    return 0;
  }
  const std::string again = tern::artifact::Serialize(*artifact);
  const auto back = tern::artifact::Parse(again, "again");
  Check(back.ok(), back.status().ToString());
  Check(tern::artifact::Serialize(*back) == again, "writing twice gives two files");
  return 0;
}
