// The training loop: batches in, a better quantised network out.
#ifndef TERN_SERVER_FINETUNE_TRAINER_H_
#define TERN_SERVER_FINETUNE_TRAINER_H_

#include <atomic>
#include <functional>
#include <map>
#include <string>

#include "absl/status/statusor.h"
#include "server/finetune/checkpoint.h"
#include "server/finetune/data.h"
#include "server/graph/graph.h"

namespace tern::finetune {

struct TrainOptions {
  int64_t epochs = 3;
  int64_t batch = 128;
  double learning_rate = 1e-4;  // of latent weights (Adam), the paper's
  double scale_rate = 1e-3;     // of log scales and biases
  double warmup = 0.1;          // share of all steps over which the rates rise; then cosine to 0
  double distil_weight = 1;     // loss = cross entropy + weight * T^2 * KL(float || quantised)
  double temperature = 2;       // T
  uint64_t seed = 1;
  int threads = 1;
  std::string checkpoint;          // file; empty: none is written
  double checkpoint_minutes = 10;  // besides the one after every epoch
  bool resume = false;             // continue from `checkpoint`
  // Further things a resumed run must share with the run that wrote the checkpoint, by name.
  std::map<std::string, std::string> settings;
  const std::atomic<bool>* stop =
      nullptr;  // set: checkpoint after the running step, then CANCELLED
};

struct Progress {
  int64_t epoch = 0, epochs = 0;
  int64_t step = 0, steps = 0;  // of the epoch
  double loss = 0;              // mean over the epoch so far
  double accuracy = 0;          // top-1, a fraction
  double images_per_second = 0;
  double seconds_left = -1;  // negative: unknown
  // The epoch is over and was measured on the held-out images.
  const EpochResult* finished = nullptr;
};

struct TrainResult {
  graph::Graph graph;  // of the best epoch, by held-out top-1; the later of equals
  int64_t best_epoch = 0;
  std::vector<EpochResult> epochs;
  uint64_t unreadable = 0;  // images left out, counted once per epoch
  double seconds = 0;
};

// Trains from `start` (quantised) and `source` (the float network it was made from), see
// network.h. `loader` gives the batches of `images` training images. `measure` counts the top-1
// hits of a quantised network on held-out images; the start version is measured first, and is
// the result if no epoch is as good. Not thread safe in the process: sets torch's threads. The
// same inputs, options and CPU give the same result, whether interrupted and resumed or not.
// INVALID_ARGUMENT: options out of range, graphs that do not belong together, only unreadable
// images in a batch; UNIMPLEMENTED operator; NOT_FOUND, DATA_LOSS: checkpoint to resume;
// FAILED_PRECONDITION: it was written with other settings (names each); CANCELLED: stopped, and a
// checkpoint was written if there is a file for it; INTERNAL: torch's errors, or training diverged.
absl::StatusOr<TrainResult> Train(
    const graph::Graph& source, const graph::Graph& start, const Loader& loader, int64_t images,
    const std::function<absl::StatusOr<uint64_t>(const graph::Graph&)>& measure,
    const TrainOptions& options, const std::function<void(const Progress&)>& progress);

}  // namespace tern::finetune

#endif  // TERN_SERVER_FINETUNE_TRAINER_H_
