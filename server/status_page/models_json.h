// What the status page shows of models, as JSON: no paths, and no messages that might hold one.
// Numbers that are not finite are null.
#ifndef TERN_SERVER_STATUS_PAGE_MODELS_JSON_H_
#define TERN_SERVER_STATUS_PAGE_MODELS_JSON_H_

#include <cstdint>
#include <optional>
#include <string>

#include "absl/strings/string_view.h"
#include "server/repository/repository.h"

namespace tern::status_page {

// {"versions": [...]}, ordered by model and version: model, version, default, state (loading,
// ready, unavailable, unloaded), scheme, cluster_size, bits_per_weight, bytes, classes,
// input_shape; of those that are ready also isa and, where Tern quantised them, report. Proportions
// are {value, low, high, images}, the ends those of the 95 % interval.
std::string ModelsJson(const repository::Repository& repository);

// {"model", "version", "layers": [...]}: what runs, in order: name, kind, scheme, implementation,
// macs; where the report knows the layer, also cluster_size, bits_per_weight, weights and sqnr_db.
// nullopt if there is no such version, or it is not ready.
std::optional<std::string> LayersJson(const repository::Repository& repository,
                                      absl::string_view model, uint64_t version);

}  // namespace tern::status_page

#endif  // TERN_SERVER_STATUS_PAGE_MODELS_JSON_H_
