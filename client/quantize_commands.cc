// ternctl quantize and evaluate.

#include <atomic>
#include <iostream>
#include <map>
#include <memory>

#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "absl/time/clock.h"
#include "client/commands.h"
#include "client/contract.h"
#include "client/progress.h"
#include "client/status.h"
#include "client/table.h"

namespace tern::client {
namespace {

// An image to send, with its uses.
struct Sample {
  ImageFile file;
  bool calibration = false;
  bool evaluation = false;
};

// Reads images as they are sent (one in memory at a time) and shows how far that is; once all
// are sent, the server's own progress is shown.
class Sender {
 public:
  Sender(std::vector<Sample> samples, bool quiet)
      : samples_(std::move(samples)), progress_(quiet) {}

  SampleSource source() {
    return [this]() -> absl::StatusOr<std::optional<v1::SampleImage>> {
      const size_t i = sent_;
      if (i == samples_.size()) return std::nullopt;
      const Sample& sample = samples_[i];
      v1::SampleImage image;
      TERN_CLIENT_ASSIGN_OR_RETURN(*image.mutable_image(),
                                   ReadFile(sample.file.path, size_t{60} << 20));
      if (sample.file.label) image.set_label(*sample.file.label);
      image.set_calibration(sample.calibration);
      image.set_evaluation(sample.evaluation);
      image.set_name(sample.file.path);
      progress_.Show("sending", static_cast<double>(i + 1) / static_cast<double>(samples_.size()),
                     absl::StrCat(i + 1, "/", samples_.size(), " images"), -1);
      sent_ = i + 1;
      return image;
    };
  }

  ProgressCallback callback() {
    return [this](const v1::JobProgress& p) {
      if (sent_ < samples_.size()) return;
      progress_.Show(p.phase(), p.done() > 0 ? p.done() : -1, p.detail(),
                     p.seconds_left() > 0 ? p.seconds_left() : -1);
    };
  }

  Progress& progress() { return progress_; }

