// The status page of the metrics port: what the server does now, its models and their accuracy
// reports, and any image classified by several versions side by side.
//
// Static files in the binary (files/); all else happens in the browser. Live figures are a part of
// the text of /metrics: one contract, tested already, and rates and percentiles are differences
// between two readings, which each reader keeps for itself. Models and layers are JSON of their own
// (models_json.h), which /metrics cannot hold. Images go to the Open Inference Protocol under /v2,
// which asks for the token where the data port does.
//
// Public, as /metrics is: anybody who reaches the port reads names, sizes, layers and reports of
// the models; nobody reads paths, labels, tokens or images.
#ifndef TERN_SERVER_STATUS_PAGE_STATUS_PAGE_H_
#define TERN_SERVER_STATUS_PAGE_STATUS_PAGE_H_

#include <cstdint>
#include <string>

#include "absl/time/time.h"
#include "server/http/routes.h"
#include "server/metrics/metrics.h"
#include "server/repository/repository.h"

namespace tern::status_page {

struct Options {
  std::string server_version;  // Tern's
  absl::Time start_time;       // of the server, by which the page notices another one
  // Limits of an image, for the page to say before it sends one.
  uint64_t max_image_bytes = 0;
  uint64_t max_pixels = 0;
};

// Adds to `routes`, all with GET and HEAD:
//   /status/                              the page and, below, its files
//   /, /status                            307 to it
//   /status/server                        JSON: version, start_time (s since 1970),
//   max_image_bytes,
//                                         max_pixels
//   /status/metrics                       the metrics that the page draws, as in /metrics
//   /status/models                        ModelsJson()
//   /status/models/MODEL/versions/VERSION LayersJson(); 404 if that has nothing
// Other paths below /status/ are 404. Files and JSON carry an ETag and answer 304 to
// If-None-Match. `repository` and `metrics` are not owned.
void AddStatusPage(const repository::Repository* repository, metrics::Metrics* metrics,
                   const Options& options, http::Routes* routes);

}  // namespace tern::status_page

#endif  // TERN_SERVER_STATUS_PAGE_STATUS_PAGE_H_
