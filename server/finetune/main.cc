// tern-finetune: trains a quantised version of a network on labelled images.

#include <unistd.h>

#include <CLI/CLI.hpp>
#include <atomic>
#include <csignal>
#include <cstdio>
#include <string>

#include "absl/strings/str_format.h"
#include "absl/time/clock.h"
#include "absl/time/time.h"
#include "server/base/cpu_budget.h"
#include "server/base/log.h"
#include "server/finetune/job.h"

namespace tern::finetune {
namespace {

enum ExitCode { kOk = 0, kFailed = 1, kUsage = 2 };

std::atomic<bool> stop{false};
std::atomic<int> stop_signal{0};

// The first signal asks for a checkpoint; the second ends the process.
void OnSignal(int signal) {
  stop_signal = signal;
  stop = true;
  std::signal(signal, SIG_DFL);
}

// One line that redraws itself on a terminal; elsewhere a line every ten seconds.
class ProgressLine {
 public:
  explicit ProgressLine(bool quiet) : quiet_(quiet), terminal_(isatty(STDERR_FILENO) == 1) {}
  ~ProgressLine() { Clear(); }

  void Show(const Progress& p) {
    if (p.finished != nullptr) {
      Clear();
      if (p.finished->epoch > 0) {
        TERN_LOG_INFO("epoch {}: loss {:.4f}, {:.2f} % of the training images, {} held-out right",
                      p.finished->epoch, p.finished->loss, 100 * p.finished->accuracy,
                      p.finished->held_out_top1);
      } else {
        TERN_LOG_INFO("start version: {} held-out right", p.finished->held_out_top1);
      }
      return;
    }
    const absl::Time now = absl::Now();
    if (quiet_ || now < next_) return;
    next_ = now + (terminal_ ? absl::Milliseconds(200) : absl::Seconds(10));
    std::string line = absl::StrFormat(
        "epoch %d/%d  step %d/%d  loss %.4f  accuracy %.2f %%  %.0f images/s", p.epoch, p.epochs,
        p.step, p.steps, p.loss, 100 * p.accuracy, p.images_per_second);
    if (p.seconds_left >= 0) {
      const auto seconds = static_cast<int64_t>(p.seconds_left);
      line +=
          absl::StrFormat("  %d:%02d:%02d left", seconds / 3600, seconds / 60 % 60, seconds % 60);
    }
    if (terminal_) {
      std::fprintf(stderr, "\r\033[K%s", line.c_str());
      drawn_ = true;
    } else {
      std::fprintf(stderr, "%s\n", line.c_str());
    }
  }

  void Clear() {
    if (drawn_) std::fprintf(stderr, "\r\033[K");
    drawn_ = false;
  }

