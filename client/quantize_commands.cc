// ternctl quantize and evaluate.

#include <atomic>
#include <cmath>
#include <iostream>
#include <memory>

#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "absl/time/clock.h"
#include "client/chart.h"
#include "client/commands.h"
#include "client/output_file.h"
#include "client/progress.h"
#include "client/recipe.h"
#include "client/samples.h"
#include "client/status.h"
#include "client/sweep.h"
#include "client/table.h"

namespace tern::client {
namespace {

// Sends images and shows how far that is; once all are sent, the server's own progress is shown.
class Sender {
 public:
  Sender(std::vector<Sample> samples, bool quiet)
      : count_(samples.size()), samples_(std::move(samples)), progress_(quiet) {}

  SampleSource source() {
    return ReadSamples(std::move(samples_), [this](size_t sent) {
      progress_.Show("sending", static_cast<double>(sent) / static_cast<double>(count_),
                     absl::StrCat(sent, "/", count_, " images"), -1);
      sent_ = sent;
    });
  }

  ProgressCallback callback() {
    return [this](const v1::JobProgress& p) {
      if (sent_ < count_) return;
      progress_.Show(p.phase(), p.done() > 0 ? p.done() : -1, p.detail(),
                     p.seconds_left() > 0 ? p.seconds_left() : -1);
    };
  }

