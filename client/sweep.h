// A study over cluster sizes and schemes: what is run, and what comes out of it.
#ifndef TERN_CLIENT_SWEEP_H_
#define TERN_CLIENT_SWEEP_H_

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "client/chart.h"
#include "client/dataset.h"
#include "client/json.h"
#include "tern/v1/model.pb.h"

namespace tern::client {

// `images` in `folds` (2..images.size()) parts of nearly equal size, each class spread evenly over
// them; shuffled by `seed`, the same on every machine.
std::vector<std::vector<ImageFile>> SplitFolds(const std::vector<ImageFile>& images, size_t folds,
                                               uint64_t seed);

// One recipe and what its quantisations gave: one report, or one per fold.
struct SweepRow {
  v1::Recipe recipe;
  std::vector<v1::QuantizationReport> reports;
  std::vector<uint64_t> versions;  // published ones
  std::string error;               // not empty: failed, and the rest means nothing
  bool resumed = false;            // taken from an earlier sweep
};

// Counts added over the reports (each image is evaluated in one of them) with their intervals, the
// median of times, the mean of the rest.
struct SweepFigures {
  uint64_t images = 0;
  v1::Proportion float_top1, top1, top5, agreement;
  v1::PairedComparison comparison;
  bool labelled = false;
  double bits_per_weight = 0, multiplications_removed = 0, ms = 0, float_ms = 0, seconds = 0;
  uint64_t bytes = 0;
  uint64_t overlapping = 0;
  std::vector<std::string> warnings;  // each once
};
SweepFigures Pool(const std::vector<v1::QuantizationReport>& reports);

// "ternary", with the method and the activations where the rows differ in them.
std::string SchemeName(const v1::Recipe& recipe, const std::vector<SweepRow>& rows);

Json ToJson(const SweepRow& row);

// Loss against N, accuracy against bits per weight, and accuracy against time. The loss is the drop
// of top-1 against float, or without labels the share of images whose top-1 is not float's.
Chart LossByClusterSize(const std::string& model, const std::vector<SweepRow>& rows);
Chart AccuracyByBits(const std::string& model, const std::vector<SweepRow>& rows);
Chart AccuracyByTime(const std::string& model, const std::vector<SweepRow>& rows);

// The frontier of a search for mixed precision: loss against bits, and against time.
std::vector<Chart> FrontierCharts(const v1::QuantizationReport& report);

}  // namespace tern::client

#endif  // TERN_CLIENT_SWEEP_H_