 private:
  const bool quiet_, terminal_;
  bool drawn_ = false;
  absl::Time next_ = absl::InfinitePast();
};

std::string Percent(const v1::Proportion& p) {
  return absl::StrFormat("%.2f %% [%.2f, %.2f]", 100 * p.value(), 100 * p.low(), 100 * p.high());
}

int Main(int argc, char** argv) {
  JobOptions options;
  TrainOptions& train = options.train;
  train.threads = ReadCpuBudget().threads;
  bool quiet = false, no_flip = false;
  CLI::App app(
      "Fine-tunes a quantised version of a network on labelled images (docs/finetuning.md).",
      "tern-finetune");
  app.footer(
      "Example:\n  tern-finetune --float model.onnx --start version.tern --data train/ --output "
      "tuned.tern\n"
      "Exit status: 0 success, 1 failure, 2 wrong usage, 128 + n stopped by signal n (SIGINT and\n"
      "SIGTERM leave a checkpoint; --resume continues).");
  app.option_defaults()->always_capture_default();
  app.add_option("--float", options.float_model, "The float network, ONNX")
      ->required()
      ->check(CLI::ExistingFile);
  app.add_option("--start", options.start, "The quantised version to start from, .tern")
      ->required()
      ->check(CLI::ExistingFile);
  app.add_option("--data,-d", options.data, "Images, one sub-folder per class")
      ->required()
      ->check(CLI::ExistingDirectory);
  app.add_option("--output,-o", options.output, "The artifact to write, .tern")->required();
  app.add_option("--checkpoint", train.checkpoint, "Default: the output with .checkpoint added");
  app.add_flag("--resume", train.resume, "Continue from the checkpoint");
  app.add_option("--epochs", train.epochs, "Passes over the images");
  app.add_option("--batch", train.batch, "Images per step");
  app.add_option("--lr", train.learning_rate, "Adam's learning rate of the latent weights");
  app.add_option("--scale-lr", train.scale_rate, "The same of scales (logarithms) and biases");
  app.add_option("--warmup", train.warmup, "Share of the steps over which the rates rise");
  app.add_option("--distil-weight", train.distil_weight,
                 "Weight of the divergence from the float network's answers; 0 = labels only");
  app.add_option("--temperature", train.temperature, "At which answers are compared");
  app.add_option("--held-out", options.held_out,
                 "Share of the images that choose the best epoch and are not trained on");
  app.add_option("--limit", options.limit, "At most so many training images; 0 = all")
      ->check(CLI::NonNegativeNumber);
  app.add_option("--crop-padding", options.augmentation.crop_padding,
                 "Images move by up to so many pixels");
  app.add_flag("--no-flip", no_flip, "Images are not mirrored");
  app.add_option("--label-offset", options.label_offset,
                 "Added to each class (1 for networks with a background class); not used where "
                 "sub-folders are named by the model's labels");
  app.add_option("--seed", train.seed, "Of the held-out choice, order and augmentation");
  app.add_option("--threads", train.threads, "Threads");
  app.add_option("--checkpoint-minutes", train.checkpoint_minutes,
                 "Time between checkpoints; there is one after every epoch anyway")
      ->check(CLI::PositiveNumber);
  app.add_flag("--quiet,-q", quiet, "No progress line");
  try {
    app.parse(argc, argv);
  } catch (const CLI::ParseError& error) {
    return app.exit(error) == 0 ? kOk : kUsage;
  }
  options.augmentation.flip = !no_flip;
  if (train.checkpoint.empty()) train.checkpoint = options.output + ".checkpoint";
  train.stop = &stop;
  InitLog("info").IgnoreError();
  std::signal(SIGINT, OnSignal);
  std::signal(SIGTERM, OnSignal);

  ProgressLine line(quiet);
  const absl::StatusOr<v1::QuantizationReport> report =
      RunJob(options, [&](const Progress& p) { line.Show(p); });
  line.Clear();
  if (!report.ok()) {
    std::fprintf(stderr, "tern-finetune: %s: %s\n",
                 absl::StatusCodeToString(report.status().code()).c_str(),
                 std::string(report.status().message()).c_str());
    if (absl::IsCancelled(report.status()) && stop_signal != 0) return 128 + stop_signal;
    return kFailed;
  }
  const v1::FineTuningReport& tuning = report->fine_tuning();
  std::fprintf(stderr,
               "float       %s\nstart       %s\nfine-tuned  %s\n"
               "top-1 on %d held-out images, epoch %d of %d, %.0f s; wrote %s\n",
               Percent(tuning.float_top1()).c_str(), Percent(tuning.start_top1()).c_str(),
               Percent(tuning.top1()).c_str(), static_cast<int>(tuning.held_out_images()),
               static_cast<int>(tuning.best_epoch()), static_cast<int>(train.epochs),
               tuning.seconds(), options.output.c_str());
  for (const std::string& warning : report->warnings()) {
    std::fprintf(stderr, "warning: %s\n", warning.c_str());
  }
  return kOk;
}

}  // namespace
}  // namespace tern::finetune

int main(int argc, char** argv) { return tern::finetune::Main(argc, argv); }
