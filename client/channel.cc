#include "client/channel.h"

#include <netdb.h>
#include <sys/socket.h>

#include <algorithm>
#include <cstring>
#include <fstream>
#include <nlohmann/json.hpp>
#include <sstream>
#include <system_error>
#include <utility>

#include "absl/strings/ascii.h"
#include "absl/strings/match.h"
#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "absl/strings/str_join.h"
#include "absl/strings/str_split.h"
#include "absl/strings/strip.h"
#include "absl/time/clock.h"
#include "client/status.h"

namespace tern::client {
namespace {

constexpr absl::Duration kTokenCheckEvery = absl::Seconds(1);

absl::StatusOr<std::string> ReadFile(const std::string& path) {
  std::ifstream file(path, std::ios::binary);
  if (!file) return absl::NotFoundError(absl::StrCat(path, ": cannot be read"));
  std::ostringstream text;
  text << file.rdbuf();
  if (text.str().empty()) return absl::InvalidArgumentError(absl::StrCat(path, ": is empty"));
  return text.str();
}

// gRPC itself connects to the port modulo 65536, and without one to 443.
absl::Status CheckEntry(absl::string_view entry) {
  const size_t colon = entry.rfind(':');
  if (colon != absl::string_view::npos) {
    const absl::string_view host = entry.substr(0, colon), port = entry.substr(colon + 1);
    const bool bracketed = absl::StartsWith(host, "[") && absl::EndsWith(host, "]");
    uint32_t number = 0;
    if (!host.empty() && (bracketed || !absl::StrContains(host, ':')) &&
        std::all_of(port.begin(), port.end(), absl::ascii_isdigit) &&
        absl::SimpleAtoi(port, &number) && number >= 1 && number <= 65535) {
      return absl::OkStatus();
    }
  }
  return absl::InvalidArgumentError(absl::StrCat(
      "got \"", entry, "\", want HOST:PORT with a port of 1..65535 ([HOST]:PORT for IPv6)"));
}

// One entry of a list, which CheckEntry has seen: its numeric addresses, "1.2.3.4:80" or
// "[::1]:80".
absl::StatusOr<std::vector<std::string>> LookUp(absl::string_view entry) {
  const size_t colon = entry.rfind(':');
  std::string host(entry.substr(0, colon));
  const std::string port(entry.substr(colon + 1));
  if (host.size() > 2 && host.front() == '[' && host.back() == ']') {
    host = host.substr(1, host.size() - 2);
  }
  addrinfo hints = {};
  hints.ai_socktype = SOCK_STREAM;
  hints.ai_flags = AI_NUMERICSERV;
  addrinfo* found = nullptr;
  const int error = ::getaddrinfo(host.c_str(), port.c_str(), &hints, &found);
  if (error != 0) {
    return absl::UnavailableError(absl::StrCat(entry, ": ", ::gai_strerror(error)));
  }
  std::vector<std::string> addresses;
  for (const addrinfo* info = found; info != nullptr; info = info->ai_next) {
    char text[NI_MAXHOST];
    if (::getnameinfo(info->ai_addr, info->ai_addrlen, text, sizeof(text), nullptr, 0,
                      NI_NUMERICHOST) == 0) {
      addresses.push_back(info->ai_family == AF_INET6 ? absl::StrCat("[", text, "]:", port)
                                                      : absl::StrCat(text, ":", port));
    }
  }
  ::freeaddrinfo(found);
  return addresses;
}

}  // namespace

absl::StatusOr<Target> ParseTarget(const std::string& endpoints) {
  if (endpoints.empty()) return absl::InvalidArgumentError("is empty");
  if (!absl::StrContains(endpoints, ',')) {
    for (const char* scheme : {"unix:", "unix-abstract:", "ipv4:", "ipv6:", "xds:"}) {
      if (absl::StartsWith(endpoints, scheme)) return Target{endpoints, "", false};
    }
    absl::string_view entry = endpoints;
    const bool dns = absl::ConsumePrefix(&entry, "dns:");
    if (dns) entry.remove_prefix(entry.rfind('/') + 1);  // npos + 1 is 0: there is none
    TERN_CLIENT_RETURN_IF_ERROR(CheckEntry(entry));
    return Target{endpoints, "", dns};
  }
  Target target;
  std::vector<std::string> v4, v6;
  absl::string_view only_v6;  // an entry
  std::vector<absl::string_view> entries = absl::StrSplit(endpoints, ',');
  for (absl::string_view& entry : entries) {
    entry = absl::StripAsciiWhitespace(entry);
    TERN_CLIENT_RETURN_IF_ERROR(CheckEntry(entry));
  }
  for (absl::string_view entry : entries) {
    TERN_CLIENT_ASSIGN_OR_RETURN(const std::vector<std::string> addresses, LookUp(entry));
    bool has_v4 = false;
    for (const std::string& address : addresses) {
      has_v4 |= address[0] != '[';
      (address[0] == '[' ? v6 : v4).push_back(address);
    }
    if (!has_v4) only_v6 = entry;
    if (target.authority.empty()) target.authority = std::string(entry);
  }
  // gRPC's address lists are of one family.
  if (!v4.empty() && !only_v6.empty()) {
    return absl::UnavailableError(
        absl::StrCat(only_v6,
                     ": has IPv6 addresses only and others of the list IPv4: a list is of one "
                     "family"));
  }
  if (!v4.empty()) {
    target.uri = absl::StrCat("ipv4:", absl::StrJoin(v4, ","));
  } else {
    target.uri = absl::StrCat("ipv6:", absl::StrJoin(v6, ","));
  }
  target.balanced = true;
  return target;
}

std::string ServiceConfig(const RetryOptions& retry, bool balanced) {
  using Json = nlohmann::json;
  Json config = Json::object();
  if (balanced) {
    config["loadBalancingConfig"] = {{{"round_robin", Json::object()}}};
    config["healthCheckConfig"] = {{"serviceName", ""}};
  }
  if (retry.max_attempts > 1) {
    const auto seconds = [](absl::Duration duration) {
      return absl::StrFormat("%.3fs", absl::ToDoubleSeconds(duration));
    };
    // Calls that change nothing. UNAVAILABLE: the call did not reach a server, or the server ended
    // meanwhile. CANCELLED: a server of gRPC 1.51 says so to a call that arrives in the very moment
    // of its closing, before looking at it; who cancels a call himself gets no retry.
    // RESOURCE_EXHAUSTED: Tern answers each with its hint when to come back, or that it makes no
    // sense (grpc-retry-pushback-ms), which gRPC obeys.
    config["methodConfig"] = {
        {{"name",
          {{{"service", "tern.v1.ImageClassifier"}, {"method", "Classify"}},
           {{"service", "tern.v1.ModelRegistry"}, {"method", "List"}},
           {{"service", "tern.v1.ModelRegistry"}, {"method", "Get"}}}},
         {"retryPolicy",
          {{"maxAttempts", retry.max_attempts},
           {"initialBackoff", seconds(retry.initial_backoff)},
           {"maxBackoff", seconds(std::min(retry.max_backoff, absl::Hours(1)))},
           {"backoffMultiplier", 2.0},
           {"retryableStatusCodes", {"UNAVAILABLE", "CANCELLED", "RESOURCE_EXHAUSTED"}}}}}};
    config["retryThrottling"] = {{"maxTokens", retry.budget},
                                 {"tokenRatio", retry.budget_per_success}};
  }
  return config.dump();
}

absl::StatusOr<std::shared_ptr<grpc::ChannelCredentials>> MakeCredentials(const TlsOptions& tls) {
  if (!tls.enabled()) {
    if (!tls.certificate.empty() || !tls.key.empty()) {
      return absl::InvalidArgumentError("a client certificate needs TLS");
    }
    return grpc::InsecureChannelCredentials();
  }
  if (tls.certificate.empty() != tls.key.empty()) {
    return absl::InvalidArgumentError("want a client certificate and its key, got one of the two");
  }
  grpc::SslCredentialsOptions options;
  if (!tls.ca.empty()) {
    TERN_CLIENT_ASSIGN_OR_RETURN(options.pem_root_certs, ReadFile(tls.ca));
  }
  if (!tls.certificate.empty()) {
    TERN_CLIENT_ASSIGN_OR_RETURN(options.pem_cert_chain, ReadFile(tls.certificate));
    TERN_CLIENT_ASSIGN_OR_RETURN(options.pem_private_key, ReadFile(tls.key));
  }
  return grpc::SslCredentials(options);
}

absl::StatusOr<std::unique_ptr<TokenSource>> TokenSource::Open(std::string path) {
  std::unique_ptr<TokenSource> source(new TokenSource(std::move(path)));
  std::error_code ignored;
  source->changed_ = std::filesystem::last_write_time(source->path_, ignored);
  source->checked_ = absl::Now();
  TERN_CLIENT_ASSIGN_OR_RETURN(source->token_, source->Read());
  return source;
}

absl::StatusOr<std::string> TokenSource::Read() const {
  TERN_CLIENT_ASSIGN_OR_RETURN(const std::string text, ReadFile(path_));
  for (absl::string_view line : absl::StrSplit(text, '\n')) {
    line = absl::StripAsciiWhitespace(line);
    if (line.empty() || line[0] == '#') continue;
    const std::string token(
        line.substr(line.find(':') == absl::string_view::npos ? 0 : line.find(':') + 1));
    // What may stand in a header; gRPC aborts the call's setup on anything else.
    for (const char c : token) {
      if (!absl::ascii_isalnum(static_cast<unsigned char>(c)) && !absl::StrContains("-._~+/=", c)) {
        return absl::InvalidArgumentError(absl::StrCat(
            path_, ": the token holds other characters than letters, digits, -._~+/="));
      }
    }
    if (!token.empty()) return token;
  }
  return absl::InvalidArgumentError(absl::StrCat(path_, ": holds no token"));
}

std::string TokenSource::Token() const {
  std::lock_guard<std::mutex> lock(mutex_);
  const absl::Time now = absl::Now();
  if (now - checked_ < kTokenCheckEvery && now >= checked_) return token_;
  checked_ = now;
  std::error_code error;
  const auto changed = std::filesystem::last_write_time(path_, error);
  if (error || changed == changed_) return token_;
  if (absl::StatusOr<std::string> token = Read(); token.ok()) {
    token_ = *std::move(token);
    changed_ = changed;
  }
  return token_;
}

}  // namespace tern::client
