// The classify pipeline: decode -> preprocess -> batch -> engine -> top-k. Who has the pixels or
// the network's input already enters after decoding or after preprocessing.
//
// Decoding and preprocessing run on one set of threads for all models, in the order of priority and
// deadline; each loaded version has its own batcher and sessions (ModelRunner). An image keeps a
// place in its version's queue from its arrival on, so that nothing is decoded that is refused
// later for want of room, unless images of a higher priority took the place. No call blocks, unless
// ClassifyInput::on_this_thread allows it: `done` is called later on another thread, or at once for
// what is refused, exactly once, whatever happens.
#ifndef TERN_SERVER_SERVING_CLASSIFY_H_
#define TERN_SERVER_SERVING_CLASSIFY_H_

#include <atomic>
#include <functional>
#include <memory>
#include <optional>
#include <string>
#include <thread>
#include <vector>

#include "absl/status/statusor.h"
#include "absl/time/time.h"
#include "server/base/clock.h"
#include "server/classify/top_k.h"
#include "server/image/image.h"
#include "server/metrics/metrics.h"
#include "server/monitoring/label_join.h"
#include "server/monitoring/version_monitor.h"
#include "server/repository/repository.h"
#include "server/scheduler/batcher.h"
#include "server/serving/admission.h"
#include "server/serving/brownout.h"
#include "server/serving/shadow.h"
#include "server/serving/statistics.h"

namespace tern::serving {

// Of ids that callers choose: they are remembered for ReportLabel, logged and sent back.
inline constexpr size_t kMaxRequestIdBytes = 128;

// What ClassifyInput::image holds; h x w is the network's input.
enum class ImageForm {
  kEncoded,  // JPEG, PNG, WebP or BMP
  kPixels,   // u8 [h, w, 3], RGB: resized and cropped already, still to be normalised
  kTensor,   // f32 [3, h, w], little-endian, finite: what the network takes
};

struct ClassifyInput {
  std::string image;
  ImageForm form = ImageForm::kEncoded;
  int top_k = 0;             // 1..classes; 0 = the smaller of 5 and classes
  bool want_logits = false;  // fill ClassifyOutput::logits
  std::string request_id;    // at most kMaxRequestIdBytes
  std::string client;        // whom ClassifierOptions::admission counts it for
  std::optional<uint32_t> label;
  // 1 = first, up to RunnerOptions::priority_levels; 0 = the middle level (scheduler::Terms).
  uint32_t priority = 0;
  Wishes wishes;
  absl::Time deadline = absl::InfiniteFuture();
  // True once the caller has gone away; may be null. Not called after `done`.
  std::function<bool()> cancelled;
  // The calling thread may decode and compute the image itself, if it is the only one in the
  // server: two threads need not wake up then, each of which may take a sleeping CPU 50 us.
  bool on_this_thread = false;
};

struct ClassifyOutput {
  std::shared_ptr<const repository::LoadedModel> model;
  std::shared_ptr<monitoring::VersionMonitor> monitor;
  std::vector<classify::Prediction> classes;  // top_k of them, best first
  std::vector<float> logits;                  // [classes], only if asked for
  // Why a request that named no version was not answered by the default one, and that one.
  Degradation degradation = Degradation::kNone;
  uint64_t degraded_from = 0;
  int batch_size = 0;
  // queue: for decoding and for a batch.
  absl::Duration decode, preprocess, queue, inference, postprocess, total;
};

using ClassifyDone = std::function<void(absl::StatusOr<ClassifyOutput>)>;
using ClassifyAllDone = std::function<void(absl::StatusOr<std::vector<ClassifyOutput>>)>;

struct RunnerOptions {
  int cpu_threads = 1;  // the process's CPU budget
  int default_max_batch = 8;
  absl::Duration default_max_delay = absl::ZeroDuration();
  int default_max_queue = 256;
  absl::Duration default_target_p99 = absl::ZeroDuration();  // 0 = none
  int priority_levels = 3;                                   // >= 1
  // Every session runs every batch size once before the version is ready. Otherwise the sessions
  // have oneDNN's kernels for one image, and get the others in the background.
  bool warm_up = false;
  int profile_every = 0;  // every n-th batch of an instance is timed layer by layer; 0 = none
  monitoring::MonitorOptions monitor;
  // Every n-th batch of an instance has the activation codes at their limits counted; 0 = none.
  int count_codes_every = 0;
  ShadowComparer* shadow = nullptr;     // not owned; null = no shadow comparisons
  metrics::Metrics* metrics = nullptr;  // not owned; required
  const Clock* clock = Clock::Real();
};

// One image on its way through a ModelRunner.
struct ClassifyTask {
  ClassifyInput input;
  std::vector<float> pixels;  // network input, NHWC [h, w, 3]
  absl::Time arrived;
  absl::Duration queued;  // before decoding
  absl::Duration decode, preprocess;
  ClassifyDone done;
  ShadowComparer::Activity activity;  // from Submit on
};

// What serves one loaded version: a batcher, and one session per instance. Thread safe.
class ModelRunner final : public repository::Servable {
 public:
  // INTERNAL / RESOURCE_EXHAUSTED if sessions cannot be made.
  static absl::StatusOr<std::shared_ptr<repository::Servable>> Create(
      std::shared_ptr<const repository::LoadedModel> model, const RunnerOptions& options);
  ~ModelRunner() override;

  // Queues a preprocessed task; its `done` is called with the outcome. The batcher's error leaves
  // the task untouched and `done` uncalled; UNAVAILABLE means that this version is being replaced
  // or unloaded. `reserved`: a place was kept for it. `here`: the calling thread may run it, if
  // that takes it no longer than kShort.
  absl::Status Submit(ClassifyTask& task, bool reserved, bool here = false);