 private:
  const size_t count_;
  std::vector<Sample> samples_;
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
  double target_bits = 0;
  double target_ms = 0;
  std::vector<std::string> layers;
  std::string distill = "auto";
  std::string plot;
  bool quantize_first_and_last = false;
  bool set_default = false;
  bool dry_run = false;
};

absl::StatusOr<std::vector<Sample>> Samples(Client& client, const QuantizeArgs& args) {
  const Labelling labelling = LabelsOf(client, args.model, args.from, args.label_offset);
  TERN_CLIENT_ASSIGN_OR_RETURN(const std::vector<ImageFile> calibration,
                               ListImages(args.calibration, labelling));
  const std::vector<ImageFile> chosen =
      ChooseImages(calibration, args.calibration_count, args.seed);
  if (args.evaluation.empty()) return MergeSamples(chosen, {});
  TERN_CLIENT_ASSIGN_OR_RETURN(std::vector<ImageFile> evaluation,
                               ListImages(args.evaluation, labelling));
  if (args.limit > 0) evaluation = ChooseImages(evaluation, args.limit, args.seed);
  return MergeSamples(chosen, evaluation);
}

// Usage errors are thrown, as CLI11 wants them.
v1::QuantizeStart Start(const QuantizeArgs& args) {
  const auto value = [](const std::string& option, const auto& status_or) {
    if (status_or.ok()) return *status_or;
    throw CLI::ValidationError(option, std::string(status_or.status().message()));
  };
  v1::QuantizeStart start;
  start.set_model(args.model);
  start.set_source_version(args.from);
  start.set_set_default(args.set_default);
  start.set_dry_run(args.dry_run);
  v1::Recipe& recipe = *start.mutable_recipe();
  recipe.set_weights(WeightsNamed(args.weights));
  const uint32_t cluster = value("--cluster", ParseClusterSize(args.cluster));
  if (IsClustered(recipe.weights())) {
    recipe.set_cluster_size(cluster);
  }
  recipe.set_activations(ActivationsNamed(args.activations));
  recipe.set_method(MethodNamed(args.method));
  recipe.set_distillation(DistillationNamed(args.distill));
  recipe.set_quantize_first_and_last_to_weights(args.quantize_first_and_last);
  recipe.set_seed(args.seed);
  if (args.max_top1_drop >= 0) recipe.set_max_top1_drop(args.max_top1_drop);
  if (args.target_bits > 0) recipe.set_target_bits(args.target_bits);
  if (args.target_ms > 0) recipe.set_target_ms(args.target_ms);
  for (const std::string& layer : args.layers) {
    *recipe.add_layers() = value("--layer", ParseLayerChoice(layer));
  }

  const bool mixed = recipe.weights() == v1::MIXED;
  const int targets = recipe.has_target_bits() + recipe.has_target_ms();
  const int budgets = targets + recipe.has_max_top1_drop();
  if (mixed && budgets != 1) {
    throw CLI::ValidationError(
        "--weights mixed needs exactly one of --target-bits, --target-ms and --max-top1-drop");
  }
  if (!mixed && targets > 0) {
    throw CLI::ValidationError("--target-bits and --target-ms are for --weights mixed");
  }
  if (!mixed && !args.plot.empty()) {
    throw CLI::ValidationError("--plot draws the frontier of --weights mixed");
  }
  return start;
}

absl::StatusOr<QuantizeOutcome> Quantize(const Cli& cli, const QuantizeArgs& args,
                                         const v1::QuantizeStart& start) {
  TERN_CLIENT_ASSIGN_OR_RETURN(auto client, cli.Connect());
  TERN_CLIENT_ASSIGN_OR_RETURN(std::vector<Sample> samples, Samples(*client, args));
  Sender sender(std::move(samples), cli.quiet);
  return client->Quantize(start, sender.source(), sender.callback());
}

int RunQuantize(const Cli& cli, const QuantizeArgs& args, const v1::QuantizeStart& start) {
  const absl::StatusOr<QuantizeOutcome> outcome = Quantize(cli, args, start);
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
      std::cout << "\nnot published" << (args.dry_run ? " (dry run)" : "") << "\n";
    }
  }
  if (!args.plot.empty()) {
    const absl::Status plotted = WriteFile(args.plot, RenderSvg(FrontierCharts(result.report())));
    if (!plotted.ok()) return cli.Fail(plotted);
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
  TERN_CLIENT_ASSIGN_OR_RETURN(auto client, cli.Connect());
  TERN_CLIENT_ASSIGN_OR_RETURN(
      std::vector<ImageFile> images,
      ListImages(args.data,
                 LabelsOf(*client, args.model.model, args.model.version, args.label_offset)));
  if (args.limit > 0) images = ChooseImages(images, args.limit, args.seed);
  std::vector<Sample> samples;
  samples.reserve(images.size());
  for (ImageFile& image : images) samples.push_back({std::move(image), false, true});
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
  if (result->has_comparison()) {
    table.Add({"drop in top-1, points", Points(result->comparison())});
    table.Add({"  only one of both right",
               absl::StrCat(args.reference, ": ", result->comparison().only_reference_right(), ", ",
                            result->version(), ": ", result->comparison().only_candidate_right(),
                            " (McNemar p = ",
                            absl::StrFormat("%.3g", result->comparison().p_value()), ")")});
  }
  if (args.reference > 0) {
    table.Add({"divergence", absl::StrCat(Fixed(result->divergence(), 5), " nats per image")});
  }
  table.Print(std::cout);
  PrintWorstClasses(result->worst_classes(), std::cout);
  for (const std::string& warning : result->warnings()) {
    std::cout << "warning: " << Printable(warning) << "\n";
  }
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
        "                   --evaluation test/ --max-top1-drop 0.02 --set-default\n"
        "  ternctl quantize --model r20 --weights mixed --target-bits 3.3 --calibration train/ \\\n"
        "                   --evaluation test/ --plot frontier.svg");
    auto args = std::make_shared<QuantizeArgs>();
    command->add_option("--model,-m", args->model, "The model's name")->required();
    command->add_option("--from", args->from, "Float version to start from; 0 = the lowest");
    command->add_option("--weights,-w", args->weights, "Weights")
        ->required()
        ->check(CLI::IsMember({"int8", "int4", "int3", "ternary", "mixed"}));
    command->add_option("--cluster,-N", args->cluster,
                        "Input channels that share one scale, 1..256 or all (int4, int3, ternary)");
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
    command->add_option("--label-offset", args->label_offset, kLabelOffsetHelp);
    command->add_option("--seed", args->seed, "Of the choice of images and of the method");
    command->add_option("--max-top1-drop", args->max_top1_drop,
                        "Publish only if top-1 falls by no more than this fraction (0.01 = one "
                        "point); negative: always publish");
    command
        ->add_option("--target-bits", args->target_bits,
                     "Mixed: at most so many bits per weight, scales included (1.6..8)")
        ->check([](const std::string& text) {
          double bits = 0;
          const bool ok = absl::SimpleAtod(text, &bits) && bits >= 1.6 && bits <= 8;
          return ok ? "" : "got '" + text + "', want 1.6..8";
        });
    command
        ->add_option("--target-ms", args->target_ms,
                     "Mixed: at most so many milliseconds per image, one thread, batch 1")
        ->check([](const std::string& text) {
          double ms = 0;
          const bool ok = absl::SimpleAtod(text, &ms) && ms > 0 && std::isfinite(ms);
          return ok ? "" : "got '" + text + "', want milliseconds above 0";
        });
    command
        ->add_option(
            "--layer", args->layers,
            "NAME=int8, NAME=int4:N, NAME=int3:N or NAME=ternary:N: this layer's weights, whatever "
            "the others have (repeatable)")
        ->allow_extra_args(false);
    command->add_option("--distill", args->distill, "Training of scales and biases without labels")
        ->check(CLI::IsMember({"auto", "off", "network", "blocks"}));
    command->add_option("--plot", args->plot, "Mixed: draws loss against bits and time, as SVG");
    command->add_flag("--quantize-first-and-last", args->quantize_first_and_last,
                      "The first and last layer too (else they stay int8)");
    CLI::Option* set_default =
        command->add_flag("--set-default", args->set_default, "Make the new version the default");
    command->add_flag("--dry-run", args->dry_run, "Measure and report, publish nothing")
        ->excludes(set_default);
    command->callback([&cli, args] {
      cli.run = [&cli, args, start = Start(*args)] { return RunQuantize(cli, *args, start); };
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
    command->add_option("--label-offset", args->label_offset, kLabelOffsetHelp);
    command->add_option("--reference-version", args->reference,
                        "Also count how often the top-1 agrees with this version; 0 = none");
    command->add_option("--limit", args->limit,
                        "At most so many images, spread over the classes; 0 = all");
    command->add_option("--seed", args->seed, "Of the choice of --limit");
    command->callback([&cli, args] { cli.run = [&cli, args] { return RunEvaluate(cli, *args); }; });
  }
}

}  // namespace tern::client
