// Bearer tokens (RFC 6750) of one file, re-read when the file changes.
//
// One token per line, `name:token` or `token` alone (its name is then `line-<n>`); empty lines and
// lines that start with # are skipped. Names are letters, digits, `.`, `_`, `-`; tokens are RFC
// 6750's b64token characters, 16 to 4096 of them. At most 1024 tokens. Only SHA-256 digests stay in
// memory, and no message or log line contains a token.
#ifndef TERN_SERVER_RPC_TOKEN_FILE_H_
#define TERN_SERVER_RPC_TOKEN_FILE_H_

#include <array>
#include <functional>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"
#include "server/base/clock.h"
#include "server/base/watched_files.h"

namespace tern::rpc {

// Thread safe.
class TokenFile {
 public:
  // `reload_failed` and `clock` as in WatchedFiles.
  // Errors of ReadFile (at most 1 MiB); INVALID_ARGUMENT, naming the line, for a file that breaks
  // the rules above, holds the same name or token twice, or holds no token.
  static absl::StatusOr<std::unique_ptr<TokenFile>> Open(
      const std::string& path, std::function<void()> reload_failed = nullptr,
      const Clock* clock = Clock::Real());

  // The name of `token`, or nullopt. The time that it takes depends on the length of `token` and on
  // how many tokens there are, but not on what they are.
  std::optional<std::string> Find(absl::string_view token) const;

 private:
  struct Entry {
    std::string name;
    std::array<unsigned char, 32> digest;
  };
  using Entries = std::vector<Entry>;

  explicit TokenFile(std::unique_ptr<WatchedFiles<Entries>> file) : file_(std::move(file)) {}
  static absl::StatusOr<Entries> Parse(absl::string_view text);

  const std::unique_ptr<WatchedFiles<Entries>> file_;
};

// The token of an `authorization` header's value, `Bearer <token>` (the scheme's case does not
// matter). INVALID_ARGUMENT for anything else.
absl::StatusOr<absl::string_view> BearerToken(absl::string_view authorization);

}  // namespace tern::rpc

#endif  // TERN_SERVER_RPC_TOKEN_FILE_H_
