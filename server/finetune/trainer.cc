#include "server/finetune/trainer.h"

#include <ATen/ATen.h>
#include <ATen/core/grad_mode.h>
#include <torch/csrc/autograd/variable.h>
#include <torch/optim/adam.h>
#include <torch/serialize/input-archive.h>
#include <torch/serialize/output-archive.h>

#include <cmath>
#include <exception>
#include <future>
#include <numeric>
#include <sstream>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "absl/time/clock.h"
#include "server/artifact/artifact.h"
#include "server/base/log.h"
#include "server/base/status_macros.h"
#include "server/finetune/network.h"
#include "server/kernels/dispatch.h"

namespace tern::finetune {
namespace {

// Settings that change the last bits of sums, but not what is computed.
bool OnlyLastBits(const std::string& name) { return name == "threads" || name == "cpu"; }

absl::Status CheckOptions(const TrainOptions& o) {
  const auto check = [](bool ok, absl::string_view name, double got,
                        absl::string_view wanted) -> absl::Status {
    if (ok) return absl::OkStatus();
    return absl::InvalidArgumentError(absl::StrCat(name, ": got ", got, ", want ", wanted));
  };
  const auto in = [](double x, double lo, double hi) { return x >= lo && x <= hi; };
  TERN_RETURN_IF_ERROR(check(in(o.epochs, 1, 10000), "epochs", o.epochs, "1 to 10000"));
  TERN_RETURN_IF_ERROR(check(in(o.batch, 1, 65536), "batch", o.batch, "1 to 65536"));
  TERN_RETURN_IF_ERROR(
      check(in(o.learning_rate, 0, 1), "learning rate", o.learning_rate, "0 to 1"));
  TERN_RETURN_IF_ERROR(check(in(o.scale_rate, 0, 1), "scale rate", o.scale_rate, "0 to 1"));
  TERN_RETURN_IF_ERROR(check(in(o.warmup, 0, 0.9), "warm-up", o.warmup, "0 to 0.9"));
  TERN_RETURN_IF_ERROR(
      check(in(o.distil_weight, 0, 1000), "distillation weight", o.distil_weight, "0 to 1000"));
  TERN_RETURN_IF_ERROR(
      check(in(o.temperature, 0.1, 100), "temperature", o.temperature, "0.1 to 100"));
  return check(o.threads >= 1, "threads", o.threads, "at least 1");
}

// A graph as bytes, exact; the artifact's format carries the codes compactly.
std::string GraphBytes(const graph::Graph& graph) {
  artifact::Artifact artifact;
  artifact.graph = graph;
  return artifact::Serialize(artifact);
}

// One run. Methods may throw what torch throws.
class Run {
 public:
  Run(Network teacher, Network network, const Loader& loader, int64_t images,
      const TrainOptions& options, const std::function<void(const Progress&)>& progress)
      : teacher_(std::move(teacher)),
        network_(std::move(network)),
        loader_(loader),
        images_(images),
        options_(options),
        progress_(progress),
        adam_(Groups(network_, options), torch::optim::AdamOptions(options.learning_rate)),
        steps_((images + options.batch - 1) / options.batch) {
    state_.settings = options.settings;
    state_.settings["epochs"] = absl::StrCat(options.epochs);
    state_.settings["batch"] = absl::StrCat(options.batch);
    state_.settings["images"] = absl::StrCat(images);
    state_.settings["learning rate"] = absl::StrCat(options.learning_rate);
    state_.settings["scale rate"] = absl::StrCat(options.scale_rate);
    state_.settings["warm-up"] = absl::StrCat(options.warmup);
    state_.settings["distillation weight"] = absl::StrCat(options.distil_weight);
    state_.settings["temperature"] = absl::StrCat(options.temperature);
    state_.settings["seed"] = absl::StrCat(options.seed);
    state_.settings["threads"] = absl::StrCat(options.threads);
    state_.settings["cpu"] = kernels::IsaName(kernels::DetectIsa());
  }

