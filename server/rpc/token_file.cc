#include "server/rpc/token_file.h"

#include <openssl/crypto.h>
#include <openssl/sha.h>

#include <algorithm>

#include "absl/strings/ascii.h"
#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_split.h"
#include "server/base/status_macros.h"

namespace tern::rpc {
namespace {

constexpr uint64_t kMaxFileBytes = 1 << 20;
constexpr size_t kMinTokenBytes = 16, kMaxTokenBytes = 4096;
constexpr size_t kMaxTokens = 1024;  // every lookup compares with all of them

bool AllOf(absl::string_view text, absl::string_view others) {
  return std::all_of(text.begin(), text.end(), [&](char c) {
    return absl::ascii_isalnum(static_cast<unsigned char>(c)) || absl::StrContains(others, c);
  });
}

std::array<unsigned char, 32> Digest(absl::string_view token) {
  std::array<unsigned char, 32> digest;
  static_assert(digest.size() == SHA256_DIGEST_LENGTH);
  SHA256(reinterpret_cast<const unsigned char*>(token.data()), token.size(), digest.data());
  return digest;
}

}  // namespace

absl::StatusOr<std::unique_ptr<TokenFile>> TokenFile::Open(const std::string& path,
                                                           std::function<void()> reload_failed,
                                                           const Clock* clock) {
  const auto parse = [path](const std::vector<std::string>& contents) -> absl::StatusOr<Entries> {
    absl::StatusOr<Entries> entries = Parse(contents[0]);
    if (!entries.ok()) return Annotate(entries.status(), path);
    return entries;
  };
  TERN_ASSIGN_OR_RETURN(auto file, WatchedFiles<Entries>::Open({path}, kMaxFileBytes, parse,
                                                               std::move(reload_failed), clock));
  return std::unique_ptr<TokenFile>(new TokenFile(std::move(file)));
}

absl::StatusOr<TokenFile::Entries> TokenFile::Parse(absl::string_view text) {
  Entries entries;
  int number = 0;
  for (absl::string_view line : absl::StrSplit(text, '\n')) {
    ++number;
    line = absl::StripAsciiWhitespace(line);
    if (line.empty() || line[0] == '#') continue;
    Entry entry;
    const size_t colon = line.find(':');
    if (colon != absl::string_view::npos) {
      entry.name = std::string(line.substr(0, colon));
      if (entry.name.empty() || entry.name.size() > 128 || !AllOf(entry.name, "._-")) {
        return absl::InvalidArgumentError(
            absl::StrCat("line ", number,
                         ": want a name of 1 to 128 letters, digits, '.', '_', '-' before ':'"));
      }
      line.remove_prefix(colon + 1);
    } else {
      entry.name = absl::StrCat("line-", number);
    }
    if (line.size() < kMinTokenBytes || line.size() > kMaxTokenBytes || !AllOf(line, "-._~+/=")) {
      return absl::InvalidArgumentError(absl::StrCat(
          "line ", number, ": want a token of ", kMinTokenBytes, " to ", kMaxTokenBytes,
          " letters, digits and -._~+/=, got ", line.size(), " bytes"));
    }
    entry.digest = Digest(line);
    for (const Entry& other : entries) {
      if (other.name == entry.name || other.digest == entry.digest) {
        return absl::InvalidArgumentError(
            absl::StrCat("line ", number, ": name or token is that of \"", other.name, "\""));
      }
    }
    if (entries.size() == kMaxTokens) {
      return absl::InvalidArgumentError(absl::StrCat("holds more than ", kMaxTokens, " tokens"));
    }
    entries.push_back(std::move(entry));
  }
  if (entries.empty()) return absl::InvalidArgumentError("holds no token");
  return entries;
}

std::optional<std::string> TokenFile::Find(absl::string_view token) const {
  const std::shared_ptr<const Entries> entries = file_->Current();
  const auto digest = Digest(token);
  const Entry* found = nullptr;
  for (const Entry& entry : *entries) {  // all of them, whichever it is
    if (CRYPTO_memcmp(entry.digest.data(), digest.data(), digest.size()) == 0) found = &entry;
  }
  if (found == nullptr) return std::nullopt;
  return found->name;
}

absl::StatusOr<absl::string_view> BearerToken(absl::string_view authorization) {
  constexpr absl::string_view kScheme = "Bearer ";
  if (!absl::StartsWithIgnoreCase(authorization, kScheme)) {
    return absl::InvalidArgumentError("authorization: want \"Bearer <token>\"");
  }
  const absl::string_view token = absl::StripAsciiWhitespace(authorization.substr(kScheme.size()));
  if (token.empty() || token.size() > kMaxTokenBytes) {
    return absl::InvalidArgumentError(
        absl::StrCat("authorization: want a token of 1 to ", kMaxTokenBytes, " bytes"));
  }
  return token;
}

}  // namespace tern::rpc