  // As the batcher's.
  absl::Status Reserve(const scheduler::Terms& terms, absl::Duration ready_in) {
    return batcher_->Reserve(terms, ready_in);
  }
  void Unreserve(const scheduler::Terms& terms) { batcher_->Unreserve(terms); }
  absl::Duration Expect(const scheduler::Terms& terms, absl::Duration ready_in) const {
    return batcher_->Expect(terms, ready_in);
  }

  void Drain() override;
  // Beside longer networks the wake-up of a thread does not count, and callers' threads have other
  // calls to read.
  static constexpr absl::Duration kShort = absl::Milliseconds(10);

  // What a batch of one takes, learned; 0 before the first.
  absl::Duration image_time() const { return batcher_->learned(1).batch_time; }
  const repository::LoadedModel& model() const { return *model_; }
  const scheduler::BatcherOptions& batching() const { return batching_; }
  const StatisticsCounter& statistics() const { return statistics_; }
  // Count one request that this version answered, or did not.
  void Succeeded(const StageTimes& times);
  void Failed(const absl::Status& status, absl::Duration total);

 private:
  ModelRunner(std::shared_ptr<const repository::LoadedModel> model, const RunnerOptions& options,
              const scheduler::BatcherOptions& batching, std::vector<engine::Session> sessions,
              int threads);
  // Makes oneDNN's kernels for every batch size while the sessions, which have those for one image,
  // serve already: they find them in oneDNN's cache instead of making them during a request.
  void WarmBehind(int threads, int max_batch);
  void Run(int instance, std::vector<scheduler::Queued<ClassifyTask>> batch);
  // Runs a task on the calling thread, or leaves it untouched.
  bool RunHere(ClassifyTask& task, bool reserved);

  const std::shared_ptr<const repository::LoadedModel> model_;
  metrics::Metrics* const metrics_;
  const Clock* const clock_;
  ShadowComparer* const shadow_;
  const std::shared_ptr<monitoring::VersionMonitor> monitor_;
  const int profile_every_;
  const int count_codes_every_;
  const scheduler::BatcherOptions batching_;
  const int threads_;  // of each session
  StatisticsCounter statistics_;
  std::vector<engine::Session> sessions_;
  std::vector<int64_t> batches_;                               // run so far, per instance
  std::unique_ptr<scheduler::Batcher<ClassifyTask>> batcher_;  // its threads use the rest
  std::atomic<bool> stop_warming_{false};
  std::thread warming_;
};

struct ClassifierOptions {
  image::Limits limits;
  int decode_threads = 1;
  int max_waiting = 1024;   // images waiting for decode; more are RESOURCE_EXHAUSTED
  int priority_levels = 3;  // as RunnerOptions
  Admission::Options admission;
};

// The data port's pipeline. Thread safe.
class Classifier {
 public:
  // Nothing is owned; all must outlive it.
  Classifier(const repository::Repository* repository, monitoring::LabelJoin* labels,
             metrics::Metrics* metrics, const ClassifierOptions& options,
             const Clock* clock = Clock::Real());
  // Waits for images in decode.
  ~Classifier();

  // version 0 = default. The errors are those of ImageClassifier.Classify (proto).
  void Classify(absl::string_view model, uint64_t version, ClassifyInput input, ClassifyDone done);

  // The images of one request, by one version: all outputs in their order, or the first error,
  // which names the image if there are several; the others then are not computed. INVALID_ARGUMENT
  // also for no images, or bytes that are not as many as their form needs; UNAVAILABLE also if the
  // version was replaced while some of them waited; RESOURCE_EXHAUSTED without a RetryAfter hint
  // for more images or bytes than the limits of all that waits allow to one request.
  void ClassifyAll(absl::string_view model, uint64_t version, std::vector<ClassifyInput> inputs,
                   ClassifyAllDone done);

 private:
  using Runner = std::shared_ptr<ModelRunner>;
  // An image on its way through the decode stage. It holds a place in `runner`'s queue.
  struct DecodeTask {
    Runner runner;
    uint64_t asked = 0;   // version; 0 = default
    uint64_t chosen = 0;  // for it by Brownout
    ClassifyTask task;
  };

  // The chosen version's runner, or if that has gone meanwhile the one that was asked for.
  absl::StatusOr<Runner> AcquireFor(absl::string_view model, uint64_t chosen, uint64_t asked) const;
  // In which a version would answer such a task now.
  absl::Duration ExpectedTime(absl::string_view model, uint64_t version,
                              const scheduler::Terms& terms) const;
  // RESOURCE_EXHAUSTED, without a hint when to try again, for a request that would be refused even
  // if nothing else were here.
  absl::Status CheckFits(const ModelRunner& runner, const std::vector<ClassifyInput>& inputs) const;
  // Decodes and preprocesses; false if the image was refused meanwhile.
  bool Prepare(DecodeTask& decode);
  // What was prepared goes to its runner, which may run it `here`.
  void Submit(DecodeTask decode, bool here);
  // Tells the brown-out how long it took, and the output how its version was chosen.
  void Account(const Brownout::Choice& choice, bool observed, ClassifyOutput& output);

  const repository::Repository* const repository_;
  monitoring::LabelJoin* const labels_;
  metrics::Metrics* const metrics_;
  const ClassifierOptions options_;
  const Clock* const clock_;
  Admission admission_;
  Brownout brownout_;
  // Batches of one. Its threads use the rest.
  std::unique_ptr<scheduler::Batcher<DecodeTask>> decode_;
};

}  // namespace tern::serving

#endif  // TERN_SERVER_SERVING_CLASSIFY_H_