  absl::StatusOr<TrainResult> Execute(
      const graph::Graph& start,
      const std::function<absl::StatusOr<uint64_t>(const graph::Graph&)>& measure) {
    if (options_.resume) {
      TERN_RETURN_IF_ERROR(Restore());
    } else {
      TERN_ASSIGN_OR_RETURN(const uint64_t hits, measure(start));
      state_.best = GraphBytes(start);
      state_.epochs.push_back({.epoch = 0, .held_out_top1 = hits});
      Tell(&state_.epochs.back());
    }
    begun_ = last_save_ = absl::Now();
    for (; state_.epoch <= options_.epochs; ++state_.epoch) {
      TERN_RETURN_IF_ERROR(TrainEpoch());
      TERN_RETURN_IF_ERROR(FinishEpoch(measure));
    }
    TERN_ASSIGN_OR_RETURN(artifact::Artifact best, artifact::Parse(state_.best, "best epoch"));
    return TrainResult{std::move(best.graph), state_.best_epoch, state_.epochs, state_.unreadable,
                       state_.seconds + Elapsed()};
  }

 private:
  static std::vector<torch::optim::OptimizerParamGroup> Groups(const Network& network,
                                                               const TrainOptions& options) {
    std::vector<at::Tensor> small = network.scales();
    small.insert(small.end(), network.biases().begin(), network.biases().end());
    std::vector<torch::optim::OptimizerParamGroup> groups;
    groups.emplace_back(network.latents(),
                        std::make_unique<torch::optim::AdamOptions>(options.learning_rate));
    groups.emplace_back(std::move(small),
                        std::make_unique<torch::optim::AdamOptions>(options.scale_rate));
    return groups;
  }

  double Elapsed() const { return absl::ToDoubleSeconds(absl::Now() - begun_); }

  // Linear warm-up, then half a cosine to 0.
  void SetRates(int64_t step) {
    const double all = static_cast<double>(options_.epochs * steps_);
    const double rise = options_.warmup * all, at = static_cast<double>(step);
    double factor = 1;
    if (at + 1 < rise) {
      factor = (at + 1) / rise;
    } else {
      factor = 0.5 * (1 + std::cos(M_PI * (at - rise) / std::max(all - rise, 1.0)));
    }
    const double rates[] = {options_.learning_rate, options_.scale_rate};
    for (size_t i = 0; i < adam_.param_groups().size(); ++i) {
      static_cast<torch::optim::AdamOptions&>(adam_.param_groups()[i].options())
          .lr(rates[i] * factor);
    }
  }

  Batch LoadBatch(const std::vector<int64_t>& order, int64_t step) const {
    const int64_t first = step * options_.batch;
    const int64_t count = std::min<int64_t>(options_.batch, images_ - first);
    return loader_.Load(absl::MakeConstSpan(order).subspan(first, count), state_.epoch);
  }

  absl::Status TrainEpoch() {
    const std::vector<int64_t> order = EpochOrder(images_, options_.seed, state_.epoch);
    std::future<Batch> next;
    if (state_.step < steps_) {
      next = std::async(std::launch::async,
                        [&, step = state_.step] { return LoadBatch(order, step); });
    }
    while (state_.step < steps_) {
      const Batch batch = next.get();
      if (state_.step + 1 < steps_) {
        next = std::async(std::launch::async,
                          [&, step = state_.step + 1] { return LoadBatch(order, step); });
      }
      TERN_RETURN_IF_ERROR(Step(batch));
      ++state_.step;
      Tell(nullptr);
      const bool stop = options_.stop != nullptr && options_.stop->load();
      if (stop || absl::Now() - last_save_ > absl::Minutes(1) * options_.checkpoint_minutes) {
        TERN_RETURN_IF_ERROR(Save());
      }
      if (stop) {
        return absl::CancelledError(absl::StrCat(
            "stopped in epoch ", state_.epoch, " after ", state_.step, " of ", steps_, " steps",
            options_.checkpoint.empty() ? ""
                                        : absl::StrCat("; checkpoint: ", options_.checkpoint)));
      }
    }
    return absl::OkStatus();
  }

