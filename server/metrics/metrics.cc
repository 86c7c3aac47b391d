#include "server/metrics/metrics.h"

#include <sys/resource.h>
#include <unistd.h>

#include <algorithm>
#include <cmath>
#include <deque>
#include <filesystem>
#include <fstream>
#include <functional>
#include <initializer_list>
#include <iterator>
#include <map>
#include <mutex>
#include <shared_mutex>
#include <sstream>
#include <system_error>
#include <unordered_map>
#include <unordered_set>
#include <utility>

#include "absl/strings/str_cat.h"
#include "absl/time/clock.h"
#include "prometheus/counter.h"
#include "prometheus/family.h"
#include "prometheus/gauge.h"
#include "prometheus/histogram.h"
#include "prometheus/registry.h"
#include "prometheus/text_serializer.h"
#include "server/base/cpu_budget.h"
#include "server/base/log.h"
#include "server/base/memory_limit.h"
#include "server/metrics/access_metrics.h"

namespace tern::metrics {
namespace {

using prometheus::Counter;
using prometheus::Family;
using prometheus::Gauge;
using prometheus::Histogram;
using Buckets = Histogram::BucketBoundaries;

struct Spec {
  const char* name;
  const char* help;
};

constexpr Spec kRequests{"tern_requests_total", "Finished RPCs by method and gRPC status code."};
constexpr Spec kRequestDuration{"tern_request_duration_seconds",
                                "Time from the arrival of an RPC to its end, all outcomes."};
constexpr Spec kStreamRequests{"tern_stream_requests_total",
                               "Requests inside streams by method and gRPC status code."};
constexpr Spec kInFlight{"tern_inflight_requests", "RPCs that have started and not ended."};
constexpr Spec kStageDuration{
    "tern_stage_duration_seconds",
    "Time of one stage of a classification: decode, preprocess, queue, inference, "
    "postprocess."};
constexpr Spec kLayerDuration{"tern_layer_duration_seconds",
                              "Time of one layer in the batches that are profiled."};
constexpr Spec kBatchSize{"tern_batch_size", "Images per executed batch."};
constexpr Spec kBatchLearned{"tern_batch_learned_seconds",
                             "What a batch of this size takes, as the scheduler has learned it."};
constexpr Spec kBatchLimit{"tern_batch_limit", "Most images per batch, as configured or chosen."};
constexpr Spec kBatchDelay{
    "tern_batch_delay_seconds",
    "How long a batch that is not full waits for company, as configured or chosen."};
constexpr Spec kImages{"tern_images_total", "Images that went through the network."};
constexpr Spec kVersionRequests{
    "tern_version_requests_total",
    "Requests that a version took, by gRPC status code; an image of a stream is a request."};
constexpr Spec kVersionRequestDuration{
    "tern_version_request_duration_seconds",
    "Time from the arrival of a request to its answer by a version, successful requests only."};
constexpr Spec kQueueDepth{"tern_queue_depth", "Images that wait for a batch."};
constexpr Spec kDecodeQueueDepth{"tern_decode_queue_depth", "Images that wait to be decoded."};
constexpr Spec kWaitingImages{"tern_waiting_images",
                              "Images that were admitted and not yet answered."};
constexpr Spec kWaitingBytes{"tern_waiting_bytes",
                             "Bytes that admitted images hold: encoded, and as network input."};
constexpr Spec kClients{"tern_clients", "Clients with admitted images."};
constexpr Spec kBrownoutLevel{"tern_brownout_level",
                              "Steps from the default version down to faster ones under overload."};
constexpr Spec kDegraded{"tern_degraded_total",
                         "Answers of another version than the default, which the request allowed."};
constexpr Spec kRejected{
    "tern_rejected_total",
    "Requests refused before inference: queue_full, client_limit, waiting_bytes, deadline, "
    "cancelled, too_large, bad_image, draining."};
constexpr Spec kRefusedConnections{
    "tern_refused_connections_total",
    "Connections that were closed at once because the process has too many."};
constexpr Spec kLabelled{
    "tern_labelled_predictions_total",
    "Predictions whose true label is known: top1 = the first class was right, top5 = one of "
    "the next four, miss = none."};
constexpr Spec kShadow{"tern_shadow_comparisons_total",
                       "Live images run again on the float version: does the best class agree."};
constexpr Spec kShadowDivergence{"tern_shadow_divergence_nats",
                                 "Kullback-Leibler divergence of the outputs of a live image from "
                                 "the float version's, in nats."};
constexpr Spec kShadowDropped{
    "tern_shadow_dropped_total",
    "Sampled images that were not compared: backlog, contended, no_float, failed."};
// In the order of LiveFigure.
constexpr Spec kLive[] = {
    {"tern_live_labels", "Labels in the window of the live accuracy."},
    {"tern_live_top1_ratio", "Share of the labels in the window that were the best class."},
    {"tern_live_top1_ratio_low", "Lower end of the 95 % Wilson interval of tern_live_top1_ratio."},
    {"tern_live_top1_ratio_high", "Upper end of the 95 % Wilson interval of tern_live_top1_ratio."},
    {"tern_live_top5_ratio", "Share of the labels in the window that were among the five best."},
    {"tern_live_top5_ratio_low", "Lower end of the 95 % Wilson interval of tern_live_top5_ratio."},
    {"tern_live_top5_ratio_high", "Upper end of the 95 % Wilson interval of tern_live_top5_ratio."},
    {"tern_live_comparisons", "Shadow comparisons in the window of the live agreement."},
    {"tern_live_agreement_ratio",
     "Share of the shadow comparisons in the window whose best class is the float version's."},
    {"tern_live_agreement_ratio_low",
     "Lower end of the 95 % Wilson interval of tern_live_agreement_ratio."},
    {"tern_live_agreement_ratio_high",
     "Upper end of the 95 % Wilson interval of tern_live_agreement_ratio."},
    {"tern_live_images", "Answers in the window of the drift figures."},
    {"tern_live_confidence_mean",
     "Mean probability of the best class of the answers in the window."},
    {"tern_live_entropy_mean",
     "Mean entropy of the probabilities of the answers in the window, in nats."},
    {"tern_live_class_mix_psi",
     "Population stability index of the best classes in the window against the reference."},
    {"tern_live_at_limit_excess",
     "Largest excess over the layers of tern_live_at_limit_ratio over the share in calibration."},
    {"tern_drift_reference_images",
     "Answers that the drift figures are compared with; 0 = none yet."},
    {"tern_drift_reference_confidence_mean",
     "Mean probability of the best class in the reference."},
    {"tern_drift_reference_entropy_mean",
     "Mean entropy of the probabilities in the reference, in nats."},
};
static_assert(std::size(kLive) == static_cast<size_t>(LiveFigure::kCount));
constexpr Spec kLiveAtLimit{"tern_live_at_limit_ratio",
                            "Share of a layer's output codes at an end of the 8-bit range, in the "
                            "batches that were counted."};
constexpr Spec kDriftReference{
    "tern_drift_reference_info",
    "1, with the images that the drift figures are compared with: evaluation, calibration, "
    "first_answers."};
constexpr Spec kConfidence{"tern_prediction_confidence", "Probability of the best class."};
constexpr Spec kFallbacks{"tern_fallbacks_total",
                          "A slower, float or replacement path was taken, by reason."};
constexpr Spec kModelInfo{
    "tern_model_info",
    "1 for every version in memory, with its instruction set and whether it is the default."};
constexpr Spec kModelReady{"tern_model_ready",
                           "1 if the version serves, 0 if it cannot be loaded."};
constexpr Spec kModelSelfTest{
    "tern_model_self_test",
    "1 if the version's stored images gave the stored answers when it was loaded last, 0 if not."};
constexpr Spec kModelBytes{"tern_model_bytes", "Bytes of the version's packed weights in memory."};
constexpr Spec kTop1Ratio{
    "tern_quantization_top1_ratio",
    "Top-1 accuracy of the quantised network divided by the float one's, on the evaluation "
    "images of its report."};
constexpr Spec kTop1Agreement{
    "tern_quantization_top1_agreement",
    "Share of the report's evaluation images whose best class equals the float network's."};
constexpr Spec kTop1{"tern_quantization_top1",
                     "Top-1 accuracy on the evaluation images of the report."};
constexpr Spec kTop1Low{"tern_quantization_top1_low",
                        "Lower end of the report's 95 % interval of tern_quantization_top1."};
constexpr Spec kTop1AgreementLow{
    "tern_quantization_top1_agreement_low",
    "Lower end of the report's 95 % interval of tern_quantization_top1_agreement."};
constexpr Spec kSqnr{
    "tern_quantization_sqnr_db",
    "Signal to quantisation noise of a layer's output against the float network, in decibels."};
constexpr Spec kClipped{"tern_activation_clipped_ratio",
                        "Share of a layer's calibration outputs outside the 8-bit range."};
constexpr Spec kAtLimit{
    "tern_activation_at_limit_ratio",
    "Share of a layer's output codes at an end of the 8-bit range, on the calibration images."};
constexpr Spec kWatchEvents{
    "tern_watch_events_total",
    "What the watch of the repository's folder did: loaded, load_failed, removed, remove_refused, "
    "default_moved, default_refused, unreadable."};
constexpr Spec kQuantizeJobs{
    "tern_quantize_jobs_total",
    "Quantisation jobs by outcome: published, dry_run, rejected, failed, cancelled."};
constexpr Spec kQuantizeSeconds{"tern_quantize_seconds",
                                "Time of one quantisation job, all outcomes."};
constexpr Spec kBudget{"tern_cpu_budget_threads",
                       "CPUs that the server uses (affinity and cgroup quota)."};
constexpr Spec kBuildInfo{"tern_build_info",
                          "1, with the versions of Tern and oneDNN and the instruction set."};
constexpr Spec kProcessCpu{"process_cpu_seconds_total", "User and system CPU time of the process."};
constexpr Spec kProcessRss{"process_resident_memory_bytes", "Resident memory of the process."};
constexpr Spec kProcessFds{"process_open_fds", "Open file descriptors of the process."};
constexpr Spec kProcessMaxFds{"process_max_fds", "Most file descriptors that the process may open."};
constexpr Spec kProcessStart{"process_start_time_seconds",
                             "When the process started, seconds since 1970."};
constexpr Spec kMemoryLimit{"tern_memory_limit_bytes",
                            "Memory that the server may use: the cgroup's limit, or the machine's."};
constexpr Spec kPeriods{"tern_cgroup_periods_total",
                        "Scheduling periods in which the cgroup ran and had a CPU quota."};
constexpr Spec kThrottledPeriods{
    "tern_cgroup_throttled_periods_total",
    "Scheduling periods in which the cgroup ran out of its CPU quota."};
constexpr Spec kThrottledSeconds{
    "tern_cgroup_throttled_seconds_total",
    "Time for which the cgroup's threads were held back by its CPU quota."};

constexpr const Spec* kSpecs[] = {
    &kRequests,         &kRequestDuration,  &kInFlight,      &kStageDuration,  &kLayerDuration,
    &kBatchSize,        &kBatchLearned,     &kBatchLimit,    &kBatchDelay,     &kImages,
    &kQueueDepth,       &kDecodeQueueDepth, &kWaitingImages, &kWaitingBytes,   &kClients,
    &kBrownoutLevel,    &kDegraded,         &kRejected,      &kLabelled,       &kShadow,
    &kShadowDivergence, &kShadowDropped,    &kLiveAtLimit,   &kDriftReference, &kConfidence,
    &kFallbacks,        &kModelInfo,        &kModelReady,    &kModelBytes,     &kTop1Ratio,
    &kTop1Agreement,    &kTop1AgreementLow, &kTop1,          &kTop1Low,        &kSqnr,
    &kClipped,          &kAtLimit,          &kWatchEvents,   &kQuantizeJobs,   &kQuantizeSeconds,
    &kBudget,           &kBuildInfo,        &kProcessCpu,    &kProcessRss,     &kProcessFds,
    &kThrottledPeriods, &kThrottledSeconds,
    &kRefusedConnections, &kVersionRequests, &kVersionRequestDuration, &kModelSelfTest,
    &kProcessMaxFds, &kProcessStart, &kMemoryLimit, &kPeriods, &kStreamRequests,
};

// Five per decade (x1.585) from 0.25 ms to 2.5 s: a percentile read from them is within 30 %.
const Buckets& LatencyBuckets() {
  static const Buckets* buckets = new Buckets{
      0.00025, 0.0004, 0.00063, 0.001, 0.0016, 0.0025, 0.004, 0.0063, 0.01, 0.016, 0.025,
      0.04,    0.063,  0.1,     0.16,  0.25,   0.4,    0.63,  1.0,    1.6,  2.5};
  return *buckets;
}

// More layers than any known network has; a report is data from outside and each costs a series.
constexpr size_t kMaxLayerSeries = 1024;

const char* StageName(Stage stage) {
  switch (stage) {
    case Stage::kDecode:
      return "decode";
    case Stage::kPreprocess:
      return "preprocess";
    case Stage::kQueue:
      return "queue";
    case Stage::kInference:
      return "inference";
    case Stage::kPostprocess:
      return "postprocess";
  }
  return "?";
}

// Bytes that are not UTF-8 become '?': Prometheus refuses a whole scrape for one of them.
std::string Utf8(absl::string_view text) {
  std::string out;
  out.reserve(text.size());
  for (size_t i = 0; i < text.size();) {
    const unsigned char lead = text[i];
    const size_t length = lead < 0x80                   ? 1
                          : lead >= 0xc2 && lead < 0xe0 ? 2
                          : lead >= 0xe0 && lead < 0xf0 ? 3
                          : lead >= 0xf0 && lead < 0xf5 ? 4
                                                        : 0;
    bool valid = length > 0 && i + length <= text.size();
    for (size_t k = 1; valid && k < length; ++k)
      valid = (static_cast<unsigned char>(text[i + k]) & 0xc0) == 0x80;
    if (valid && length >= 3) {
      const unsigned char second = text[i + 1];  // overlong forms, surrogates, beyond U+10FFFF
      valid = !(lead == 0xe0 && second < 0xa0) && !(lead == 0xed && second >= 0xa0) &&
              !(lead == 0xf0 && second < 0x90) && !(lead == 0xf4 && second >= 0x90);
    }
    if (valid) {
      out.append(text.data() + i, length);
      i += length;
    } else {
      out.push_back('?');
      ++i;
    }
  }
  return out;
}

// Seconds, kept finite so that one bad measurement cannot spoil a sum for good.
double Seconds(absl::Duration duration) {
  return std::clamp(absl::ToDoubleSeconds(duration), 0.0, 1e6);
}

constexpr char kSeparator = '\x1f';

// Versions that were removed. Whoever still works for one (a decode in flight, a label that comes
// late) must not bring its series back: nothing would remove them again. Bounded: the versions that
// were removed longest ago are forgotten, and nothing works for those any more. Thread safe; who
// asks does not wait for others that ask.
class Removed {
 public:
  void Add(absl::string_view model, absl::string_view version) {
    std::string key = KeyOf(model, version);
    std::unique_lock<std::shared_mutex> lock(mutex_);
    if (!keys_.insert(key).second) return;
    order_.push_back(std::move(key));
    if (order_.size() > kMost) {
      keys_.erase(order_.front());
      order_.pop_front();
    }
  }
  void Erase(absl::string_view model, absl::string_view version) {
    const std::string key = KeyOf(model, version);
    std::unique_lock<std::shared_mutex> lock(mutex_);
    if (keys_.erase(key) > 0) order_.erase(std::find(order_.begin(), order_.end(), key));
  }
  // Of the series whose key this is.
  bool Holds(absl::string_view series_key) const {
    const size_t end = series_key.find(kSeparator, series_key.find(kSeparator) + 1);
    std::shared_lock<std::shared_mutex> lock(mutex_);
    return keys_.count(std::string(series_key.substr(0, end + 1))) > 0;
  }

