// The state of a training run in one file, written atomically.
#ifndef TERN_SERVER_FINETUNE_CHECKPOINT_H_
#define TERN_SERVER_FINETUNE_CHECKPOINT_H_

#include <cstdint>
#include <map>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"

namespace tern::finetune {

// What was measured at the end of an epoch. Epoch 0 is the start version.
struct EpochResult {
  int64_t epoch = 0;
  double loss = 0;      // mean over the training images, as augmented
  double accuracy = 0;  // top-1 on them, of the weights as they moved
  uint64_t held_out_top1 = 0;
};

// Everything that the rest of a run depends on. Randomness is not part of it: order and
// augmentation are functions of the seed, the epoch and the image (data.h).
struct Checkpoint {
  // Options and inputs by name: a run is resumed only with the same ones.
  std::map<std::string, std::string> settings;
  int64_t epoch = 1;    // in work
  int64_t step = 0;     // batches of it that are done
  double loss_sum = 0;  // over the images of this epoch so far
  uint64_t right = 0, seen = 0, unreadable = 0;
  double seconds = 0;  // of training, over all runs
  std::vector<EpochResult> epochs;
  std::string best;  // artifact bytes of the best epoch's network
  int64_t best_epoch = 0;
  std::string torch;  // parameters and optimiser, torch's serialisation
};

// CRC-32C over everything; by WriteFileAtomically.
absl::Status WriteCheckpoint(const Checkpoint& checkpoint, const std::string& path);

// NOT_FOUND: no file; DATA_LOSS: damaged or not a checkpoint.
absl::StatusOr<Checkpoint> ReadCheckpoint(const std::string& path);

}  // namespace tern::finetune

#endif  // TERN_SERVER_FINETUNE_CHECKPOINT_H_
