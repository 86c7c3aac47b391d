#include "server/status_page/status_page.h"

#include <optional>
#include <set>
#include <utility>
#include <vector>

#include "absl/strings/match.h"
#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_split.h"
#include "nlohmann/json.hpp"
#include "server/base/file.h"
#include "server/status_page/files.h"
#include "server/status_page/models_json.h"

namespace tern::status_page {
namespace {

constexpr absl::string_view kRoot = "/status/";
constexpr char kJson[] = "application/json";
// Own files only, and the picture of an image that was chosen.
constexpr char kPolicy[] =
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' blob:; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'";

// What the charts, tiles and tables read. A hundred versions of the demo model have 1.4 MB of
// metrics, and more with reports and profiles; this is 80 kB of it.
const std::set<std::string>& LiveMetrics() {
  static const auto* names =
      new std::set<std::string>{"process_cpu_seconds_total", "process_resident_memory_bytes",
                                "tern_batch_size",           "tern_cpu_budget_threads",
                                "tern_decode_queue_depth",   "tern_images_total",
                                "tern_inflight_requests",    "tern_queue_depth",
                                "tern_rejected_total",       "tern_request_duration_seconds",
                                "tern_requests_total"};
  return *names;
}

http::Response Make(const char* content_type, std::string body) {
  http::Response response;
  response.content_type = content_type;
  response.body = std::move(body);
  response.headers = {{"Content-Security-Policy", kPolicy},
                      {"X-Content-Type-Options", "nosniff"},
                      {"Referrer-Policy", "no-referrer"},
                      {"Cross-Origin-Resource-Policy", "same-origin"}};
  return response;
}

// Asked about again each time, so that a newer server's page is never mixed with an older one's.
http::Response Cached(const http::Request& request, const char* content_type, std::string body) {
  const std::string tag = absl::StrCat("\"", Sha256Hex(body).substr(0, 32), "\"");
  http::Response response = Make(content_type, std::move(body));
  response.headers.emplace_back("Cache-Control", "no-cache");
  response.headers.emplace_back("ETag", tag);
  const auto known = request.headers.find("if-none-match");
  if (known != request.headers.end() &&
      (known->second == "*" || absl::StrContains(known->second, tag))) {
    response.status = 304;
    response.body.clear();
  }
  return response;
}

http::Response NotFound(const http::Request& request) {
  return http::ErrorResponse(404, absl::StrCat("there is no path ", request.path.substr(0, 256)));
}

http::Response ToPage(const http::Request&) {
  http::Response response = Make("text/plain; charset=utf-8", "see status/\n");
  response.status = 307;
  response.headers.emplace_back("Location", "status/");
  return response;
}

}  // namespace

void AddStatusPage(const repository::Repository* repository, metrics::Metrics* metrics,
                   const Options& options, http::Routes* routes) {
  for (const char* path : {"/", "/status"}) routes->AddPage(path, ToPage);
  for (const File& file : Files()) {
    routes->AddPage(absl::StrCat(kRoot, file.name), [file](const http::Request& request) {
      return Cached(request, file.content_type, std::string(file.content));
    });
  }
  const nlohmann::json server = {{"version", options.server_version},
                                 {"start_time", absl::ToUnixMillis(options.start_time) / 1e3},
                                 {"max_image_bytes", options.max_image_bytes},
                                 {"max_pixels", options.max_pixels}};
  routes->AddPage(absl::StrCat(kRoot, "server"),
                  [text = server.dump()](const http::Request& request) {
                    return Cached(request, kJson, text);
                  });
  routes->AddPage(absl::StrCat(kRoot, "metrics"), [metrics](const http::Request&) {
    http::Response response = Make(http::kMetricsText, metrics->Render(LiveMetrics()));
    response.headers.emplace_back("Cache-Control", "no-store");
    return response;
  });
  routes->AddPage(absl::StrCat(kRoot, "models"), [repository](const http::Request& request) {
    return Cached(request, kJson, ModelsJson(*repository));
  });
  routes->AddPage(absl::StrCat(kRoot, "*"), [repository](const http::Request& request) {
    const std::vector<std::string> parts =
        absl::StrSplit(absl::string_view(request.path).substr(kRoot.size()), '/');
    uint64_t version = 0;
    if (parts.size() != 4 || parts[0] != "models" || parts[2] != "versions" ||
        !absl::SimpleAtoi(parts[3], &version) || version == 0) {
      return NotFound(request);
    }
    std::optional<std::string> layers = LayersJson(*repository, parts[1], version);
    return layers.has_value() ? Cached(request, kJson, *std::move(layers)) : NotFound(request);
  });
}

}  // namespace tern::status_page