  absl::Status Step(const Batch& batch) {
    for (const std::string& message : batch.unreadable) {
      if (state_.unreadable++ < 10) TERN_LOG_WARN("left out: {}", message);
    }
    const auto count = static_cast<int64_t>(batch.labels.size());
    if (count == 0) {
      return absl::InvalidArgumentError(
          absl::StrCat("no image of a batch can be read; one: ", batch.unreadable.front()));
    }
    const auto [height, width] = loader_.size();
    // NHWC bytes are what torch calls channels-last: no copy.
    const at::Tensor images = at::from_blob(const_cast<float*>(batch.pixels.data()),
                                            {count, height, width, 3}, at::kFloat)
                                  .permute({0, 3, 1, 2});
    const at::Tensor labels =
        at::from_blob(const_cast<int64_t*>(batch.labels.data()), {count}, at::kLong);

    SetRates((state_.epoch - 1) * steps_ + state_.step);
    const at::Tensor logits = network_.Forward(images);
    at::Tensor loss = at::cross_entropy_loss(logits, labels);
    if (options_.distil_weight > 0) {
      const double t = options_.temperature;
      at::Tensor target;
      {
        at::NoGradGuard no_grad;
        target = at::log_softmax(teacher_.Forward(images) / t, 1);
      }
      const at::Tensor divergence =
          (at::exp(target) * (target - at::log_softmax(logits / t, 1))).sum() /
          static_cast<double>(count);
      loss = loss + options_.distil_weight * t * t * divergence;
    }
    const double value = loss.item<double>();
    if (!std::isfinite(value)) {
      return absl::InternalError(absl::StrCat("training diverged in epoch ", state_.epoch,
                                              ": the loss is ", value,
                                              "; try a smaller learning rate"));
    }
    adam_.zero_grad();
    loss.backward();
    adam_.step();
    network_.ClampLatents();

    state_.loss_sum += value * static_cast<double>(count);
    state_.right += (logits.detach().argmax(1) == labels).sum().item<int64_t>();
    state_.seen += count;
    trained_ += count;
    return absl::OkStatus();
  }

  absl::Status FinishEpoch(
      const std::function<absl::StatusOr<uint64_t>(const graph::Graph&)>& measure) {
    TERN_ASSIGN_OR_RETURN(const graph::Graph graph, network_.ToGraph());
    EpochResult result;
    result.epoch = state_.epoch;
    result.loss = state_.loss_sum / static_cast<double>(state_.seen);
    result.accuracy = static_cast<double>(state_.right) / static_cast<double>(state_.seen);
    TERN_ASSIGN_OR_RETURN(result.held_out_top1, measure(graph));
    uint64_t best = 0;
    for (const EpochResult& epoch : state_.epochs) {
      if (epoch.epoch == state_.best_epoch) best = epoch.held_out_top1;
    }
    if (result.held_out_top1 >= best) {
      state_.best = GraphBytes(graph);
      state_.best_epoch = state_.epoch;
    }
    state_.epochs.push_back(result);
    Tell(&state_.epochs.back());
    // The checkpoint stands at the beginning of the next epoch.
    state_.step = 0;
    state_.loss_sum = 0;
    state_.right = state_.seen = 0;
    ++state_.epoch;
    const absl::Status saved = Save();
    --state_.epoch;
    return saved;
  }

  void Tell(const EpochResult* finished) const {
    if (!progress_) return;
    Progress p;
    p.epoch = state_.epoch;
    p.epochs = options_.epochs;
    p.step = state_.step;
    p.steps = steps_;
    if (state_.seen > 0) {
      p.loss = state_.loss_sum / static_cast<double>(state_.seen);
      p.accuracy = static_cast<double>(state_.right) / static_cast<double>(state_.seen);
    }
    if (trained_ > 0) {
      p.images_per_second = static_cast<double>(trained_) / Elapsed();
      const int64_t done = (state_.epoch - 1) * images_ + static_cast<int64_t>(state_.seen);
      p.seconds_left = static_cast<double>(options_.epochs * images_ - done) / p.images_per_second;
    }
    p.finished = finished;
    progress_(p);
  }

