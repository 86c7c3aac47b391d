// The quantisation report as tables.

#include <ostream>

#include "absl/strings/ascii.h"
#include "absl/strings/str_cat.h"
#include "client/commands.h"
#include "client/table.h"

namespace tern::client {
namespace {

std::string Describe(const v1::Recipe& recipe) {
  std::string text = absl::AsciiStrToLower(v1::WeightType_Name(recipe.weights()));
  if (recipe.weights() == v1::INT4_CLUSTER || recipe.weights() == v1::TERNARY_CLUSTER) {
    absl::StrAppend(
        &text, ", N = ", recipe.cluster_size() == 0 ? "all" : absl::StrCat(recipe.cluster_size()));
  }
  absl::StrAppend(&text, ", activations ",
                  absl::AsciiStrToLower(v1::ActivationType_Name(recipe.activations())), ", method ",
                  absl::AsciiStrToLower(v1::Method_Name(recipe.method())), ", seed ",
                  recipe.seed());
  if (recipe.quantize_first_and_last_to_weights()) {
    absl::StrAppend(&text, ", first and last layer too");
  }
  return text;
}

std::string Milliseconds(double ms) { return ms > 0 ? absl::StrCat(Fixed(ms, 3), " ms") : "-"; }

}  // namespace

void PrintReport(const v1::QuantizationReport& report, std::ostream& out) {
  Table layers({{"LAYER"},
                {"OP"},
                {"SCHEME"},
                {"N", Table::kRight},
                {"WEIGHTS", Table::kRight},
                {"BITS/WEIGHT", Table::kRight},
                {"MACS", Table::kRight},
                {"MULTIPLICATIONS GONE", Table::kRight},
                {"SQNR DB", Table::kRight},
                {"CLIPPED", Table::kRight}});
  for (const v1::LayerReport& layer : report.layers()) {
    const bool clustered = layer.scheme() == "int4-cluster" || layer.scheme() == "ternary-cluster";
    layers.Add({layer.name(), layer.op(), layer.scheme(),
                !clustered                  ? "-"
                : layer.cluster_size() == 0 ? "all"
                                            : absl::StrCat(layer.cluster_size()),
                Count(layer.weights()), Fixed(layer.bits_per_weight(), 2), Count(layer.macs()),
                Percent(layer.multiplications_removed()), Fixed(layer.output_sqnr_db(), 1),
                Percent(layer.output_clipped())});
  }
  layers.Print(out);
  out << "\n";

  Table whole({{"WHOLE MODEL"}, {"FLOAT"}, {"QUANTISED"}});
  whole.Add({"recipe", "", Describe(report.recipe())});
  whole.Add(
      {"source", absl::StrCat(report.source_model(), " version ", report.source_version()), ""});
  whole.Add({"bits per weight", "32", Fixed(report.bits_per_weight(), 2)});
  whole.Add({"size", Bytes(report.float_bytes()),
             absl::StrCat(Bytes(report.bytes()), " (", Fixed(report.compression_ratio(), 1),
                          " times smaller)")});
  whole.Add({"multiplications gone", "", Percent(report.multiplications_removed())});
  whole.Add({"top-1 (95 % interval)", Interval(report.float_top1()), Interval(report.top1())});
  whole.Add({"top-5", Interval(report.float_top5()), Interval(report.top5())});
  whole.Add({"agreement with float", "", Interval(report.agreement())});
  whole.Add({"  on calibration images", "", Interval(report.calibration_agreement())});
  whole.Add({"logits SQNR", "", absl::StrCat(Fixed(report.sqnr_db(), 1), " dB")});
  whole.Add({"time per image, one thread", Milliseconds(report.float_ms_per_image()),
             absl::StrCat(Milliseconds(report.ms_per_image()),
                          report.isa().empty() ? "" : absl::StrCat(" (", report.isa(), ")"))});
  whole.Add({"images", "",
             absl::StrCat(report.calibration_images(), " calibration, ", report.evaluation_images(),
                          " evaluation")});
  whole.Add({"quantised in", "", absl::StrCat(Fixed(report.seconds(), 1), " s")});
  whole.Print(out);

  if (report.float_nodes_size() > 0) {
    out << "\nin float (" << Percent(report.float_macs_share()) << " of the multiply-adds):";
    for (const std::string& node : report.float_nodes()) out << " " << Printable(node);
    out << "\n";
  }
  for (const std::string& warning : report.warnings()) {
    out << "warning: " << Printable(warning) << "\n";
  }
}

}  // namespace tern::client
