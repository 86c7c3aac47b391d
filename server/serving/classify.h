// The classify pipeline: decode -> preprocess -> batch -> engine -> top-k. Who has the pixels or
// the network's input already enters after decoding or after preprocessing.
//
// Decoding and preprocessing run on one pool for all models; each loaded version has its own
// batcher and sessions (ModelRunner). No call blocks: `done` is called later on another thread,
// exactly once, whatever happens.
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
#include "server/base/thread_pool.h"
#include "server/classify/top_k.h"
#include "server/image/image.h"
#include "server/metrics/metrics.h"
#include "server/monitoring/label_join.h"
#include "server/monitoring/version_monitor.h"
#include "server/repository/repository.h"
#include "server/scheduler/batcher.h"
#include "server/serving/shadow.h"
#include "server/serving/statistics.h"

namespace tern::serving {

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
  std::string request_id;
  std::optional<uint32_t> label;
  absl::Time deadline = absl::InfiniteFuture();
  // True once the caller has gone away; may be null.
  std::function<bool()> cancelled;
};

struct ClassifyOutput {
  std::shared_ptr<const repository::LoadedModel> model;
  std::shared_ptr<monitoring::VersionMonitor> monitor;
  std::vector<classify::Prediction> classes;  // top_k of them, best first
  std::vector<float> logits;                  // [classes], only if asked for
  int batch_size = 0;
  absl::Duration decode, preprocess, queue, inference, postprocess, total;
};

using ClassifyDone = std::function<void(absl::StatusOr<ClassifyOutput>)>;
using ClassifyAllDone = std::function<void(absl::StatusOr<std::vector<ClassifyOutput>>)>;

struct RunnerOptions {
  int cpu_threads = 1;  // the process's CPU budget
  int default_max_batch = 8;
  absl::Duration default_max_delay = absl::Microseconds(500);
  int default_max_queue = 256;
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
  // or unloaded.
  absl::Status Submit(ClassifyTask& task);

  void Drain() override;
  const repository::LoadedModel& model() const { return *model_; }
  const scheduler::BatcherOptions& batching() const { return batching_; }
  StatisticsCounter& statistics() { return statistics_; }

 private:
  ModelRunner(std::shared_ptr<const repository::LoadedModel> model, const RunnerOptions& options,
              const scheduler::BatcherOptions& batching, std::vector<engine::Session> sessions,
              int threads);
  // Makes oneDNN's kernels for every batch size while the sessions, which have those for one image,
  // serve already: they find them in oneDNN's cache instead of making them during a request.
  void WarmBehind(int threads, int max_batch);
  void Run(int instance, std::vector<scheduler::Queued<ClassifyTask>> batch);

  const std::shared_ptr<const repository::LoadedModel> model_;
  metrics::Metrics* const metrics_;
  const Clock* const clock_;
  ShadowComparer* const shadow_;
  const std::shared_ptr<monitoring::VersionMonitor> monitor_;
  const int profile_every_;
  const int count_codes_every_;
  const scheduler::BatcherOptions batching_;
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
  int max_waiting = 1024;  // images waiting for or in decode; more are RESOURCE_EXHAUSTED
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
  // version was replaced while some of them waited.
  void ClassifyAll(absl::string_view model, uint64_t version, std::vector<ClassifyInput> inputs,
                   ClassifyAllDone done);

 private:
  void Prepare(std::shared_ptr<ModelRunner> runner, uint64_t version, ClassifyTask task);

  const repository::Repository* const repository_;
  monitoring::LabelJoin* const labels_;
  metrics::Metrics* const metrics_;
  const ClassifierOptions options_;
  const Clock* const clock_;
  std::atomic<int> waiting_{0};
  std::unique_ptr<ThreadPool> pool_;
};

}  // namespace tern::serving

#endif  // TERN_SERVER_SERVING_CLASSIFY_H_
