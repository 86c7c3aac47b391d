// Every metric of Tern, in one place. docs/metrics.md describes them; a test compares the two.
//
// Times are seconds, counters end in _total. Labels model, version (decimal), scheme where they
// apply. All functions are thread safe. Call sites pass plain values; nobody else includes
// prometheus-cpp.
#ifndef TERN_SERVER_METRICS_METRICS_H_
#define TERN_SERVER_METRICS_METRICS_H_

#include <cstdint>
#include <functional>
#include <memory>
#include <optional>
#include <set>
#include <string>
#include <utility>
#include <vector>

#include "absl/strings/string_view.h"
#include "absl/time/time.h"

namespace prometheus {
class Registry;
}

namespace tern::metrics {

// Identity of a model version in labels.
struct ModelLabels {
  std::string model;
  uint64_t version = 0;
  std::string scheme;  // fp32, int8, int4-cluster, int3-cluster, ternary-cluster
};

enum class Stage { kDecode, kPreprocess, kQueue, kInference, kPostprocess };

// From the report of a quantised version: tern_quantization_*, tern_activation_clipped_ratio.
struct ReportGauges {
  double top1_ratio = -1;  // quantised / float top-1; negative = not measured
  double top1_agreement = -1;
  double top1_agreement_low = 0;  // of the 95 % interval
  double top1 = -1;               // of the quantised network; negative = not measured
  double top1_low = 0;
  std::vector<std::pair<std::string, double>> layer_sqnr_db;
  std::vector<std::pair<std::string, double>> layer_clipped;
  std::vector<std::pair<std::string, double>> layer_at_limit;
};

// Figures of what a version does now, gauges with the labels model, version and scheme. Those named
// Low and High are ends of 95 % Wilson intervals.
enum class LiveFigure {
  kLabels,  // tern_live_labels: labels in the window
  kTop1,    // tern_live_top1_ratio
  kTop1Low,
  kTop1High,
  kTop5,
  kTop5Low,
  kTop5High,
  kComparisons,  // tern_live_comparisons: shadow comparisons in the window
  kAgreement,    // tern_live_agreement_ratio
  kAgreementLow,
  kAgreementHigh,
  kImages,               // tern_live_images: answers in the window
  kConfidence,           // tern_live_confidence_mean
  kEntropy,              // tern_live_entropy_mean, nats
  kClassMix,             // tern_live_class_mix_psi
  kAtLimitExcess,        // tern_live_at_limit_excess
  kReferenceImages,      // tern_drift_reference_images
  kReferenceConfidence,  // tern_drift_reference_confidence_mean
  kReferenceEntropy,     // tern_drift_reference_entropy_mean, nats
  kCount                 // how many there are
};

class Metrics {
 public:
  Metrics();
  ~Metrics();

  // tern_requests_total{method,code}, tern_request_duration_seconds{method} (all outcomes).
  void Request(absl::string_view method, absl::string_view code, absl::Duration duration);
  // tern_stream_requests_total{method,code}
  void StreamRequest(absl::string_view method, absl::string_view code);
  // tern_inflight_requests{method}: +1 / -1.
  void InFlight(absl::string_view method, int delta);
  // tern_stage_duration_seconds{stage,model,version}
  void StageTime(Stage stage, const ModelLabels& model, absl::Duration duration);
  // tern_layer_duration_seconds{model,version,layer}, of the batches that are profiled (opt-in).
  void LayerTime(const ModelLabels& model, absl::string_view layer, absl::Duration duration);
  // tern_batch_size{model,version} histogram; tern_images_total{model,version,scheme}
  void Batch(const ModelLabels& model, int images);
  // tern_batch_learned_seconds{model,version,batch_size}; tern_batch_limit{model,version},
  // tern_batch_delay_seconds{model,version}: the largest batch and the delay in force
  void BatchLearned(const ModelLabels& model, int images, absl::Duration time, int limit,
                    absl::Duration delay);
  // tern_version_requests_total{model,version,code}; of those with code OK also
  // tern_version_request_duration_seconds{model,version}. One request may have several images; each
  // of a stream is one.
  void VersionRequest(const ModelLabels& model, absl::string_view code, absl::Duration duration);
  // tern_queue_depth{model,version}
  void QueueDepth(const ModelLabels& model, int depth);
  // tern_waiting_bytes, tern_waiting_images: what admitted requests hold and how many there are;
  // tern_clients: how many clients they come from
  void Waiting(int64_t bytes, int64_t images, int64_t clients);
  // tern_decode_queue_depth
  void DecodeQueueDepth(int depth);
  // tern_brownout_level{model}: steps down from the default version
  void BrownoutLevel(absl::string_view model, int level);
  // tern_degraded_total{model,from,to}: answers of another version than the default
  void Degraded(absl::string_view model, uint64_t from, uint64_t to);
  // tern_rejected_total{reason}: queue_full, client_limit, waiting_bytes, deadline, cancelled,
  // too_large, bad_image, draining
  void Rejected(absl::string_view reason);
  // tern_refused_connections_total{port}: data, admin
  void RefusedConnection(absl::string_view port);
  // tern_labelled_predictions_total{model,version,scheme,result=top1|top5|miss}; top5 = in the top
  // 5 but not first
  void Labelled(const ModelLabels& model, bool top1, bool top5);
  // tern_shadow_comparisons_total{model,version,scheme,result=agree|disagree},
  // tern_shadow_divergence_nats{model,version,scheme} histogram; more than 100 nats count as 100.
  void Shadow(const ModelLabels& model, bool agree, double divergence);
  // tern_shadow_dropped_total{reason}: backlog, contended, no_float, failed
  void ShadowDropped(absl::string_view reason);
  // tern_live_*{model,version,scheme}; no value: no series.
  void Live(const ModelLabels& model, LiveFigure figure, std::optional<double> value);
  // tern_live_at_limit_ratio{model,version,scheme,layer}; no value: no series.
  void LiveAtLimit(const ModelLabels& model, absl::string_view layer, std::optional<double> value);
  // tern_drift_reference_info{model,version,scheme,images_of=evaluation|calibration|first_answers}
  void DriftReference(const ModelLabels& model, absl::string_view images_of);