 private:
  const std::vector<Sample> samples_;
  std::atomic<size_t> sent_{0};
  Progress progress_;
};

struct QuantizeArgs {
  std::string model;
  uint64_t from = 0;
  std::string weights;
  std::string cluster = "4";
  std::string method = "compensated";
  std::string activations = "affine";
  std::string calibration;
  uint64_t calibration_count = 500;
  std::string evaluation;
  uint64_t limit = 0;
  int label_offset = 0;
  uint64_t seed = 0;
  double max_top1_drop = -1;
  bool quantize_first_and_last = false;
  bool set_default = false;
};

// 0 = all input channels.
absl::StatusOr<uint32_t> ClusterSize(const std::string& text) {
  uint32_t size = 0;
  if (text == "all") return 0u;
  if (!absl::SimpleAtoi(text, &size) || size < 1 || size > 256) {
    return absl::InvalidArgumentError(
        absl::StrCat("--cluster: got '", text, "', want 1..256 or all"));
  }
  return size;
}

absl::StatusOr<std::vector<Sample>> Samples(const QuantizeArgs& args) {
  TERN_CLIENT_ASSIGN_OR_RETURN(const std::vector<ImageFile> calibration,
                               ListImages(args.calibration, args.label_offset));
  std::vector<Sample> samples;
  std::map<std::string, size_t> place;  // by path: an image of both uses is sent once
  for (const ImageFile& file : ChooseImages(calibration, args.calibration_count, args.seed)) {
    place[file.path] = samples.size();
    samples.push_back({file, true, false});
  }
  if (args.evaluation.empty()) return samples;
  TERN_CLIENT_ASSIGN_OR_RETURN(std::vector<ImageFile> evaluation,
                               ListImages(args.evaluation, args.label_offset));
  if (args.limit > 0) evaluation = ChooseImages(evaluation, args.limit, args.seed);
  for (const ImageFile& file : evaluation) {
    const auto [it, is_new] = place.emplace(file.path, samples.size());
    if (is_new) samples.push_back({file, false, false});
    samples[it->second].evaluation = true;
  }
  return samples;
}

absl::StatusOr<QuantizeOutcome> Quantize(const Cli& cli, const QuantizeArgs& args,
                                         uint32_t cluster) {
  v1::QuantizeStart start;
  start.set_model(args.model);
  start.set_source_version(args.from);
  start.set_set_default(args.set_default);
  v1::Recipe& recipe = *start.mutable_recipe();
  recipe.set_weights(args.weights == "int8"   ? v1::INT8
                     : args.weights == "int4" ? v1::INT4_CLUSTER
                                              : v1::TERNARY_CLUSTER);
  if (args.weights != "int8") recipe.set_cluster_size(cluster);
  recipe.set_activations(args.activations == "dfp8" ? v1::DFP8 : v1::AFFINE);
  recipe.set_method(args.method == "direct"      ? v1::DIRECT
                    : args.method == "corrected" ? v1::CORRECTED
                                                 : v1::COMPENSATED);
  recipe.set_quantize_first_and_last_to_weights(args.quantize_first_and_last);
  recipe.set_seed(args.seed);
  if (args.max_top1_drop >= 0) recipe.set_max_top1_drop(args.max_top1_drop);

  TERN_CLIENT_ASSIGN_OR_RETURN(std::vector<Sample> samples, Samples(args));
  TERN_CLIENT_ASSIGN_OR_RETURN(auto client, cli.Connect());
  Sender sender(std::move(samples), cli.quiet);
  return client->Quantize(start, sender.source(), sender.callback());
}

int RunQuantize(const Cli& cli, const QuantizeArgs& args, uint32_t cluster) {
  const absl::StatusOr<QuantizeOutcome> outcome = Quantize(cli, args, cluster);
  if (!outcome.ok()) return cli.Fail(outcome.status());
  const v1::QuantizeResult& result = outcome->result;
  if (cli.json) {
    cli.Print(ToJson(result));
  } else {
    PrintReport(result.report(), std::cout);
    if (result.published()) {
      std::cout << "\npublished " << Printable(result.model()) << " version " << result.version()
                << "\n";
    } else {
      std::cout << "\nnot published\n";
    }
  }
  if (outcome->gate.ok()) return kOk;
  cli.Fail(outcome->gate);
  return kGateNotMet;
}

struct EvaluateArgs {
  ModelArgs model;
  uint64_t reference = 0;
  std::string data;
  int label_offset = 0;
  uint64_t limit = 0;
  uint64_t seed = 0;
};

absl::StatusOr<v1::EvaluateResult> Evaluate(const Cli& cli, const EvaluateArgs& args) {
  v1::EvaluateStart start;
  start.set_model(args.model.model);
  start.set_version(args.model.version);
  start.set_reference_version(args.reference);
  TERN_CLIENT_ASSIGN_OR_RETURN(std::vector<ImageFile> images,
                               ListImages(args.data, args.label_offset));
  if (args.limit > 0) images = ChooseImages(images, args.limit, args.seed);
  std::vector<Sample> samples;
  samples.reserve(images.size());
  for (ImageFile& image : images) samples.push_back({std::move(image), false, true});
  TERN_CLIENT_ASSIGN_OR_RETURN(auto client, cli.Connect());
  Sender sender(std::move(samples), cli.quiet);
  return client->Evaluate(start, sender.source(), sender.callback());
}

int RunEvaluate(const Cli& cli, const EvaluateArgs& args) {
  const absl::Time begin = absl::Now();
  const absl::StatusOr<v1::EvaluateResult> result = Evaluate(cli, args);
  if (!result.ok()) return cli.Fail(result.status());
  const double seconds = absl::ToDoubleSeconds(absl::Now() - begin);
  if (cli.json) {
    Json json = ToJson(*result);
    json["seconds"] = seconds;
    cli.Print(json);
    return kOk;
  }
  std::cout << Printable(result->model()) << " version " << result->version() << ", "
            << result->images() << " images (" << result->labelled() << " labelled), "
            << Fixed(seconds, 1) << " s\n";
  Table table({{""}, {"VALUE (95 % INTERVAL)"}});
  table.Add({"top-1", Interval(result->top1())});
  table.Add({"top-5", Interval(result->top5())});
  if (args.reference > 0) {
    table.Add({absl::StrCat("agrees with ", args.reference), Interval(result->agreement())});
  }
  table.Print(std::cout);
  return kOk;
}

}  // namespace

void AddQuantizeCommands(CLI::App& app, Cli& cli) {
  {
    CLI::App* command = app.add_subcommand("quantize", "Makes a low-precision version of a model");
    command->footer(
        "Examples:\n"
        "  ternctl quantize --model r20 --weights int8 --calibration train/\n"
        "  ternctl quantize --model r20 --weights ternary --cluster 64 --calibration train/ \\\n"
        "                   --evaluation test/ --max-top1-drop 0.02 --set-default");
    auto args = std::make_shared<QuantizeArgs>();
    command->add_option("--model,-m", args->model, "The model's name")->required();
    command->add_option("--from", args->from, "Float version to start from; 0 = the lowest");
    command->add_option("--weights,-w", args->weights, "Weights")
        ->required()
        ->check(CLI::IsMember({"int8", "int4", "ternary"}));
    command->add_option("--cluster,-N", args->cluster,
                        "Input channels that share one scale, 1..256 or all (not for int8)");
    command->add_option("--method", args->method, "How codes are chosen")
        ->check(CLI::IsMember({"compensated", "corrected", "direct"}));
    command->add_option("--activations", args->activations, "8-bit activations")
        ->check(CLI::IsMember({"affine", "dfp8"}));
    command->add_option("--calibration", args->calibration, "Folder of calibration images")
        ->required()
        ->check(CLI::ExistingDirectory);
    command->add_option("--calibration-count", args->calibration_count,
                        "How many of them, spread over the classes; 0 = all");
    command->add_option("--evaluation", args->evaluation, "Folder of labelled images to measure on")
        ->check(CLI::ExistingDirectory);
    command->add_option("--limit", args->limit, "At most so many evaluation images; 0 = all");
    command->add_option("--label-offset", args->label_offset, "Added to every label");
    command->add_option("--seed", args->seed, "Of the choice of images and of the method");
    command->add_option("--max-top1-drop", args->max_top1_drop,
                        "Publish only if top-1 falls by no more than this fraction (0.01 = one "
                        "point); negative: always publish");
    command->add_flag("--quantize-first-and-last", args->quantize_first_and_last,
                      "The first and last layer too (else they stay int8)");
    command->add_flag("--set-default", args->set_default, "Make the new version the default");
    command->callback([&cli, args] {
      const absl::StatusOr<uint32_t> cluster = ClusterSize(args->cluster);
      if (!cluster.ok()) {
        throw CLI::ValidationError(std::string(cluster.status().message()));
      }
      cli.run = [&cli, args, n = *cluster] { return RunQuantize(cli, *args, n); };
    });
  }
  {
    CLI::App* command = app.add_subcommand("evaluate", "Measures accuracy on labelled images");
    command->footer(
        "Example:\n  ternctl evaluate --model r20 --version 2 --reference-version 1 --data test/");
    auto args = std::make_shared<EvaluateArgs>();
    AddModelArgs(command, &args->model, "Version; 0 = the default");
    command->add_option("--data,-d", args->data, "Folder of images")
        ->required()
        ->check(CLI::ExistingDirectory);
    command->add_option("--label-offset", args->label_offset,
                        "Added to every label (1 for networks with a background class)");
    command->add_option("--reference-version", args->reference,
                        "Also count how often the top-1 agrees with this version; 0 = none");
    command->add_option("--limit", args->limit,
                        "At most so many images, spread over the classes; 0 = all");
    command->add_option("--seed", args->seed, "Of the choice of --limit");
    command->callback([&cli, args] { cli.run = [&cli, args] { return RunEvaluate(cli, *args); }; });
  }
}

}  // namespace tern::client
