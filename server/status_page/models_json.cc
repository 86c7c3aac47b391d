#include "server/status_page/models_json.h"

#include <map>
#include <memory>

#include "nlohmann/json.hpp"
#include "server/engine/plan.h"
#include "tern/v1/model.pb.h"

namespace tern::status_page {
namespace {

using nlohmann::json;

const char* NameOf(repository::State state) {
  switch (state) {
    case repository::State::kLoading:
      return "loading";
    case repository::State::kReady:
      return "ready";
    case repository::State::kUnavailable:
      return "unavailable";
    case repository::State::kUnloaded:
      return "unloaded";
  }
  return "unknown";
}

json ToJson(const v1::Proportion& proportion) {
  return {{"value", proportion.value()},
          {"low", proportion.low()},
          {"high", proportion.high()},
          {"images", proportion.total()}};
}

json ToJson(const v1::QuantizationReport& report) {
  json object = {{"source_model", report.source_model()},
                 {"source_version", report.source_version()},
                 {"calibration_images", report.calibration_images()},
                 {"evaluation_images", report.evaluation_images()},
                 {"bits_per_weight", report.bits_per_weight()},
                 {"compression_ratio", report.compression_ratio()},
                 {"multiplications_removed", report.multiplications_removed()},
                 {"float_ms_per_image", report.float_ms_per_image()},
                 {"ms_per_image", report.ms_per_image()},
                 {"isa", report.isa()},
                 {"warnings", report.warnings()}};
  const std::pair<const char*, const v1::Proportion&> proportions[] = {
      {"float_top1", report.float_top1()},
      {"top1", report.top1()},
      {"float_top5", report.float_top5()},
      {"top5", report.top5()},
      {"agreement", report.agreement()},
      {"calibration_agreement", report.calibration_agreement()}};
  for (const auto& [name, proportion] : proportions) {
    if (proportion.total() > 0) object[name] = ToJson(proportion);  // else not measured
  }
  if (report.has_comparison()) {
    object["drop"] = {{"value", report.comparison().drop()},
                      {"low", report.comparison().drop_low()},
                      {"high", report.comparison().drop_high()}};
  }
  return object;
}

// Names come from files that others wrote, and may be no UTF-8.
std::string Dump(const json& object) {
  return object.dump(-1, ' ', false, json::error_handler_t::replace);
}

}  // namespace

std::string ModelsJson(const repository::Repository& repository) {
  json versions = json::array();
  for (const repository::VersionInfo& info : repository.List("")) {
    json& version = versions.emplace_back(json{{"model", info.model},
                                               {"version", info.version},
                                               {"default", info.is_default},
                                               {"state", NameOf(info.state)},
                                               {"scheme", info.scheme},
                                               {"cluster_size", info.cluster_size},
                                               {"bits_per_weight", info.bits_per_weight},
                                               {"bytes", info.file_bytes},
                                               {"classes", info.classes}});
    for (const int64_t extent : info.input_shape.dims()) version["input_shape"].push_back(extent);
    const auto loaded = repository.Find(info.model, info.version);
    if (!loaded.ok()) continue;
    version["isa"] = (*loaded)->isa;
    if ((*loaded)->report.has_recipe()) version["report"] = ToJson((*loaded)->report);
  }
  return Dump({{"versions", std::move(versions)}});
}

std::optional<std::string> LayersJson(const repository::Repository& repository,
                                      absl::string_view model, uint64_t version) {
  const auto loaded = repository.Find(model, version);
  if (!loaded.ok()) return std::nullopt;
  std::map<absl::string_view, const v1::LayerReport*> reports;
  for (const v1::LayerReport& report : (*loaded)->report.layers()) reports[report.name()] = &report;
  json layers = json::array();
  for (const engine::LayerInfo& info : (*loaded)->plan->layers()) {
    json& layer = layers.emplace_back(json{{"name", info.name},
                                           {"kind", info.op},
                                           {"scheme", info.scheme},
                                           {"implementation", info.implementation},
                                           {"macs", info.macs}});
    const auto found = reports.find(info.name);
    if (found == reports.end()) continue;
    layer["cluster_size"] = found->second->cluster_size();
    layer["bits_per_weight"] = found->second->bits_per_weight();
    layer["weights"] = found->second->weights();
    layer["sqnr_db"] = found->second->output_sqnr_db();
  }
  return Dump({{"model", (*loaded)->info.model},
               {"version", (*loaded)->info.version},
               {"layers", std::move(layers)}});
}

}  // namespace tern::status_page
