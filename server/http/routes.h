// The paths of the metrics port: /metrics, the Open Inference Protocol under /v2, and pages that
// others add.
#ifndef TERN_SERVER_HTTP_ROUTES_H_
#define TERN_SERVER_HTTP_ROUTES_H_

#include <functional>
#include <map>
#include <string>

#include "server/http/server.h"
#include "server/metrics/metrics.h"
#include "server/oip/inference.h"

namespace tern::http {

// Thread safe once AddPage() has been called for the last time. Nothing is owned.
class Routes {
 public:
  Routes(const oip::Inference* inference, metrics::Metrics* metrics);

  // GET `path` answers with what `content` returns; called on the server's threads, so it must not
  // block.
  void AddPage(std::string path, std::string content_type, std::function<std::string()> content);

  // Counts an answer that the transport gave (ServerOptions::refused), with the method http.
  void Refused(int status) const;

  // A Handler. Statuses: 400 bad request, 404 unknown path, model or version, 405 wrong method, 415
  // compressed body, 429 queue full, 503 not ready, 504 deadline; errors have the body {"error":
  // message}. Calls under /v2 count in tern_requests_total with the method http.NAME, NAME as in
  // gRPC.
  void Handle(Request request, Respond respond) const;

 private:
  struct Page {
    std::string content_type;
    std::function<std::string()> content;
  };

  const oip::Inference* const inference_;
  metrics::Metrics* const metrics_;
  std::map<std::string, Page> pages_;
};

}  // namespace tern::http

#endif  // TERN_SERVER_HTTP_ROUTES_H_
