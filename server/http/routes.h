// The paths of the metrics port: /metrics, the Open Inference Protocol under /v2, and pages that
// others add.
#ifndef TERN_SERVER_HTTP_ROUTES_H_
#define TERN_SERVER_HTTP_ROUTES_H_

#include <functional>
#include <map>
#include <string>

#include "absl/status/status.h"
#include "absl/strings/string_view.h"
#include "server/http/server.h"
#include "server/metrics/metrics.h"
#include "server/oip/inference.h"

namespace tern::http {

// The content type of Metrics::Render().
inline constexpr char kMetricsText[] = "text/plain; version=0.0.4; charset=utf-8";

// Thread safe once AddPage() has been called for the last time. Nothing is owned.
class Routes {
 public:
  // Whether a call under /v2 may go on: its gRPC method ("/package.Service/Method") and the value
  // of its Authorization header, if it has one. Returns whom admission counts the call for, empty
  // for the client's address. UNAUTHENTICATED is answered with 401, PERMISSION_DENIED with 403.
  // Health checks are not asked about, as on the gRPC ports, nor is /metrics.
  using Authorize = std::function<absl::StatusOr<std::string>(absl::string_view method,
                                                              const std::string* authorization)>;

  // `authorize` may be null: everything goes on.
  Routes(const oip::Inference* inference, metrics::Metrics* metrics, Authorize authorize = nullptr);

  // Answers GET and HEAD. Called on the server's threads, so it must not block; thread safe.
  using Page = std::function<Response(const Request&)>;
  // A `path` that ends in '*' stands for every path that begins with what is before it and is no
  // page itself.
  void AddPage(std::string path, Page page);

  // Counts an answer that the transport gave (ServerOptions::refused), with the method http.
  void Refused(int status) const;

  // A Handler. Statuses: 400 bad request, 401 and 403 (Authorize), 404 unknown path, model or
  // version, 405 wrong method, 413 over a limit, 415 compressed body, 429 queue full, 503 not
  // ready, 504 deadline; errors have the body {"error": message}. Calls under /v2 count in
  // tern_requests_total with the method http.NAME, NAME as in gRPC.
  void Handle(Request request, Respond respond) const;

 private:
  // Null if there is none.
  const Page* FindPage(const std::string& path) const;

  const oip::Inference* const inference_;
  metrics::Metrics* const metrics_;
  const Authorize authorize_;
  std::map<std::string, Page> pages_;
};

}  // namespace tern::http

#endif  // TERN_SERVER_HTTP_ROUTES_H_
