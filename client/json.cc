#include "client/json.h"

#include <cmath>

#include "absl/strings/ascii.h"
#include "client/recipe.h"

namespace tern::client {
namespace {

Json Value(const v1::Proportion& p) { return p.total() == 0 ? Json() : Json(p.value()); }

Json Ci95(const v1::Proportion& p) {
  return p.total() == 0 ? Json() : Json::array({p.low(), p.high()});
}

// JSON has no infinities (a layer without any error has an SQNR of infinity).
Json Number(double value) { return std::isfinite(value) ? Json(value) : Json(); }

std::string Lower(const std::string& name) { return absl::AsciiStrToLower(name); }

Json ToJson(const v1::Recipe& recipe) {
  Json json;
  json["weights"] = Lower(v1::WeightType_Name(recipe.weights()));
  json["cluster_size"] = recipe.cluster_size();
  json["activations"] = Lower(v1::ActivationType_Name(recipe.activations()));
  json["method"] = Lower(v1::Method_Name(recipe.method()));
  json["quantize_first_and_last_to_weights"] = recipe.quantize_first_and_last_to_weights();
  json["seed"] = recipe.seed();
  json["max_top1_drop"] = recipe.has_max_top1_drop() ? Json(recipe.max_top1_drop()) : Json();
  json["distillation"] = NameOf(recipe.distillation());
  json["target_bits"] = recipe.has_target_bits() ? Json(recipe.target_bits()) : Json();
  json["target_ms"] = recipe.has_target_ms() ? Json(recipe.target_ms()) : Json();
  json["layers"] = Json::array();
  for (const v1::LayerChoice& choice : recipe.layers()) {
    Json& entry = json["layers"].emplace_back();
    entry["layer"] = choice.layer();
    entry["weights"] = Lower(v1::WeightType_Name(choice.weights()));
    entry["cluster_size"] = choice.cluster_size();
  }
  return json;
}

Json ToJson(const google::protobuf::RepeatedPtrField<v1::ClassReport>& classes, bool reference) {
  Json json = Json::array();
  for (const v1::ClassReport& c : classes) {
    Json& entry = json.emplace_back();
    entry["index"] = c.class_index();
    entry["label"] = c.label();
    entry["images"] = c.images();
    if (reference) entry["reference_right"] = c.reference_right();
    entry["right"] = c.candidate_right();
    entry["confused_with"] = Json::array();
    for (const v1::ClassReport::Confusion& other : c.confused_with()) {
      Json& confusion = entry["confused_with"].emplace_back();
      confusion["index"] = other.class_index();
      confusion["label"] = other.label();
      confusion["images"] = other.images();
    }
  }
  return json;
}

Json ToJson(const v1::DistillationReport& report) {
  Json json;
  json["kind"] = NameOf(report.kind());
  json["steps"] = report.steps();
  json["loss_before"] = Number(report.loss_before());
  json["loss_after"] = Number(report.loss_after());
  json["agreement_before"] = Number(report.agreement_before());
  json["agreement_after"] = Number(report.agreement_after());
  json["kept"] = report.kept();
  json["seconds"] = report.seconds();
  return json;
}

Json ToJson(const v1::LayerSensitivity& s) {
  Json json;
  json["layer"] = s.layer();
  json["weights"] = Lower(v1::WeightType_Name(s.weights()));
  json["cluster_size"] = s.cluster_size();
  json["divergence"] = Number(s.divergence());
  json["bits_per_weight"] = Number(s.bits_per_weight());
  json["ms"] = Number(s.ms());
  return json;
}

Json ToJson(const v1::FrontierPoint& point) {
  Json json;
  json["bits_per_weight"] = Number(point.bits_per_weight());
  json["predicted_ms"] = Number(point.predicted_ms());
  json["predicted_divergence"] = Number(point.predicted_divergence());
  json["divergence"] = point.measured() ? Number(point.divergence()) : Json();
  json["agreement"] = point.measured() ? Number(point.agreement()) : Json();
  json["drop"] = point.measured() ? Number(point.drop()) : Json();
  json["chosen"] = point.chosen();
  json["description"] = point.description();
  return json;
}

}  // namespace

Json ToJson(const v1::Preprocessing& contract) {
  Json json;
  json["color_order"] = v1::Preprocessing::ColorOrder_Name(contract.color_order());
  json["ignore_exif_orientation"] = contract.ignore_exif_orientation();
  json["resize"] = v1::Preprocessing::Resize_Name(contract.resize());
  json["resize_size"] = contract.resize_size();
  json["filter"] = v1::Preprocessing::Filter_Name(contract.filter());
  json["center_crop"] = contract.center_crop();
  json["scale"] = contract.scale();
  json["mean"] = std::vector<float>(contract.mean().begin(), contract.mean().end());
  json["std"] = std::vector<float>(contract.std().begin(), contract.std().end());
  json["jpeg_scaling"] = contract.jpeg_scaling();
  return json;
}

Json ToJson(const v1::PairedComparison& comparison) {
  Json json;
  json["both_right"] = comparison.both_right();
  json["only_reference_right"] = comparison.only_reference_right();
  json["only_candidate_right"] = comparison.only_candidate_right();
  json["both_wrong"] = comparison.both_wrong();
  json["drop"] = Number(comparison.drop());
  json["drop_ci95"] = Json::array({Number(comparison.drop_low()), Number(comparison.drop_high())});
  json["p_value"] = Number(comparison.p_value());
  return json;
}

Json ToJson(const v1::LayerReport& layer) {
  Json json;
  json["name"] = layer.name();
  json["op"] = layer.op();
  json["scheme"] = layer.scheme();
  json["cluster_size"] = layer.cluster_size();
  json["bits_per_weight"] = layer.bits_per_weight();
  json["weight_bits"] = layer.weight_bits();
  json["weights"] = layer.weights();
  json["macs"] = layer.macs();
  json["multiplications_removed"] = layer.multiplications_removed();
  json["output_sqnr_db"] = Number(layer.output_sqnr_db());
  json["output_clipped"] = Number(layer.output_clipped());
  json["output_at_limit"] = layer.has_output_at_limit() ? Json(layer.output_at_limit()) : Json();
  json["output_scale"] = Number(layer.output_scale());
  json["output_zero_point"] = layer.output_zero_point();
  return json;
}

Json ToJson(const v1::OutputReference& outputs) {
  Json json;
  json["images_of"] = outputs.images_of();
  json["images"] = outputs.images();
  json["confidence"] = Number(outputs.confidence());
  json["entropy"] = Number(outputs.entropy());
  json["best_class"] = Json::array();
  for (const uint32_t images : outputs.best_class()) json["best_class"].push_back(images);
  return json;
}

Json ToJson(const v1::FineTuningReport& report) {
  Json json;
  json["best_epoch"] = report.best_epoch();
  json["training_images"] = report.training_images();
  json["held_out_images"] = report.held_out_images();
  json["learning_rate"] = report.learning_rate();
  json["distillation_weight"] = report.distillation_weight();
  json["seconds"] = report.seconds();
  json["float_top1"] = Value(report.float_top1());
  json["float_top1_ci95"] = Ci95(report.float_top1());
  json["start_top1"] = Value(report.start_top1());
  json["start_top1_ci95"] = Ci95(report.start_top1());
  json["top1"] = Value(report.top1());
  json["top1_ci95"] = Ci95(report.top1());
  json["epochs"] = Json::array();
  for (const v1::FineTuningReport::Epoch& epoch : report.epochs()) {
    Json entry;
    entry["epoch"] = epoch.epoch();
    entry["loss"] = Number(epoch.loss());
    entry["accuracy"] = Number(epoch.accuracy());
    entry["held_out_top1"] = Value(epoch.top1());
    json["epochs"].push_back(std::move(entry));
  }
  return json;
}

Json ToJson(const v1::QuantizationReport& report) {
  Json json;
  json["recipe"] = ToJson(report.recipe());
  json["source_model"] = report.source_model();
  json["source_version"] = report.source_version();
  json["calibration_images"] = report.calibration_images();
  json["evaluation_images"] = report.evaluation_images();
  json["bits_per_weight"] = report.bits_per_weight();
  json["float_bytes"] = report.float_bytes();
  json["bytes"] = report.bytes();
  json["compression_ratio"] = report.compression_ratio();
  json["multiplications_removed"] = report.multiplications_removed();
  json["float_top1"] = Value(report.float_top1());
  json["float_top1_ci95"] = Ci95(report.float_top1());
  json["float_top5"] = Value(report.float_top5());
  json["float_top5_ci95"] = Ci95(report.float_top5());
  json["top1"] = Value(report.top1());
  json["top1_ci95"] = Ci95(report.top1());
  json["top5"] = Value(report.top5());
  json["top5_ci95"] = Ci95(report.top5());
  json["agreement"] = Value(report.agreement());
  json["agreement_ci95"] = Ci95(report.agreement());
  json["calibration_agreement"] = Value(report.calibration_agreement());
  json["calibration_agreement_ci95"] = Ci95(report.calibration_agreement());
  json["comparison"] = report.has_comparison() ? ToJson(report.comparison()) : Json();
  json["worst_classes"] = ToJson(report.worst_classes(), true);
  json["overlapping_images"] = report.overlapping_images();
  json["outputs"] = report.has_outputs() ? ToJson(report.outputs()) : Json();
  json["sqnr_db"] = Number(report.sqnr_db());
  json["float_ms_per_image"] = report.float_ms_per_image();
  json["ms_per_image"] = report.ms_per_image();
  json["isa"] = report.isa();
  json["seconds"] = report.seconds();
  json["float_nodes"] =
      std::vector<std::string>(report.float_nodes().begin(), report.float_nodes().end());
  json["warnings"] = std::vector<std::string>(report.warnings().begin(), report.warnings().end());
  json["distillation"] = report.has_distillation() ? ToJson(report.distillation()) : Json();
  json["sensitivity"] = Json::array();
  for (const auto& entry : report.sensitivity()) json["sensitivity"].push_back(ToJson(entry));
  json["frontier"] = Json::array();
  for (const auto& point : report.frontier()) json["frontier"].push_back(ToJson(point));
  if (report.has_fine_tuning()) json["fine_tuning"] = ToJson(report.fine_tuning());
  json["layers"] = Json::array();
  for (const v1::LayerReport& layer : report.layers()) json["layers"].push_back(ToJson(layer));
  return json;
}

Json ToJson(const v1::QuantizeResult& result) {
  const v1::QuantizationReport& report = result.report();
  Json json;
  json["model"] = result.model();
  json["version"] = result.version();
  json["published"] = result.published();
  Json full = ToJson(report);
  for (const char* key : {"bits_per_weight", "bytes", "multiplications_removed", "float_top1",
                          "top1", "agreement", "sqnr_db", "layers"}) {
    json[key] = full[key];
  }
  full.erase("layers");
  json["report"] = std::move(full);
  return json;
}

Json ToJson(const v1::EvaluateResult& result) {
  Json json;
  json["model"] = result.model();
  json["version"] = result.version();
  json["images"] = result.images();
  json["labelled"] = result.labelled();
  json["top1"] = Value(result.top1());
  json["top5"] = Value(result.top5());
  json["top1_ci95"] = Ci95(result.top1());
  json["top5_ci95"] = Ci95(result.top5());
  json["agreement"] = Value(result.agreement());
  json["agreement_ci95"] = Ci95(result.agreement());
  json["comparison"] = result.has_comparison() ? ToJson(result.comparison()) : Json();
  json["divergence"] = result.agreement().total() > 0 ? Number(result.divergence()) : Json();
  json["worst_classes"] = ToJson(result.worst_classes(), result.has_comparison());
  json["warnings"] = std::vector<std::string>(result.warnings().begin(), result.warnings().end());
  return json;
}

Json ToJson(const v1::ModelVersion& version) {
  Json json;
  json["model"] = version.model();
  json["version"] = version.version();
  json["default"] = version.is_default();
  json["state"] = Lower(v1::VersionState_Name(version.state()));
  json["reason"] = version.reason();
  json["scheme"] = version.scheme();
  json["cluster_size"] = version.cluster_size();
  json["bits_per_weight"] = version.bits_per_weight();
  json["bytes"] = version.bytes();
  json["classes"] = version.classes();
  json["input_shape"] =
      std::vector<int64_t>(version.input_shape().begin(), version.input_shape().end());
  json["preprocessing"] = ToJson(version.preprocessing());
  return json;
}

Json ToJson(const v1::ClassifyResponse& response) {
  Json json;
  json["request_id"] = response.request_id();
  json["classes"] = Json::array();
  for (const v1::ClassScore& score : response.classes()) {
    Json entry;
    entry["index"] = score.index();
    entry["label"] = score.label();
    entry["probability"] = score.probability();
    json["classes"].push_back(entry);
  }
  const v1::Receipt& receipt = response.receipt();
  json["model"] = receipt.model();
  json["version"] = receipt.version();
  json["scheme"] = receipt.scheme();
  json["isa"] = receipt.isa();
  json["batch_size"] = receipt.batch_size();
  if (receipt.degradation() != v1::Receipt::NONE) {
    json["degradation"] = v1::Receipt::Degradation_Name(receipt.degradation());
    json["degraded_from"] = receipt.degraded_from();
  }
  Json timing;
  timing["decode_us"] = receipt.timing().decode_us();
  timing["preprocess_us"] = receipt.timing().preprocess_us();
  timing["queue_us"] = receipt.timing().queue_us();
  timing["inference_us"] = receipt.timing().inference_us();
  timing["total_us"] = receipt.timing().total_us();
  json["timing"] = timing;
  return json;
}

Json ToJson(const v1::BenchmarkResponse& response) {
  Json json;
  json["images_per_second"] = Number(response.images_per_second());
  json["ms_per_image"] = Number(response.ms_per_image());
  json["p50_ms"] = Number(response.p50_ms());
  json["p90_ms"] = Number(response.p90_ms());
  json["p99_ms"] = Number(response.p99_ms());
  json["errors"] = 0;  // a failed run has no response
  json["batches"] = response.batches();
  json["isa"] = response.isa();
  return json;
}

Json ToJson(const v1::ProfileResponse& response) {
  Json json;
  json["total_ms"] = response.total_ms();
  json["outside_share"] = response.outside_share();
  json["work"] = Json::array();
  for (const v1::WorkTime& work : response.work()) {
    json["work"].push_back({{"kind", work.kind()}, {"ms", work.ms()}, {"share", work.share()}});
  }
  json["layers"] = Json::array();
  for (const v1::LayerTime& layer : response.layers()) {
    Json entry;
    entry["name"] = layer.name();
    entry["op"] = layer.op();
    entry["scheme"] = layer.scheme();
    entry["implementation"] = layer.implementation();
    entry["ms"] = layer.ms();
    entry["share"] = layer.share();
    entry["gmacs_per_second"] = Number(layer.gmacs_per_second());
    json["layers"].push_back(entry);
  }
  return json;
}

Json ToJson(const LoadResult& result) {
  Json json;
  json["images"] = result.images;
  json["seconds"] = result.seconds;
  json["images_per_second"] = result.images_per_second;
  json["ms_per_image"] = result.images > 0 ? Json(result.ms_per_image) : Json();
  json["mean_ms"] = Number(result.mean_ms);
  json["p50_ms"] = Number(result.p50_ms);
  json["p90_ms"] = Number(result.p90_ms);
  json["p95_ms"] = Number(result.p95_ms);
  json["p99_ms"] = Number(result.p99_ms);
  json["p999_ms"] = Number(result.p999_ms);
  json["max_ms"] = Number(result.max_ms);
  json["p50_beside_pixels_ms"] = Number(result.p50_beside_pixels_ms);
  json["not_sent"] = result.not_sent;
  json["errors"] = result.errors;
  json["errors_by_code"] = Json::object();
  for (const auto& [code, count] : result.errors_by_code) json["errors_by_code"][code] = count;
  json["mean_batch_size"] = result.batch_size;
  Json stages;
  stages["decode_us"] = result.decode_us;
  stages["preprocess_us"] = result.preprocess_us;
  stages["queue_us"] = result.queue_us;
  stages["inference_us"] = result.inference_us;
  stages["total_us"] = result.total_us;
  json["mean_stages"] = stages;
  return json;
}

std::string Dump(const Json& json, int indent) {
  return json.dump(indent, ' ', false, Json::error_handler_t::replace);
}

}  // namespace tern::client
