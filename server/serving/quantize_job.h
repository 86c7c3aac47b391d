// The quantise job: images in, a measured and published version out.
//
// receiving (AddImage) -> calibrating -> evaluating -> measuring -> publishing. Nothing is visible
// to others before the last step, which is one atomic publish and which a dry run leaves out.
#ifndef TERN_SERVER_SERVING_QUANTIZE_JOB_H_
#define TERN_SERVER_SERVING_QUANTIZE_JOB_H_

#include <atomic>
#include <functional>
#include <memory>
#include <set>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "server/artifact/artifact.h"
#include "server/image/image.h"
#include "server/metrics/metrics.h"
#include "server/quant/quantize.h"
#include "server/repository/repository.h"
#include "server/serving/evaluate.h"
#include "tern/v1/model.pb.h"

namespace tern::serving {

struct QuantizeJobOptions {
  std::string model;
  uint64_t source_version = 0;  // 0 = the lowest ready float version
  v1::Recipe recipe;
  bool set_default = false;
  bool dry_run = false;  // measure and report, publish nothing
  int threads = 1;
  image::Limits limits;
  engine::PlanOptions plan;
  uint64_t max_calibration_images = 10000;
  uint64_t max_bytes = 2ull << 30;  // of calibration pixels plus encoded evaluation images
};

struct JobProgress {
  std::string phase;
  double done = 0;  // 0..1 of the phase
  std::string detail;
  double seconds_left = -1;
};

struct QuantizeOutcome {
  uint64_t version = 0;  // 0 = not published: a dry run, or the gate was not met
  bool gate_met = true;
  v1::QuantizationReport report;
};

// One job. Not thread safe, except that `cancelled` may be set from anywhere.
class QuantizeJob {
 public:
  // NOT_FOUND, FAILED_PRECONDITION (no float version), INVALID_ARGUMENT (recipe, or
  // set_default of a dry run).
  static absl::StatusOr<std::unique_ptr<QuantizeJob>> Create(repository::Repository* repository,
                                                             metrics::Metrics* metrics,
                                                             QuantizeJobOptions options);
  ~QuantizeJob();

  // Labels are those of evaluation: an image for calibration alone may have any. INVALID_ARGUMENT bad
  // image or label; RESOURCE_EXHAUSTED over a limit.
  absl::Status AddImage(Sample sample, bool calibration, bool evaluation);

  // Runs everything. FAILED_PRECONDITION if there are no calibration images, or the accuracy gate
  // is set but no labelled evaluation images came; CANCELLED; the errors of quant::Quantize and
  // Repository::Publish. An unmet gate is not an error here: version 0, gate_met false and a
  // warning in the report.
  absl::StatusOr<QuantizeOutcome> Run(const std::function<void(const JobProgress&)>& progress,
                                      const std::atomic<bool>* cancelled);

 private:
  QuantizeJob(repository::Repository* repository, metrics::Metrics* metrics,
              QuantizeJobOptions options);
  absl::StatusOr<QuantizeOutcome> RunPhases(const std::function<void(const JobProgress&)>& progress,
                                            const std::atomic<bool>* cancelled);

  repository::Repository* const repository_;
  metrics::Metrics* const metrics_;
  QuantizeJobOptions options_;
  repository::Repository::FloatSource source_;
  std::shared_ptr<const repository::LoadedModel> source_model_;
  std::vector<std::vector<float>> calibration_;  // f32 NHWC, preprocessed
  std::vector<Sample> evaluation_;               // encoded
  // SHA-256 of the encoded images, to find those of both uses.
  std::set<std::string> calibration_hashes_;
  std::vector<std::string> evaluation_hashes_;
  uint64_t bytes_ = 0;
};

}  // namespace tern::serving

#endif  // TERN_SERVER_SERVING_QUANTIZE_JOB_H_