  // `refresh` is called at the start of every collection, for figures that change with time alone.
  // It may call everything but these two functions and Render(). RemoveRefresh() returns when it is
  // not running and will not run again.
  int AddRefresh(std::function<void()> refresh);
  void RemoveRefresh(int id);
  // tern_prediction_confidence{model,version} histogram of the best class's probability
  void Confidence(const ModelLabels& model, double probability);
  // tern_fallbacks_total{reason}: a slower or float path was taken (also logged once)
  void Fallback(absl::string_view reason);

  // tern_model_info{model,version,scheme,isa,default}=1, tern_model_ready, tern_model_bytes; and
  // the report's gauges.
  void ModelLoaded(const ModelLabels& model, absl::string_view isa, uint64_t bytes, bool is_default,
                   const ReportGauges& report);
  void ModelUnavailable(const ModelLabels& model);
  // tern_model_self_test{model,version,isa}: whether the stored images gave the stored answers when
  // the version was loaded last. ModelLoaded and ModelUnavailable remove it: call it after them.
  void ModelSelfTest(const ModelLabels& model, absl::string_view isa, bool passed);
  // Removes every series of the version (unloaded or deleted), counters and histograms too:
  // versions come and go while the server runs. What is told of it afterwards (a request or a label
  // that was under way) is not counted, until ModelLoaded or ModelUnavailable. If it is loaded
  // again they start at 0, which rate() takes for a restart.
  void ModelRemoved(const ModelLabels& model);
  // Rewrites tern_model_info; does nothing for a version that is not loaded.
  void ModelDefault(const ModelLabels& model, bool is_default);

  // tern_watch_events_total{event}: loaded, load_failed, removed, remove_refused, default_moved,
  // default_refused, unreadable
  void WatchEvent(absl::string_view event);

  // tern_quantize_jobs_total{outcome=published|dry_run|rejected|failed|cancelled},
  // tern_quantize_seconds
  void QuantizeJob(absl::string_view outcome, absl::Duration duration);

  // tern_cpu_budget_threads, tern_build_info{version,isa,onednn}
  void Machine(int budget_threads, absl::string_view version, absl::string_view isa,
               absl::string_view onednn);

  // Every collection first refreshes the process and cgroup figures (CPU seconds, throttling,
  // resident bytes, descriptors and their limits).
  std::shared_ptr<prometheus::Registry> registry() const;
  // The text that /metrics serves (Prometheus text format 0.0.4); with `only`, no other metrics
  // than these.
  std::string Render(const std::set<std::string>& only = {});

  // Name and help of every metric, for the documentation test.
  static std::vector<std::pair<std::string, std::string>> Catalogue();

 private:
  struct Impl;
  std::unique_ptr<Impl> impl_;
};

}  // namespace tern::metrics

#endif  // TERN_SERVER_METRICS_METRICS_H_