  absl::Status Save() {
    last_save_ = absl::Now();
    if (options_.checkpoint.empty()) return absl::OkStatus();
    torch::serialize::OutputArchive archive;
    const auto put = [&](const char* name, const std::vector<at::Tensor>& tensors) {
      for (size_t i = 0; i < tensors.size(); ++i) {
        archive.write(absl::StrCat(name, i), tensors[i].detach());
      }
    };
    put("latent", network_.latents());
    put("scale", network_.scales());
    put("bias", network_.biases());
    torch::serialize::OutputArchive optimiser;
    adam_.save(optimiser);
    archive.write("adam", optimiser);
    std::ostringstream stream;
    archive.save_to(stream);
    Checkpoint checkpoint = state_;
    checkpoint.torch = stream.str();
    checkpoint.seconds += Elapsed();
    return WriteCheckpoint(checkpoint, options_.checkpoint);
  }

  absl::Status Restore() {
    TERN_ASSIGN_OR_RETURN(Checkpoint saved, ReadCheckpoint(options_.checkpoint));
    std::vector<std::string> different;
    for (const auto& [name, value] : state_.settings) {
      const auto it = saved.settings.find(name);
      const std::string before = it == saved.settings.end() ? "unknown" : it->second;
      if (before == value) continue;
      const std::string change = absl::StrCat(name, " was ", before, ", is ", value);
      if (OnlyLastBits(name)) {
        TERN_LOG_WARN("resuming: {}; the result will differ in the last bits", change);
      } else {
        different.push_back(change);
      }
    }
    if (!different.empty()) {
      return absl::FailedPreconditionError(absl::StrCat(
          options_.checkpoint, " belongs to another run: ", absl::StrJoin(different, "; ")));
    }
    at::NoGradGuard no_grad;
    torch::serialize::InputArchive archive;
    archive.load_from(saved.torch.data(), saved.torch.size());
    const auto get = [&](const char* name, const std::vector<at::Tensor>& tensors) {
      for (size_t i = 0; i < tensors.size(); ++i) {
        at::Tensor value;
        archive.read(absl::StrCat(name, i), value);
        tensors[i].copy_(value);
      }
    };
    get("latent", network_.latents());
    get("scale", network_.scales());
    get("bias", network_.biases());
    torch::serialize::InputArchive optimiser;
    archive.read("adam", optimiser);
    adam_.load(optimiser);
    saved.torch.clear();
    const std::map<std::string, std::string> settings = std::move(state_.settings);
    state_ = std::move(saved);
    state_.settings = settings;
    TERN_LOG_INFO("resumed in epoch {} after {} of {} steps", state_.epoch, state_.step, steps_);
    return absl::OkStatus();
  }

  const Network teacher_;
  Network network_;
  const Loader& loader_;
  const int64_t images_;
  const TrainOptions& options_;
  const std::function<void(const Progress&)>& progress_;
  torch::optim::Adam adam_;
  const int64_t steps_;  // of an epoch
  Checkpoint state_;
  absl::Time begun_, last_save_;
  int64_t trained_ = 0;  // images in this process
};

}  // namespace

absl::StatusOr<TrainResult> Train(
    const graph::Graph& source, const graph::Graph& start, const Loader& loader, int64_t images,
    const std::function<absl::StatusOr<uint64_t>(const graph::Graph&)>& measure,
    const TrainOptions& options, const std::function<void(const Progress&)>& progress) {
  TERN_RETURN_IF_ERROR(CheckOptions(options));
  if (images < 1) return absl::InvalidArgumentError("there are no training images");
  if (options.resume && options.checkpoint.empty()) {
    return absl::InvalidArgumentError("resuming needs a checkpoint file");
  }
  UseThreads(options.threads);
  try {
    TERN_ASSIGN_OR_RETURN(Network teacher, Network::Float(source));
    TERN_ASSIGN_OR_RETURN(Network network, Network::Quantised(source, start));
    return Run(std::move(teacher), std::move(network), loader, images, options, progress)
        .Execute(start, measure);
  } catch (const std::exception& error) {
    return absl::InternalError(absl::StrCat("torch: ", error.what()));
  }
}

}  // namespace tern::finetune