 private:
  static constexpr size_t kMost = 4096;
  static std::string KeyOf(absl::string_view model, absl::string_view version) {
    return absl::StrCat(model, absl::string_view(&kSeparator, 1), version,
                        absl::string_view(&kSeparator, 1));
  }
  mutable std::shared_mutex mutex_;
  std::unordered_set<std::string> keys_;
  std::deque<std::string> order_;
};

// One metric family and its series, found by label values. A hit costs a shared lock and one hash
// lookup; `use` runs under the lock, so a series cannot be removed under it. Thread safe.
template <typename T>
class Series {
 public:
  // Label names in the order in which values are given. `buckets` only for histograms.
  Series(prometheus::Registry& registry, const Spec& spec, std::vector<std::string> names,
         Buckets buckets = {})
      : family_(Build(registry, spec)), names_(std::move(names)), buckets_(std::move(buckets)) {}
  // Of model versions, whose first two values are the model and the version. `removed` outlives
  // this.
  Series(prometheus::Registry& registry, const Spec& spec, std::vector<std::string> names,
         const Removed& removed, Buckets buckets = {})
      : Series(registry, spec, std::move(names), std::move(buckets)) {
    removed_ = &removed;
  }

  template <typename Use>
  void With(std::initializer_list<absl::string_view> values, Use use) {
    std::string key;
    for (absl::string_view value : values) {
      key.append(value.data(), value.size());
      key.push_back(kSeparator);
    }
    {
      std::shared_lock<std::shared_mutex> lock(mutex_);
      const auto found = children_.find(key);
      if (found != children_.end()) return use(*found->second);
    }
    prometheus::Labels labels;
    size_t i = 0;
    for (absl::string_view value : values) labels[names_[i++]] = Utf8(value);
    std::unique_lock<std::shared_mutex> lock(mutex_);
    if (removed_ != nullptr && removed_->Holds(key)) return;
    T*& child = children_[std::move(key)];
    if (child == nullptr) child = Add(labels);
    use(*child);
  }

