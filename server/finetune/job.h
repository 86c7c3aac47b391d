// Fine-tuning from files to a file: float network, quantised version and labelled images in, a
// finished artifact out.
#ifndef TERN_SERVER_FINETUNE_JOB_H_
#define TERN_SERVER_FINETUNE_JOB_H_

#include <functional>
#include <string>

#include "absl/status/statusor.h"
#include "server/finetune/data.h"
#include "server/finetune/trainer.h"
#include "tern/v1/model.pb.h"

namespace tern::finetune {

struct JobOptions {
  std::string float_model;  // ONNX
  std::string start;        // .tern, made from float_model
  std::string data;         // folder, see ListLabelledImages
  std::string output;       // .tern, written atomically
  int label_offset = 0;
  double held_out = 0.05;  // share of the images of each class that choose the best epoch
  int64_t limit = 0;       // training images; 0 = all that are not held out
  Augmentation augmentation;
  TrainOptions train;  // its settings are filled here
};

// Runs the job and writes the artifact: contract and labels of the start version, its report with
// the part on fine-tuning and figures on the held-out images, measured with the engine.
// Errors: those of Train; NOT_FOUND and the codes of artifact::Read and onnx::Import for the files;
// INVALID_ARGUMENT if the start version was made from another float network or no image is held
// out. Nothing is written on failure but checkpoints.
absl::StatusOr<v1::QuantizationReport> RunJob(const JobOptions& options,
                                              const std::function<void(const Progress&)>& progress);

}  // namespace tern::finetune

#endif  // TERN_SERVER_FINETUNE_JOB_H_
