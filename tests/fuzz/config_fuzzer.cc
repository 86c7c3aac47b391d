// A model folder's config.textproto and labels.txt -> the parsers that read them at start and load.
// The text up to the first zero byte is the config, what follows it the labels.
#include "server/classify/top_k.h"
#include "server/image/image.h"
#include "server/repository/storage.h"
#include "tests/fuzz/fuzzer.h"

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  using tern::fuzz::Check;
  const absl::string_view input = tern::fuzz::Text(data, size);
  const size_t end = input.find('\0');
  const auto config = tern::repository::ParseConfig(input.substr(0, end), "config");
  Check(config.ok() || absl::IsInvalidArgument(config.status()), config.status().ToString());
  if (config.ok()) {
    const absl::Status status = tern::image::ValidatePreprocessing(config->preprocessing(), 32, 32);
    Check(status.ok() || absl::IsInvalidArgument(status), status.ToString());
  }
  if (end == absl::string_view::npos) return 0;
  const absl::string_view text = input.substr(end + 1);
  const auto labels = tern::classify::ParseLabels(text, 0);
  Check(labels.ok() || absl::IsInvalidArgument(labels.status()), labels.status().ToString());
  if (labels.ok()) {
    Check(tern::classify::ParseLabels(text, static_cast<int64_t>(labels->size())).ok() ||
              labels->empty(),
          "as many labels as there are, and not accepted");
  }
  return 0;
}