  // Removes the series whose first label values are these.
  void Remove(std::initializer_list<absl::string_view> first) {
    std::string prefix;
    for (absl::string_view value : first) {
      prefix.append(value.data(), value.size());
      prefix.push_back(kSeparator);
    }
    std::unique_lock<std::shared_mutex> lock(mutex_);
    for (auto it = children_.begin(); it != children_.end();) {
      if (it->first.compare(0, prefix.size(), prefix) == 0) {
        T* child = it->second;
        it = children_.erase(it);
        // Two keys may share a series if they differ only in bytes that Utf8() replaced.
        const bool shared =
            std::any_of(children_.begin(), children_.end(),
                        [child](const auto& other) { return other.second == child; });
        if (!shared) family_.Remove(child);
      } else {
        ++it;
      }
    }
  }

 private:
  static Family<T>& Build(prometheus::Registry& registry, const Spec& spec) {
    if constexpr (std::is_same_v<T, Counter>) {
      return prometheus::BuildCounter().Name(spec.name).Help(spec.help).Register(registry);
    } else if constexpr (std::is_same_v<T, Gauge>) {
      return prometheus::BuildGauge().Name(spec.name).Help(spec.help).Register(registry);
    } else {
      return prometheus::BuildHistogram().Name(spec.name).Help(spec.help).Register(registry);
    }
  }
  T* Add(const prometheus::Labels& labels) {
    if constexpr (std::is_same_v<T, Histogram>) {
      return &family_.Add(labels, buckets_);
    } else {
      return &family_.Add(labels);
    }
  }

