#include "client/sweep.h"

#include <algorithm>
#include <cmath>
#include <map>
#include <set>

#include "absl/strings/str_cat.h"
#include "client/recipe.h"
#include "client/table.h"
#include "statistics/statistics.h"

namespace tern::client {
namespace {

double Median(std::vector<double> values) {
  if (values.empty()) return 0;
  std::sort(values.begin(), values.end());
  const size_t half = values.size() / 2;
  return values.size() % 2 == 1 ? values[half] : (values[half - 1] + values[half]) / 2;
}

v1::Proportion Sum(const std::vector<v1::QuantizationReport>& reports,
                   const v1::Proportion& (v1::QuantizationReport::*field)() const) {
  uint64_t hits = 0, total = 0;
  for (const v1::QuantizationReport& report : reports) {
    hits += (report.*field)().hits();
    total += (report.*field)().total();
  }
  return statistics::MakeProportion(hits, total);
}

Json Share(const v1::Proportion& p) { return p.total() == 0 ? Json() : Json(p.value()); }
Json ShareInterval(const v1::Proportion& p) {
  return p.total() == 0 ? Json() : Json::array({p.low(), p.high()});
}

bool Succeeded(const SweepRow& row) { return row.error.empty() && !row.reports.empty(); }

bool Clustered(const SweepRow& row) { return IsClustered(row.recipe.weights()); }

// True if the sweep has labelled images; its loss then is the drop in accuracy.
bool Labelled(const std::vector<SweepRow>& rows) {
  return std::any_of(rows.begin(), rows.end(), [](const SweepRow& row) {
    return Succeeded(row) && Pool(row.reports).labelled;
  });
}

// In percent or points.
Chart::Point LossPoint(const SweepFigures& figures, bool labelled) {
  Chart::Point point;
  if (labelled) {
    point.y = 100 * figures.comparison.drop();
    point.low = 100 * figures.comparison.drop_low();
    point.high = 100 * figures.comparison.drop_high();
  } else {
    point.y = 100 * (1 - figures.agreement.value());
    point.low = 100 * (1 - figures.agreement.high());
    point.high = 100 * (1 - figures.agreement.low());
  }
  return point;
}

Chart::Point AccuracyPoint(const SweepFigures& figures, bool labelled) {
  const v1::Proportion& p = labelled ? figures.top1 : figures.agreement;
  Chart::Point point;
  point.y = 100 * p.value();
  point.low = 100 * p.low();
  point.high = 100 * p.high();
  return point;
}

bool Measured(const SweepFigures& figures, bool labelled) {
  return labelled ? figures.labelled : figures.agreement.total() > 0;
}

// The point of `row` joins the series of its scheme.
Chart::Series& SeriesOf(const SweepRow& row, const std::vector<SweepRow>& rows, Chart& chart) {
  const std::string name = SchemeName(row.recipe, rows);
  for (Chart::Series& series : chart.series) {
    if (series.name == name) return series;
  }
  chart.series.push_back({.name = name});
  return chart.series.back();
}

Chart AccuracyChart(const std::vector<SweepRow>& rows, double (*x)(const SweepFigures&)) {
  const bool labelled = Labelled(rows);
  Chart chart;
  chart.y_label = labelled ? "top-1 accuracy, %" : "agreement with float, %";
  uint64_t hits = 0, total = 0;
  for (const SweepRow& row : rows) {
    if (!Succeeded(row)) continue;
    const SweepFigures figures = Pool(row.reports);
    if (!Measured(figures, labelled)) continue;
    Chart::Point point = AccuracyPoint(figures, labelled);
    point.x = x(figures);
    if (Clustered(row)) {
      point.label =
          absl::StrCat("N=", ClusterName(row.recipe.weights(), row.recipe.cluster_size()));
    }
    SeriesOf(row, rows, chart).points.push_back(point);
    hits = figures.float_top1.hits();
    total = figures.float_top1.total();
  }
  if (total > 0) {
    chart.levels.push_back({"float", 100 * static_cast<double>(hits) / static_cast<double>(total)});
  }
  return chart;
}

}  // namespace

std::vector<std::vector<ImageFile>> SplitFolds(const std::vector<ImageFile>& images, size_t folds,
                                               uint64_t seed) {
  std::vector<ImageFile> order = ChooseImages(images, 0, seed);  // shuffled inside each class
  std::stable_sort(order.begin(), order.end(),
                   [](const ImageFile& a, const ImageFile& b) { return a.label < b.label; });
  // Dealt in turn, class after class: a class's images go to different folds, and the folds' sizes
  // differ by one at most.
  std::vector<std::vector<ImageFile>> parts(folds);
  for (size_t i = 0; i < order.size(); ++i) parts[i % folds].push_back(std::move(order[i]));
  return parts;
}

SweepFigures Pool(const std::vector<v1::QuantizationReport>& reports) {
  using Report = v1::QuantizationReport;
  SweepFigures figures;
  figures.float_top1 = Sum(reports, &Report::float_top1);
  figures.top1 = Sum(reports, &Report::top1);
  figures.top5 = Sum(reports, &Report::top5);
  figures.agreement = Sum(reports, &Report::agreement);
  uint64_t both = 0, only_float = 0, only_quantised = 0, neither = 0;
  std::vector<double> ms, float_ms;
  std::set<std::string> warnings;
  const double n = std::max<double>(1, static_cast<double>(reports.size()));
  for (const Report& report : reports) {
    figures.images += report.evaluation_images();
    both += report.comparison().both_right();
    only_float += report.comparison().only_reference_right();
    only_quantised += report.comparison().only_candidate_right();
    neither += report.comparison().both_wrong();
    figures.bits_per_weight += report.bits_per_weight() / n;
    figures.multiplications_removed += report.multiplications_removed() / n;
    figures.bytes += report.bytes() / std::max<size_t>(1, reports.size());
    figures.seconds += report.seconds();
    figures.overlapping += report.overlapping_images();
    ms.push_back(report.ms_per_image());
    float_ms.push_back(report.float_ms_per_image());
    for (const std::string& warning : report.warnings()) {
      if (warnings.insert(warning).second) figures.warnings.push_back(warning);
    }
  }
  figures.comparison = statistics::MakeComparison(both, only_float, only_quantised, neither);
  figures.labelled = both + only_float + only_quantised + neither > 0;
  figures.ms = Median(ms);
  figures.float_ms = Median(float_ms);
  return figures;
}

std::string SchemeName(const v1::Recipe& recipe, const std::vector<SweepRow>& rows) {
  std::string name = NameOf(recipe.weights());
  const auto differ = [&](auto field) {
    return std::any_of(rows.begin(), rows.end(),
                       [&](const SweepRow& row) { return field(row.recipe) != field(recipe); });
  };
  if (differ([](const v1::Recipe& r) { return r.method(); })) {
    absl::StrAppend(&name, ", ", NameOf(recipe.method()));
  }
  if (differ([](const v1::Recipe& r) { return r.activations(); })) {
    absl::StrAppend(&name, ", ", NameOf(recipe.activations()));
  }
  return name;
}

Json ToJson(const SweepRow& row) {
  Json json;
  json["weights"] = NameOf(row.recipe.weights());
  json["cluster_size"] = Clustered(row) ? Json(row.recipe.cluster_size()) : Json();
  json["method"] = NameOf(row.recipe.method());
  json["activations"] = NameOf(row.recipe.activations());
  json["status"] = row.error.empty() ? "ok" : "failed";
  json["error"] = row.error.empty() ? Json() : Json(row.error);
  if (!Succeeded(row)) return json;
  json["resumed"] = row.resumed;
  if (!row.versions.empty()) json["versions"] = row.versions;
  const auto fill = [](const SweepFigures& f, Json& into) {
    into["images"] = f.images;
    into["float_top1"] = Share(f.float_top1);
    into["float_top1_ci95"] = ShareInterval(f.float_top1);
    into["top1"] = Share(f.top1);
    into["top1_ci95"] = ShareInterval(f.top1);
    into["top5"] = Share(f.top5);
    into["comparison"] = f.labelled ? ToJson(f.comparison) : Json();
    into["agreement"] = Share(f.agreement);
    into["agreement_ci95"] = ShareInterval(f.agreement);
    into["multiplications_removed"] = f.multiplications_removed;
    into["bits_per_weight"] = f.bits_per_weight;
    into["bytes"] = f.bytes;
    into["ms_per_image"] = f.ms;
    into["float_ms_per_image"] = f.float_ms;
    into["seconds"] = f.seconds;
    into["overlapping_images"] = f.overlapping;
    into["warnings"] = f.warnings;
  };
  fill(Pool(row.reports), json);
  if (row.reports.size() > 1) {
    json["folds"] = Json::array();
    for (const v1::QuantizationReport& report : row.reports)
      fill(Pool({report}), json["folds"].emplace_back());
  }
  return json;
}

Chart LossByClusterSize(const std::string& model, const std::vector<SweepRow>& rows) {
  const bool labelled = Labelled(rows);
  Chart chart;
  chart.title = absl::StrCat(model, ": ", labelled ? "accuracy lost" : "disagreement with float",
                             " by cluster size");
  chart.x_label = "N, input channels per scale";
  chart.y_label = labelled ? "drop in top-1, points" : "other top-1 than float, % of images";
  std::set<uint32_t> sizes;  // 0, all channels, is the largest
  for (const SweepRow& row : rows) {
    if (Succeeded(row) && Clustered(row)) sizes.insert(row.recipe.cluster_size() - 1);
  }
  std::map<uint32_t, size_t> place;
  for (uint32_t size : sizes) {
    place[size + 1] = chart.categories.size();
    chart.categories.push_back(ClusterName(v1::TERNARY_CLUSTER, size + 1));
  }
  for (const SweepRow& row : rows) {
    if (!Succeeded(row)) continue;
    const SweepFigures figures = Pool(row.reports);
    if (!Measured(figures, labelled)) continue;
    Chart::Point point = LossPoint(figures, labelled);
    if (!Clustered(row)) {
      chart.levels.push_back({SchemeName(row.recipe, rows), point.y});
      continue;
    }
    point.x = static_cast<double>(place[row.recipe.cluster_size()]);
    SeriesOf(row, rows, chart).points.push_back(point);
  }
  for (Chart::Series& series : chart.series) {
    std::stable_sort(series.points.begin(), series.points.end(),
                     [](const Chart::Point& a, const Chart::Point& b) { return a.x < b.x; });
  }
  return chart;
}

Chart AccuracyByBits(const std::string& model, const std::vector<SweepRow>& rows) {
  Chart chart = AccuracyChart(rows, [](const SweepFigures& f) { return f.bits_per_weight; });
  chart.title = absl::StrCat(model, ": accuracy by size");
  chart.x_label = "bits per weight, scales included";
  for (Chart::Series& series : chart.series) {
    std::stable_sort(series.points.begin(), series.points.end(),
                     [](const Chart::Point& a, const Chart::Point& b) { return a.x < b.x; });
  }
  return chart;
}

Chart AccuracyByTime(const std::string& model, const std::vector<SweepRow>& rows) {
  Chart chart = AccuracyChart(rows, [](const SweepFigures& f) { return f.ms; });
  chart.title = absl::StrCat(model, ": accuracy by time");
  chart.x_label = "ms per image, one thread, batch 1";
  for (Chart::Series& series : chart.series) series.line = false;
  return chart;
}

std::vector<Chart> FrontierCharts(const v1::QuantizationReport& report) {
  std::vector<Chart> charts(2);
  for (size_t i = 0; i < charts.size(); ++i) {
    Chart& chart = charts[i];
    const auto x = [i](const v1::FrontierPoint& p) {
      return i == 0 ? p.bits_per_weight() : p.predicted_ms();
    };
    chart.title = absl::StrCat(report.source_model(), ": mixed precision, loss by ",
                               i == 0 ? "size" : "time");
    chart.x_label =
        i == 0 ? "bits per weight, scales included" : "predicted ms per image, one thread, batch 1";
    chart.y_label = "divergence from float, nats per image";
    chart.log_y = true;
    chart.series = {{.name = "predicted"},
                    {.name = "measured", .line = false},
                    {.name = "chosen", .line = false, .large = true}};
    for (const v1::FrontierPoint& p : report.frontier()) {
      chart.series[0].points.push_back({.x = x(p), .y = p.predicted_divergence()});
      if (p.measured()) chart.series[1].points.push_back({.x = x(p), .y = p.divergence()});
      if (p.chosen()) {
        chart.series[2].points.push_back(
            {.x = x(p), .y = p.measured() ? p.divergence() : p.predicted_divergence()});
      }
    }
    std::stable_sort(chart.series[0].points.begin(), chart.series[0].points.end(),
                     [](const Chart::Point& a, const Chart::Point& b) { return a.x < b.x; });
  }
  return charts;
}

}  // namespace tern::client
