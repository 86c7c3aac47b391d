#include "client/contract.h"

#include <google/protobuf/io/tokenizer.h>
#include <google/protobuf/text_format.h>

#include <cerrno>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <utility>

#include "absl/strings/str_cat.h"
#include "client/status.h"

namespace tern::client {
namespace {

struct NamedContract {
  const char* name;
  const char* text;
};

// torchvision's evaluation transforms. The network's input decides the crop: Resize(32) and
// CenterCrop(32) for CIFAR-10, Resize(256) and CenterCrop(224) for most ImageNet networks,
// Resize(342) and CenterCrop(299) for Inception v3.
constexpr NamedContract kContracts[] = {
    {"cifar10", R"(
       color_order: RGB  resize: SHORTER_SIDE  resize_size: 32  filter: BILINEAR_ANTIALIAS
       center_crop: true  scale: 0.00392156863
       mean: [0.485, 0.456, 0.406]  std: [0.229, 0.224, 0.225])"},
    {"imagenet", R"(
       color_order: RGB  resize: SHORTER_SIDE  resize_size: 256  filter: BILINEAR_ANTIALIAS
       center_crop: true  scale: 0.00392156863
       mean: [0.485, 0.456, 0.406]  std: [0.229, 0.224, 0.225])"},
    {"imagenet-299", R"(
       color_order: RGB  resize: SHORTER_SIDE  resize_size: 342  filter: BILINEAR_ANTIALIAS
       center_crop: true  scale: 0.00392156863
       mean: [0.485, 0.456, 0.406]  std: [0.229, 0.224, 0.225])"},
};

// Keeps the first error.
class FirstError : public google::protobuf::io::ErrorCollector {
 public:
  void AddError(int line, google::protobuf::io::ColumnNumber column,
                const std::string& message) override {
    if (message_.empty()) message_ = absl::StrCat(line + 1, ":", column + 1, ": ", message);
  }
  const std::string& message() const { return message_; }

 private:
  std::string message_;
};

absl::StatusOr<v1::Preprocessing> Parse(const std::string& text, const std::string& name) {
  v1::Preprocessing contract;
  google::protobuf::TextFormat::Parser parser;
  FirstError error;
  parser.RecordErrorsTo(&error);
  if (!parser.ParseFromString(text, &contract)) {
    return absl::InvalidArgumentError(
        absl::StrCat(name, ":", error.message(), " (want text format of tern.v1.Preprocessing)"));
  }
  return contract;
}

}  // namespace

absl::StatusOr<std::string> ReadFile(const std::string& path, size_t max_bytes) {
  std::error_code code;
  if (std::filesystem::is_directory(path, code)) {
    return absl::NotFoundError(absl::StrCat(path, " is a directory, want a file"));
  }
  std::ifstream file(path, std::ios::binary);
  if (!file) return absl::NotFoundError(absl::StrCat(path, ": ", std::strerror(errno)));
  std::string bytes;
  const auto size =
      std::filesystem::file_size(path, code);  // an error for a pipe: read as it comes
  if (!code && size <= max_bytes) bytes.reserve(size);
  char buffer[1 << 16];
  while (file.read(buffer, sizeof(buffer)) || file.gcount() > 0) {
    bytes.append(buffer, static_cast<size_t>(file.gcount()));
    if (bytes.size() > max_bytes) {
      return absl::ResourceExhaustedError(
          absl::StrCat(path, " is larger than ", max_bytes, " bytes"));
    }
  }
  if (file.bad()) return absl::DataLossError(absl::StrCat("reading ", path, " failed"));
  return bytes;
}

absl::StatusOr<v1::Preprocessing> LoadPreprocessing(const std::string& which) {
  for (const NamedContract& contract : kContracts) {
    if (which == contract.name) return Parse(contract.text, contract.name);
  }
  std::error_code code;
  if (!std::filesystem::exists(which, code)) {
    return absl::NotFoundError(
        absl::StrCat("preprocessing '", which,
                     "' is neither a named contract (cifar10, imagenet, imagenet-299) nor a file"));
  }
  TERN_CLIENT_ASSIGN_OR_RETURN(const std::string text, ReadFile(which, 1 << 20));
  return Parse(text, which);
}

absl::StatusOr<std::vector<std::string>> LoadLabels(const std::string& path) {
  TERN_CLIENT_ASSIGN_OR_RETURN(const std::string text, ReadFile(path, 16 << 20));
  std::vector<std::string> labels;
  size_t begin = 0;
  while (begin < text.size()) {
    size_t end = text.find('\n', begin);
    if (end == std::string::npos) end = text.size();
    std::string line = text.substr(begin, end - begin);
    if (!line.empty() && line.back() == '\r') line.pop_back();
    if (line.empty()) {
      return absl::InvalidArgumentError(
          absl::StrCat(path, ":", labels.size() + 1, ": empty line, want a class name"));
    }
    labels.push_back(std::move(line));
    begin = end + 1;
  }
  if (labels.empty()) return absl::InvalidArgumentError(absl::StrCat(path, " has no lines"));
  return labels;
}

}  // namespace tern::client