  Family<T>& family_;
  const std::vector<std::string> names_;
  const Buckets buckets_;
  const Removed* removed_ = nullptr;
  std::shared_mutex mutex_;
  std::unordered_map<std::string, T*> children_;
};

// Refreshes the process's own figures before every collection, so that whoever scrapes it (the
// exposer, Render) sees current ones.
class SelfRefreshingRegistry final : public prometheus::Registry {
 public:
  SelfRefreshingRegistry()
      : cpu_(prometheus::BuildCounter()
                 .Name(kProcessCpu.name)
                 .Help(kProcessCpu.help)
                 .Register(*this)
                 .Add({})),
        periods_(prometheus::BuildCounter()
                     .Name(kPeriods.name)
                     .Help(kPeriods.help)
                     .Register(*this)
                     .Add({})),
        throttled_periods_(prometheus::BuildCounter()
                               .Name(kThrottledPeriods.name)
                               .Help(kThrottledPeriods.help)
                               .Register(*this)
                               .Add({})),
        throttled_(prometheus::BuildCounter()
                       .Name(kThrottledSeconds.name)
                       .Help(kThrottledSeconds.help)
                       .Register(*this)
                       .Add({})),
        resident_(prometheus::BuildGauge()
                      .Name(kProcessRss.name)
                      .Help(kProcessRss.help)
                      .Register(*this)
                      .Add({})),
        fds_(prometheus::BuildGauge()
                 .Name(kProcessFds.name)
                 .Help(kProcessFds.help)
                 .Register(*this)
                 .Add({})),
        max_fds_(prometheus::BuildGauge()
                     .Name(kProcessMaxFds.name)
                     .Help(kProcessMaxFds.help)
                     .Register(*this)
                     .Add({})),
        memory_limit_(prometheus::BuildGauge()
                          .Name(kMemoryLimit.name)
                          .Help(kMemoryLimit.help)
                          .Register(*this)
                          .Add({})) {
    prometheus::BuildGauge()
        .Name(kProcessStart.name)
        .Help(kProcessStart.help)
        .Register(*this)
        .Add({})
        .Set(absl::ToDoubleSeconds(absl::Now() - absl::UnixEpoch()));  // made at the start
  }

  int AddRefresh(std::function<void()> refresh) {
    std::lock_guard<std::mutex> lock(refresh_mutex_);
    refresh_.emplace(++last_refresh_, std::move(refresh));
    return last_refresh_;
  }
  // Waits for a collection that is running it.
  void RemoveRefresh(int id) {
    std::lock_guard<std::mutex> lock(refresh_mutex_);
    refresh_.erase(id);
  }

  std::vector<prometheus::MetricFamily> Collect() const override {
    Refresh();
    {
      std::lock_guard<std::mutex> lock(refresh_mutex_);
      for (const auto& item : refresh_) item.second();
    }
    return prometheus::Registry::Collect();
  }

