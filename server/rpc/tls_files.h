// A server's certificate, its key and the authorities of its clients, in PEM files that are read
// again when they change.
#ifndef TERN_SERVER_RPC_TLS_FILES_H_
#define TERN_SERVER_RPC_TLS_FILES_H_

#include <functional>
#include <memory>
#include <string>

#include "absl/status/statusor.h"
#include "absl/time/time.h"
#include "server/base/clock.h"
#include "server/base/watched_files.h"

namespace tern::rpc {

struct TlsPaths {
  std::string certificate;  // the server's, then its intermediate ones
  std::string key;
  std::string client_ca;  // one or more; empty: clients need no certificate
};

struct TlsContent {
  std::string certificate, key, client_ca;
  absl::Time not_after;  // of the server's own certificate
};

// Thread safe.
class TlsFiles {
 public:
  // Errors of ReadFile (at most 1 MiB each); INVALID_ARGUMENT, naming the file, if one is not what
  // it should be in PEM or the key is not the certificate's. A certificate out of its time is
  // logged. `reload_failed` and `clock` as in WatchedFiles; `loaded` (may be null) gets every
  // content that is taken into use.
  static absl::StatusOr<std::unique_ptr<TlsFiles>> Open(
      TlsPaths paths, std::function<void(const TlsContent&)> loaded = nullptr,
      std::function<void()> reload_failed = nullptr, const Clock* clock = Clock::Real());

  bool wants_client_certificate() const { return wants_client_certificate_; }
  // Another pointer after a change.
  std::shared_ptr<const TlsContent> Current() const { return files_->Current(); }

 private:
  TlsFiles(std::unique_ptr<WatchedFiles<TlsContent>> files, bool wants_client_certificate)
      : files_(std::move(files)), wants_client_certificate_(wants_client_certificate) {}

  const std::unique_ptr<WatchedFiles<TlsContent>> files_;
  const bool wants_client_certificate_;
};

}  // namespace tern::rpc

#endif  // TERN_SERVER_RPC_TLS_FILES_H_
