#include "server/kernels/choices_file.h"

#include <fstream>

#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "server/base/file.h"
#include "server/base/status_macros.h"
#include "server/kernels/conv_kernel.h"

namespace tern::kernels {
namespace {

constexpr uint64_t kMostBytes = 4 << 20;

// What the choices depend on besides the layers: lines of "key value".
std::string Header(absl::string_view version) {
  std::ifstream cpuinfo("/proc/cpuinfo");
  std::string model = "unknown";
  for (std::string line; std::getline(cpuinfo, line);) {
    if (!absl::StartsWith(line, "model name")) continue;
    model = line;
    break;
  }
  return absl::StrCat("tern kernel choices 1\nversion ", version, "\n", model, "\n");
}

std::string Checksum(absl::string_view text) {
  return absl::StrCat("crc32c ", absl::Hex(Crc32c(text), absl::kZeroPad8), "\n");
}

}  // namespace

absl::Status ReadChoices(const std::string& path, absl::string_view version) {
  TERN_ASSIGN_OR_RETURN(const std::string content, ReadFile(path, kMostBytes));
  const std::string header = Header(version);
  absl::string_view text = content;
  const size_t checksum_bytes = Checksum("").size();
  if (text.size() < checksum_bytes) return absl::DataLossError(absl::StrCat(path, ": cut short"));
  const absl::string_view body = text.substr(0, text.size() - checksum_bytes);
  if (text.substr(body.size()) != Checksum(body)) {
    return absl::DataLossError(absl::StrCat(path, ": the checksum is wrong"));
  }
  if (!absl::StartsWith(body, header)) {
    return absl::FailedPreconditionError(
        absl::StrCat(path, ": written on another CPU or by another version"));
  }
  AddKernelChoices(body.substr(header.size()));
  return absl::OkStatus();
}

absl::Status WriteChoices(const std::string& path, absl::string_view version) {
  const std::string body = absl::StrCat(Header(version), KernelChoices());
  const std::string content = absl::StrCat(body, Checksum(body));
  const auto old = ReadFile(path, kMostBytes);
  if (old.ok() && *old == content) return absl::OkStatus();
  return WriteFileAtomically(path, {content});
}

}  // namespace tern::kernels