  void Refresh() const {
    rusage usage{};
    ::getrusage(RUSAGE_SELF, &usage);
    const auto seconds = [](const timeval& t) {
      return static_cast<double>(t.tv_sec) + 1e-6 * t.tv_usec;
    };
    const CpuThrottling throttling = ReadCpuThrottling();
    uint64_t total_pages = 0, resident_pages = 0;
    std::ifstream("/proc/self/statm") >> total_pages >> resident_pages;
    std::error_code error;
    const std::filesystem::directory_iterator descriptors("/proc/self/fd", error);
    const auto open = error ? 0 : std::distance(std::filesystem::begin(descriptors), {});

    rlimit descriptor_limit{};
    ::getrlimit(RLIMIT_NOFILE, &descriptor_limit);
    const uint64_t memory_limit = ReadMemoryLimit();

    std::lock_guard<std::mutex> lock(mutex_);
    RaiseTo(cpu_, seconds(usage.ru_utime) + seconds(usage.ru_stime));
    RaiseTo(periods_, throttling.periods);
    RaiseTo(throttled_periods_, throttling.throttled_periods);
    RaiseTo(throttled_, throttling.throttled_seconds);
    resident_.Set(static_cast<double>(resident_pages) *
                  static_cast<double>(::sysconf(_SC_PAGESIZE)));
    fds_.Set(static_cast<double>(open));
    max_fds_.Set(static_cast<double>(descriptor_limit.rlim_cur));
    memory_limit_.Set(static_cast<double>(memory_limit));
  }

 private:
  static void RaiseTo(Counter& counter, double value) {
    if (value > counter.Value()) counter.Increment(value - counter.Value());
  }

  mutable std::mutex refresh_mutex_;
  std::map<int, std::function<void()>> refresh_;
  int last_refresh_ = 0;
  mutable std::mutex mutex_;
  Counter& cpu_;
  Counter& periods_;
  Counter& throttled_periods_;
  Counter& throttled_;
  Gauge& resident_;
  Gauge& fds_;
  Gauge& max_fds_;
  Gauge& memory_limit_;
};

void Increment(Counter& counter) { counter.Increment(); }

}  // namespace

struct Metrics::Impl {
  std::shared_ptr<SelfRefreshingRegistry> registry = std::make_shared<SelfRefreshingRegistry>();
  prometheus::Registry& r = *registry;

  Series<Counter> requests{r, kRequests, {"method", "code"}};
  Series<Histogram> request_duration{r, kRequestDuration, {"method"}, LatencyBuckets()};
  Series<Counter> stream_requests{r, kStreamRequests, {"method", "code"}};
  Series<Gauge> inflight{r, kInFlight, {"method"}};
  // Series of a model version start with these two labels: ModelRemoved finds them by prefix.
  Removed gone;
  Series<Histogram> stage{r, kStageDuration, {"model", "version", "stage"}, gone, LatencyBuckets()};
  Series<Histogram> layer{
      r,
      kLayerDuration,
      {"model", "version", "layer"},
      gone,
      {1e-5, 2e-5, 5e-5, 1e-4, 2e-4, 5e-4, 1e-3, 2e-3, 5e-3, 1e-2, 2e-2, 5e-2, 0.1, 0.2, 0.5}};
  Series<Histogram> batch_size{
      r, kBatchSize, {"model", "version"}, gone, {1, 2, 4, 8, 16, 32, 64, 128}};
  Series<Gauge> batch_learned{r, kBatchLearned, {"model", "version", "batch_size"}, gone};
  Series<Gauge> batch_limit{r, kBatchLimit, {"model", "version"}, gone};
  Series<Gauge> batch_delay{r, kBatchDelay, {"model", "version"}, gone};
  Series<Counter> images{r, kImages, {"model", "version", "scheme"}, gone};
  Series<Counter> version_requests{r, kVersionRequests, {"model", "version", "code"}, gone};
  Series<Histogram> version_duration{
      r, kVersionRequestDuration, {"model", "version"}, gone, LatencyBuckets()};
  Series<Gauge> queue_depth{r, kQueueDepth, {"model", "version"}, gone};
  Series<Counter> rejected{r, kRejected, {"reason"}};
  Series<Counter> refused_connections{r, kRefusedConnections, {"port"}};
  Series<Counter> labelled{r, kLabelled, {"model", "version", "scheme", "result"}, gone};
  Series<Counter> shadow{r, kShadow, {"model", "version", "scheme", "result"}, gone};
  Series<Histogram> divergence{r,
                               kShadowDivergence,
                               {"model", "version", "scheme"},
                               gone,
                               {1e-4, 3e-4, 1e-3, 3e-3, 0.01, 0.03, 0.1, 0.3, 1, 3, 10}};
  Series<Counter> shadow_dropped{r, kShadowDropped, {"reason"}};
  std::deque<Series<Gauge>> live;  // by LiveFigure
  Series<Gauge> live_at_limit{r, kLiveAtLimit, {"model", "version", "scheme", "layer"}, gone};
  Series<Gauge> drift_reference{
      r, kDriftReference, {"model", "version", "scheme", "images_of"}, gone};
  Series<Histogram> confidence{r,
                               kConfidence,
                               {"model", "version"},
                               gone,
                               {0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.99, 0.999}};
  Series<Gauge> decode_queue_depth{r, kDecodeQueueDepth, {}};
  Series<Gauge> waiting_images{r, kWaitingImages, {}};
  Series<Gauge> waiting_bytes{r, kWaitingBytes, {}};
  Series<Gauge> clients{r, kClients, {}};
  Series<Gauge> brownout_level{r, kBrownoutLevel, {"model"}};
  // `to` before `from`: a series goes with the version that answered.
  Series<Counter> degraded{r, kDegraded, {"model", "to", "from"}, gone};
  Series<Counter> fallbacks{r, kFallbacks, {"reason"}};
  Series<Gauge> model_info{r, kModelInfo, {"model", "version", "scheme", "isa", "default"}, gone};
  Series<Gauge> model_ready{r, kModelReady, {"model", "version"}, gone};
  Series<Gauge> model_self_test{r, kModelSelfTest, {"model", "version", "isa"}, gone};
  Series<Gauge> model_bytes{r, kModelBytes, {"model", "version", "scheme"}, gone};
  Series<Gauge> top1_ratio{r, kTop1Ratio, {"model", "version", "scheme"}, gone};
  Series<Gauge> top1_agreement{r, kTop1Agreement, {"model", "version", "scheme"}, gone};
  Series<Gauge> top1_agreement_low{r, kTop1AgreementLow, {"model", "version", "scheme"}, gone};
  Series<Gauge> top1{r, kTop1, {"model", "version", "scheme"}, gone};
  Series<Gauge> top1_low{r, kTop1Low, {"model", "version", "scheme"}, gone};
  Series<Gauge> sqnr{r, kSqnr, {"model", "version", "scheme", "layer"}, gone};
  Series<Gauge> clipped{r, kClipped, {"model", "version", "scheme", "layer"}, gone};
  Series<Gauge> at_limit{r, kAtLimit, {"model", "version", "scheme", "layer"}, gone};
  Series<Counter> watch_events{r, kWatchEvents, {"event"}};
  Series<Counter> quantize_jobs{r, kQuantizeJobs, {"outcome"}};
  Series<Histogram> quantize_seconds{
      r, kQuantizeSeconds, {}, {0.5, 1, 2, 5, 10, 20, 30, 60, 120, 300, 600, 1200, 1800, 3600}};
  Series<Gauge> budget{r, kBudget, {}};
  Series<Gauge> build_info{r, kBuildInfo, {"version", "isa", "onednn"}};

