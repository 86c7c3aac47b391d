// The quantisation report as tables.

#include <algorithm>
#include <cmath>
#include <ostream>

#include "absl/strings/ascii.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "client/commands.h"
#include "client/recipe.h"
#include "client/table.h"

namespace tern::client {
namespace {

std::string Describe(const v1::Recipe& recipe) {
  std::string text = absl::AsciiStrToLower(v1::WeightType_Name(recipe.weights()));
  if (IsClustered(recipe.weights())) {
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
  if (recipe.distillation() != v1::DISTILL_AUTO) {
    absl::StrAppend(&text, ", distillation ", NameOf(recipe.distillation()));
  }
  if (recipe.has_target_bits()) {
    absl::StrAppend(&text, ", at most ", Fixed(recipe.target_bits(), 2), " bits per weight");
  }
  if (recipe.has_target_ms()) {
    absl::StrAppend(&text, ", at most ", Fixed(recipe.target_ms(), 3), " ms");
  }
  if (recipe.has_max_top1_drop() && recipe.max_top1_drop() >= 0) {
    absl::StrAppend(&text, ", drop of at most ", Fixed(100 * recipe.max_top1_drop(), 2), " points");
  }
  if (recipe.layers_size() > 0) {
    absl::StrAppend(&text, ", ", recipe.layers_size(), " layers by name");
  }
  return text;
}

std::string Milliseconds(double ms) { return ms > 0 ? absl::StrCat(Fixed(ms, 3), " ms") : "-"; }

// Small probabilities as powers: 3.1e-09.
std::string Probability(double p) {
  return std::isfinite(p) && p < 0.001 ? absl::StrFormat("%.1e", p) : Fixed(p, 3);
}

void AddComparison(const v1::PairedComparison& c, Table& table) {
  table.Add({"drop in top-1, points (95 %)", "", Points(c)});
  table.Add(
      {"  images: both right, both wrong", "", absl::StrCat(c.both_right(), ", ", c.both_wrong())});
  table.Add({"  only float right, only quantised", "",
             absl::StrCat(c.only_reference_right(), ", ", c.only_candidate_right(),
                          " (McNemar p = ", Probability(c.p_value()), ")")});
}

void PrintDistillation(const v1::DistillationReport& d, std::ostream& out) {
  out << "\ndistillation (" << NameOf(d.kind()) << "): " << d.steps() << " steps in "
      << Fixed(d.seconds(), 1) << " s; on calibration images set aside divergence "
      << Fixed(d.loss_before(), 4) << " -> " << Fixed(d.loss_after(), 4) << " nats, agreement "
      << Percent(d.agreement_before()) << " -> " << Percent(d.agreement_after()) << "; "
      << (d.kept() ? "kept" : "not kept") << "\n";
}

void PrintSensitivity(const v1::QuantizationReport& report, std::ostream& out) {
  if (report.sensitivity_size() == 0) return;
  Table table({{"SENSITIVITY OF LAYER"},
               {"WEIGHTS"},
               {"N", Table::kRight},
               {"DIVERGENCE", Table::kRight},
               {"BITS/WEIGHT", Table::kRight},
               {"MS", Table::kRight}});
  for (const v1::LayerSensitivity& s : report.sensitivity()) {
    table.Add({s.layer(), NameOf(s.weights()), ClusterName(s.weights(), s.cluster_size()),
               Fixed(s.divergence(), 5), Fixed(s.bits_per_weight(), 2), Fixed(s.ms(), 4)});
  }
  out << "\n";
  table.Print(out);
}

void PrintFrontier(const v1::QuantizationReport& report, std::ostream& out) {
  if (report.frontier_size() == 0) return;
  Table table({{"FRONTIER"},
               {"BITS/WEIGHT", Table::kRight},
               {"PREDICTED MS", Table::kRight},
               {"PREDICTED DIVERGENCE", Table::kRight},
               {"MEASURED", Table::kRight},
               {"AGREEMENT", Table::kRight},
               {"DROP, POINTS", Table::kRight},
               {"LAYERS"}});
  for (const v1::FrontierPoint& p : report.frontier()) {
    table.Add({p.chosen() ? "chosen" : "", Fixed(p.bits_per_weight(), 2),
               Fixed(p.predicted_ms(), 3), Fixed(p.predicted_divergence(), 4),
               p.measured() ? Fixed(p.divergence(), 4) : "-",
               p.measured() ? Percent(p.agreement()) : "-",
               p.measured() ? Fixed(100 * p.drop(), 2) : "-", p.description()});
  }
  out << "\n";
  table.Print(out);
}

std::string NamedClass(uint32_t index, const std::string& label) {
  return label.empty() ? absl::StrCat(index) : absl::StrCat(index, " ", label);
}

}  // namespace

void PrintWorstClasses(const google::protobuf::RepeatedPtrField<v1::ClassReport>& classes,
                       std::ostream& out) {
  if (classes.empty()) return;
  const bool reference = std::any_of(classes.begin(), classes.end(), [](const v1::ClassReport& c) {
    return c.reference_right() > 0;
  });
  Table table({{"WORST CLASSES"},
               {"IMAGES", Table::kRight},
               {reference ? "RIGHT BEFORE" : "", Table::kRight},
               {"RIGHT", Table::kRight},
               {"TAKEN FOR"}});
  for (const v1::ClassReport& c : classes) {
    std::string others;
    for (const v1::ClassReport::Confusion& other : c.confused_with()) {
      absl::StrAppend(&others, others.empty() ? "" : ", ",
                      NamedClass(other.class_index(), other.label()), " (", other.images(), ")");
    }
    table.Add({NamedClass(c.class_index(), c.label()), absl::StrCat(c.images()),
               reference ? absl::StrCat(c.reference_right()) : "",
               absl::StrCat(c.candidate_right()), others});
  }
  out << "\n";
  table.Print(out);
}

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
    const bool clustered = layer.scheme() != "int8";
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
  if (report.has_comparison()) AddComparison(report.comparison(), whole);
  whole.Add({"agreement with float", "", Interval(report.agreement())});
  whole.Add({"  on calibration images", "", Interval(report.calibration_agreement())});
  whole.Add({"logits SQNR", "", absl::StrCat(Fixed(report.sqnr_db(), 1), " dB")});
  whole.Add({"time per image, one thread", Milliseconds(report.float_ms_per_image()),
             absl::StrCat(Milliseconds(report.ms_per_image()),
                          report.isa().empty() ? "" : absl::StrCat(" (", report.isa(), ")"))});
  whole.Add({"images", "",
             absl::StrCat(report.calibration_images(), " calibration, ", report.evaluation_images(),
                          " evaluation",
                          report.overlapping_images() > 0
                              ? absl::StrCat(", ", report.overlapping_images(), " in both")
                              : "")});
  whole.Add({"quantised in", "", absl::StrCat(Fixed(report.seconds(), 1), " s")});
  if (report.has_fine_tuning()) {
    const v1::FineTuningReport& tuning = report.fine_tuning();
    whole.Add(
        {"fine-tuned", "",
         absl::StrCat("epoch ", tuning.best_epoch(), " of ", std::max(tuning.epochs_size(), 1) - 1,
                      ", ", Count(tuning.training_images()), " images, ",
                      Fixed(tuning.seconds(), 0), " s")});
    whole.Add({"  before, on held-out images", "", Interval(tuning.start_top1())});
  }
  whole.Print(out);

  if (report.float_nodes_size() > 0) {
    out << "\nin float:";
    for (const std::string& node : report.float_nodes()) out << " " << Printable(node);
    out << "\n";
  }
  if (report.has_distillation()) PrintDistillation(report.distillation(), out);
  PrintWorstClasses(report.worst_classes(), out);
  PrintSensitivity(report, out);
  PrintFrontier(report, out);
  if (report.warnings_size() > 0) out << "\n";
  for (const std::string& warning : report.warnings()) {
    out << "warning: " << Printable(warning) << "\n";
  }
}

}  // namespace tern::client
