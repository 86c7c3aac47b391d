#include "server/rpc/tls_files.h"

#include <openssl/bio.h>
#include <openssl/err.h>
#include <openssl/evp.h>
#include <openssl/pem.h>
#include <openssl/x509.h>

#include <ctime>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "server/base/log.h"
#include "server/base/status_macros.h"

namespace tern::rpc {
namespace {

constexpr uint64_t kMaxFileBytes = 1 << 20;

template <auto Free>
struct Deleter {
  template <typename T>
  void operator()(T* pointer) const {
    Free(pointer);
  }
};
using Bio = std::unique_ptr<BIO, Deleter<BIO_free>>;
using Certificate = std::unique_ptr<X509, Deleter<X509_free>>;
using Key = std::unique_ptr<EVP_PKEY, Deleter<EVP_PKEY_free>>;

Bio Open(const std::string& text) {
  return Bio(BIO_new_mem_buf(text.data(), static_cast<int>(text.size())));
}

// The first certificate of `text`, the content of `path`. All of its certificates must be readable,
// or gRPC would refuse the chain later, when nobody is told.
absl::StatusOr<Certificate> FirstCertificate(const std::string& path, const std::string& text) {
  const Bio bio = Open(text);
  Certificate first;
  for (int number = 1;; ++number) {
    Certificate certificate(PEM_read_bio_X509(bio.get(), nullptr, nullptr, nullptr));
    const bool end = certificate == nullptr && number > 1 &&
                     ERR_GET_REASON(ERR_peek_last_error()) == PEM_R_NO_START_LINE;
    ERR_clear_error();
    if (end) return first;
    if (certificate == nullptr) {
      return absl::InvalidArgumentError(
          number == 1 ? absl::StrCat(path, ": no PEM certificate")
                      : absl::StrCat(path, ": certificate ", number, " cannot be read"));
    }
    if (first == nullptr) first = std::move(certificate);
  }
}

absl::StatusOr<absl::Time> ToTime(const ASN1_TIME* time) {
  std::tm parts = {};
  if (ASN1_TIME_to_tm(time, &parts) != 1) {
    return absl::InvalidArgumentError("a date of the certificate cannot be read");
  }
  return absl::FromTM(parts, absl::UTCTimeZone());
}

absl::StatusOr<TlsContent> Parse(const TlsPaths& paths, const std::vector<std::string>& contents,
                                 absl::Time now) {
  TlsContent content;
  content.certificate = contents[0];
  content.key = contents[1];
  if (contents.size() > 2) content.client_ca = contents[2];

  TERN_ASSIGN_OR_RETURN(const Certificate certificate,
                        FirstCertificate(paths.certificate, content.certificate));
  // A key with a passphrase must not ask for it on the terminal.
  const auto no_passphrase = [](char*, int, int, void*) { return -1; };
  const Key key(PEM_read_bio_PrivateKey(Open(content.key).get(), nullptr, no_passphrase, nullptr));
  const bool matches = key != nullptr && X509_check_private_key(certificate.get(), key.get()) == 1;
  ERR_clear_error();
  if (key == nullptr) {
    return absl::InvalidArgumentError(
        absl::StrCat(paths.key, ": no PEM private key without a passphrase"));
  }
  if (!matches) {
    return absl::InvalidArgumentError(
        absl::StrCat(paths.key, ": is not the key of ", paths.certificate));
  }
  if (!paths.client_ca.empty()) {
    TERN_RETURN_IF_ERROR(FirstCertificate(paths.client_ca, content.client_ca).status());
  }
  TERN_ASSIGN_OR_RETURN(content.not_after, ToTime(X509_get0_notAfter(certificate.get())));
  TERN_ASSIGN_OR_RETURN(const absl::Time not_before,
                        ToTime(X509_get0_notBefore(certificate.get())));
  if (now < not_before || now > content.not_after) {
    TERN_LOG_WARN("{}: is valid from {} to {} only", paths.certificate,
                  absl::FormatTime(not_before, absl::UTCTimeZone()),
                  absl::FormatTime(content.not_after, absl::UTCTimeZone()));
  }
  return content;
}

}  // namespace

absl::StatusOr<std::unique_ptr<TlsFiles>> TlsFiles::Open(
    TlsPaths paths, std::function<void(const TlsContent&)> loaded,
    std::function<void()> reload_failed, const Clock* clock) {
  std::vector<std::string> files = {paths.certificate, paths.key};
  if (!paths.client_ca.empty()) files.push_back(paths.client_ca);
  const bool wants_client_certificate = !paths.client_ca.empty();
  const auto parse = [paths = std::move(paths), loaded = std::move(loaded),
                      clock](const std::vector<std::string>& contents) {
    absl::StatusOr<TlsContent> content = Parse(paths, contents, clock->Now());
    if (content.ok() && loaded) loaded(*content);
    return content;
  };
  TERN_ASSIGN_OR_RETURN(auto watched,
                        WatchedFiles<TlsContent>::Open(std::move(files), kMaxFileBytes, parse,
                                                       std::move(reload_failed), clock));
  return std::unique_ptr<TlsFiles>(new TlsFiles(std::move(watched), wants_client_certificate));
}

}  // namespace tern::rpc