  // The instruction set of every loaded version: ModelDefault writes tern_model_info anew. Held
  // over the whole of a change, so that two changes of one version do not mix.
  std::mutex models_mutex;
  std::map<std::pair<std::string, uint64_t>, std::string> isa_of;

  Impl() {
    for (const Spec& spec : kLive) {
      live.emplace_back(r, spec, std::vector<std::string>{"model", "version", "scheme"}, gone);
    }
  }

  void RemoveGauges(absl::string_view model, absl::string_view version) {
    for (Series<Gauge>* gauge :
         {&model_info, &model_ready, &model_self_test, &model_bytes, &top1_ratio, &top1_agreement,
          &top1_agreement_low, &top1, &top1_low, &sqnr, &clipped, &at_limit}) {
      gauge->Remove({model, version});
    }
  }
};

Metrics::Metrics() : impl_(std::make_unique<Impl>()) {
  // Known reasons start at 0: rate() misses the first event of a series that appears with it.
  for (const char* reason : {"queue_full", "client_limit", "waiting_bytes", "deadline", "cancelled",
                             "too_large", "bad_image", "draining"}) {
    impl_->rejected.With({reason}, [](Counter&) {});
  }
  for (const char* reason : {"backlog", "contended", "no_float", "failed"}) {
    impl_->shadow_dropped.With({reason}, [](Counter&) {});
  }
  for (const char* event : {"loaded", "load_failed", "removed", "remove_refused", "default_moved",
                            "default_refused", "unreadable"}) {
    impl_->watch_events.With({event}, [](Counter&) {});
  }
  for (const char* reason : {"default_pointer", "drift_reference", "float_island",
                             "stale_certificate", "stale_tokens"}) {
    impl_->fallbacks.With({reason}, [](Counter&) {});
  }
  for (const char* port : {"data", "admin"}) {
    impl_->refused_connections.With({port}, [](Counter&) {});
  }
  for (const char* outcome : {"published", "dry_run", "rejected", "failed", "cancelled"}) {
    impl_->quantize_jobs.With({outcome}, [](Counter&) {});
  }
}

Metrics::~Metrics() = default;

void Metrics::Request(absl::string_view method, absl::string_view code, absl::Duration duration) {
  impl_->requests.With({method, code}, Increment);
  impl_->request_duration.With({method}, [&](Histogram& h) { h.Observe(Seconds(duration)); });
}

void Metrics::StreamRequest(absl::string_view method, absl::string_view code) {
  impl_->stream_requests.With({method, code}, Increment);
}

void Metrics::InFlight(absl::string_view method, int delta) {
  impl_->inflight.With({method}, [&](Gauge& g) { g.Increment(delta); });
}

void Metrics::StageTime(Stage stage, const ModelLabels& model, absl::Duration duration) {
  const absl::AlphaNum version(model.version);
  impl_->stage.With({model.model, version.Piece(), StageName(stage)},
                    [&](Histogram& h) { h.Observe(Seconds(duration)); });
}

void Metrics::LayerTime(const ModelLabels& model, absl::string_view layer,
                        absl::Duration duration) {
  const absl::AlphaNum version(model.version);
  impl_->layer.With({model.model, version.Piece(), layer},
                    [&](Histogram& h) { h.Observe(Seconds(duration)); });
}

void Metrics::Batch(const ModelLabels& model, int images) {
  const absl::AlphaNum version(model.version);
  impl_->batch_size.With({model.model, version.Piece()}, [&](Histogram& h) { h.Observe(images); });
  impl_->images.With({model.model, version.Piece(), model.scheme},
                     [&](Counter& c) { c.Increment(images); });
}

void Metrics::BatchLearned(const ModelLabels& model, int images, absl::Duration time, int limit,
                           absl::Duration delay) {
  const absl::AlphaNum version(model.version), size(images);
  impl_->batch_learned.With({model.model, version.Piece(), size.Piece()},
                            [&](Gauge& g) { g.Set(Seconds(time)); });
  impl_->batch_limit.With({model.model, version.Piece()}, [&](Gauge& g) { g.Set(limit); });
  impl_->batch_delay.With({model.model, version.Piece()}, [&](Gauge& g) { g.Set(Seconds(delay)); });
}

void Metrics::VersionRequest(const ModelLabels& model, absl::string_view code,
                             absl::Duration duration) {
  const absl::AlphaNum version(model.version);
  impl_->version_requests.With({model.model, version.Piece(), code}, Increment);
  if (code != "OK") return;
  impl_->version_duration.With({model.model, version.Piece()},
                               [&](Histogram& h) { h.Observe(Seconds(duration)); });
}

void Metrics::QueueDepth(const ModelLabels& model, int depth) {
  const absl::AlphaNum version(model.version);
  impl_->queue_depth.With({model.model, version.Piece()}, [&](Gauge& g) { g.Set(depth); });
}

void Metrics::Waiting(int64_t bytes, int64_t images, int64_t clients) {
  const auto set = [](int64_t value) {
    return [value](Gauge& g) { g.Set(static_cast<double>(value)); };
  };
  impl_->waiting_bytes.With({}, set(bytes));
  impl_->waiting_images.With({}, set(images));
  impl_->clients.With({}, set(clients));
}

void Metrics::DecodeQueueDepth(int depth) {
  impl_->decode_queue_depth.With({}, [&](Gauge& g) { g.Set(depth); });
}

void Metrics::BrownoutLevel(absl::string_view model, int level) {
  impl_->brownout_level.With({model}, [&](Gauge& g) { g.Set(level); });
}

void Metrics::Degraded(absl::string_view model, uint64_t from, uint64_t to) {
  const absl::AlphaNum from_version(from), to_version(to);
  impl_->degraded.With({model, to_version.Piece(), from_version.Piece()}, Increment);
}

void Metrics::Rejected(absl::string_view reason) { impl_->rejected.With({reason}, Increment); }

void Metrics::RefusedConnection(absl::string_view port) {
  impl_->refused_connections.With({port}, Increment);
}

void Metrics::Labelled(const ModelLabels& model, bool top1, bool top5) {
  const absl::AlphaNum version(model.version);
  impl_->labelled.With({model.model, version.Piece(), model.scheme,
                        top1   ? "top1"
                        : top5 ? "top5"
                               : "miss"},
                       Increment);
}

void Metrics::Shadow(const ModelLabels& model, bool agree, double divergence) {
  const absl::AlphaNum version(model.version);
  impl_->shadow.With({model.model, version.Piece(), model.scheme, agree ? "agree" : "disagree"},
                     Increment);
  // Infinite if the version excludes a class by a logit that is no number; an infinite or NaN value
  // would spoil the histogram's sum for good.
  constexpr double kMost = 100;
  const double nats = std::isnan(divergence) ? kMost : std::clamp(divergence, 0.0, kMost);
  impl_->divergence.With({model.model, version.Piece(), model.scheme},
                         [&](Histogram& h) { h.Observe(nats); });
}

void Metrics::ShadowDropped(absl::string_view reason) {
  impl_->shadow_dropped.With({reason}, Increment);
}

void Metrics::Live(const ModelLabels& model, LiveFigure figure, std::optional<double> value) {
  const absl::AlphaNum version(model.version);
  Series<Gauge>& series = impl_->live[static_cast<size_t>(figure)];
  if (value.has_value()) {
    series.With({model.model, version.Piece(), model.scheme}, [&](Gauge& g) { g.Set(*value); });
  } else {
    series.Remove({model.model, version.Piece()});
  }
}

void Metrics::LiveAtLimit(const ModelLabels& model, absl::string_view layer,
                          std::optional<double> value) {
  const absl::AlphaNum version(model.version);
  if (value.has_value()) {
    impl_->live_at_limit.With({model.model, version.Piece(), model.scheme, layer},
                              [&](Gauge& g) { g.Set(*value); });
  } else {
    impl_->live_at_limit.Remove({model.model, version.Piece(), model.scheme, layer});
  }
}

void Metrics::DriftReference(const ModelLabels& model, absl::string_view images_of) {
  const absl::AlphaNum version(model.version);
  impl_->drift_reference.Remove({model.model, version.Piece()});
  impl_->drift_reference.With({model.model, version.Piece(), model.scheme, images_of},
                              [](Gauge& g) { g.Set(1); });
}

int Metrics::AddRefresh(std::function<void()> refresh) {
  return impl_->registry->AddRefresh(std::move(refresh));
}

void Metrics::RemoveRefresh(int id) { impl_->registry->RemoveRefresh(id); }

void Metrics::Confidence(const ModelLabels& model, double probability) {
  if (!std::isfinite(probability)) return;  // would make the histogram's sum NaN for good
  const absl::AlphaNum version(model.version);
  impl_->confidence.With({model.model, version.Piece()},
                         [&](Histogram& h) { h.Observe(probability); });
}

void Metrics::Fallback(absl::string_view reason) { impl_->fallbacks.With({reason}, Increment); }

void Metrics::ModelLoaded(const ModelLabels& model, absl::string_view isa, uint64_t bytes,
                          bool is_default, const ReportGauges& report) {
  const std::string version = absl::StrCat(model.version);
  const auto set = [](double value) { return [value](Gauge& g) { g.Set(value); }; };
  std::lock_guard<std::mutex> lock(impl_->models_mutex);
  impl_->gone.Erase(model.model, version);
  impl_->RemoveGauges(model.model, version);
  impl_->isa_of[{model.model, model.version}] = std::string(isa);
  impl_->model_info.With({model.model, version, model.scheme, isa, is_default ? "true" : "false"},
                         set(1));
  impl_->model_ready.With({model.model, version}, set(1));
  impl_->model_bytes.With({model.model, version, model.scheme}, set(static_cast<double>(bytes)));
  if (report.top1_ratio >= 0) {
    impl_->top1_ratio.With({model.model, version, model.scheme}, set(report.top1_ratio));
  }
  if (report.top1_agreement >= 0) {
    impl_->top1_agreement.With({model.model, version, model.scheme}, set(report.top1_agreement));
    impl_->top1_agreement_low.With({model.model, version, model.scheme},
                                   set(report.top1_agreement_low));
  }
  if (report.top1 >= 0) {
    impl_->top1.With({model.model, version, model.scheme}, set(report.top1));
    impl_->top1_low.With({model.model, version, model.scheme}, set(report.top1_low));
  }
  const auto layers = [&](Series<Gauge>& series,
                          const std::vector<std::pair<std::string, double>>& values) {
    if (values.size() > kMaxLayerSeries) {
      TERN_LOG_WARN("metrics of {} version {}: the first {} of {} layers", model.model, version,
                    kMaxLayerSeries, values.size());
    }
    for (size_t i = 0; i < std::min(values.size(), kMaxLayerSeries); ++i) {
      series.With({model.model, version, model.scheme, values[i].first}, set(values[i].second));
    }
  };
  layers(impl_->sqnr, report.layer_sqnr_db);
  layers(impl_->clipped, report.layer_clipped);
  layers(impl_->at_limit, report.layer_at_limit);
  // Counters of known labels start at 0, as in the constructor: the labels of a whole day may come
  // within one scrape interval.
  const auto present = [](Counter&) {};
  impl_->images.With({model.model, version, model.scheme}, present);
  impl_->version_requests.With({model.model, version, "OK"}, present);
  for (const char* result : {"top1", "top5", "miss"}) {
    impl_->labelled.With({model.model, version, model.scheme, result}, present);
  }
  for (const char* result : {"agree", "disagree"}) {
    impl_->shadow.With({model.model, version, model.scheme, result}, present);
  }
}

void Metrics::ModelUnavailable(const ModelLabels& model) {
  const std::string version = absl::StrCat(model.version);
  std::lock_guard<std::mutex> lock(impl_->models_mutex);
  impl_->RemoveGauges(model.model, version);
  impl_->isa_of.erase({model.model, model.version});
  impl_->gone.Erase(model.model, version);
  impl_->model_ready.With({model.model, version}, [](Gauge& g) { g.Set(0); });
}

void Metrics::ModelSelfTest(const ModelLabels& model, absl::string_view isa, bool passed) {
  const std::string version = absl::StrCat(model.version);
  std::lock_guard<std::mutex> lock(impl_->models_mutex);
  impl_->model_self_test.With({model.model, version, isa},
                              [passed](Gauge& g) { g.Set(passed ? 1 : 0); });
}

void Metrics::ModelRemoved(const ModelLabels& model) {
  const std::string version = absl::StrCat(model.version);
  std::lock_guard<std::mutex> lock(impl_->models_mutex);
  impl_->gone.Add(model.model, version);  // before its series go, see Series::With
  impl_->RemoveGauges(model.model, version);
  impl_->isa_of.erase({model.model, model.version});
  impl_->queue_depth.Remove({model.model, version});
  for (Series<Gauge>* gauge : {&impl_->batch_learned, &impl_->batch_limit, &impl_->batch_delay}) {
    gauge->Remove({model.model, version});
  }
  impl_->version_requests.Remove({model.model, version});
  impl_->version_duration.Remove({model.model, version});
  impl_->degraded.Remove({model.model, version});
  impl_->stage.Remove({model.model, version});
  impl_->layer.Remove({model.model, version});
  impl_->batch_size.Remove({model.model, version});
  impl_->confidence.Remove({model.model, version});
  impl_->images.Remove({model.model, version});
  impl_->labelled.Remove({model.model, version});
  impl_->shadow.Remove({model.model, version});
  impl_->divergence.Remove({model.model, version});
  for (Series<Gauge>& figure : impl_->live) figure.Remove({model.model, version});
  impl_->live_at_limit.Remove({model.model, version});
  impl_->drift_reference.Remove({model.model, version});
}

void Metrics::ModelDefault(const ModelLabels& model, bool is_default) {
  const std::string version = absl::StrCat(model.version);
  std::lock_guard<std::mutex> lock(impl_->models_mutex);
  const auto isa = impl_->isa_of.find({model.model, model.version});
  if (isa == impl_->isa_of.end()) return;  // not in memory: nothing to mark
  impl_->model_info.Remove({model.model, version});
  impl_->model_info.With(
      {model.model, version, model.scheme, isa->second, is_default ? "true" : "false"},
      [](Gauge& g) { g.Set(1); });
}

void Metrics::WatchEvent(absl::string_view event) { impl_->watch_events.With({event}, Increment); }

void Metrics::QuantizeJob(absl::string_view outcome, absl::Duration duration) {
  impl_->quantize_jobs.With({outcome}, Increment);
  impl_->quantize_seconds.With({}, [&](Histogram& h) { h.Observe(Seconds(duration)); });
}

void Metrics::Machine(int budget_threads, absl::string_view version, absl::string_view isa,
                      absl::string_view onednn) {
  impl_->budget.With({}, [&](Gauge& g) { g.Set(budget_threads); });
  impl_->build_info.With({version, isa, onednn}, [](Gauge& g) { g.Set(1); });
}

std::shared_ptr<prometheus::Registry> Metrics::registry() const { return impl_->registry; }

std::string Metrics::Render(const std::set<std::string>& only) {
  std::vector<prometheus::MetricFamily> families = impl_->registry->Collect();
  if (!only.empty()) {
    std::erase_if(families, [&](const auto& family) { return !only.contains(family.name); });
  }
  std::ostringstream out;
  prometheus::TextSerializer().Serialize(out, families);
  return out.str();
}

std::vector<std::pair<std::string, std::string>> Metrics::Catalogue() {
  std::vector<std::pair<std::string, std::string>> catalogue;
  for (const Spec* spec : kSpecs) catalogue.emplace_back(spec->name, spec->help);
  for (const Spec& spec : kLive) catalogue.emplace_back(spec.name, spec.help);
  for (auto& entry : AccessMetrics::Catalogue()) catalogue.push_back(std::move(entry));
  return catalogue;
}

}  // namespace tern::metrics
