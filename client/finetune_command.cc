// ternctl finetune: fetches a version, trains it with tern-finetune and uploads the result.

#include <cerrno>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <iostream>
#include <map>
#include <memory>

#include "absl/strings/str_cat.h"
#include "client/child_process.h"
#include "client/commands.h"
#include "client/progress.h"
#include "client/recipe.h"
#include "client/samples.h"
#include "client/status.h"
#include "client/table.h"

namespace tern::client {
namespace {

struct FinetuneArgs {
  ModelArgs model;
  uint64_t float_version = 0;
  std::string data;
  std::string folder;
  std::string tool;
  std::map<std::string, std::string> passed;  // options of the tool, as given
  std::vector<std::string> more;              // what follows --
  bool resume = false;
  bool set_default = false;
  // Of the quantisation, if the version is a float one.
  std::string weights = "ternary";
  std::string cluster = "64";
  uint64_t calibration_count = 500;
};

absl::Status Fetch(Client& client, const std::string& model, uint64_t version,
                   const std::string& path) {
  std::ofstream file(path, std::ios::binary | std::ios::trunc);
  if (!file) return absl::NotFoundError(absl::StrCat(path, ": ", std::strerror(errno)));
  TERN_CLIENT_RETURN_IF_ERROR(
      client.Export(model, version, v1::ExportRequest::STORED, file).status());
  file.close();
  if (!file) return absl::DataLossError(absl::StrCat("writing ", path, " failed"));
  return absl::OkStatus();
}

// Makes a quantised version to start from; its number.
absl::StatusOr<uint64_t> Quantise(const Cli& cli, Client& client, const FinetuneArgs& args,
                                  uint64_t source) {
  v1::QuantizeStart start;
  start.set_model(args.model.model);
  start.set_source_version(source);
  start.mutable_recipe()->set_weights(WeightsNamed(args.weights));
  if (args.weights != "int8") {
    TERN_CLIENT_ASSIGN_OR_RETURN(const uint32_t cluster, ParseClusterSize(args.cluster));
    start.mutable_recipe()->set_cluster_size(cluster);
  }
  TERN_CLIENT_ASSIGN_OR_RETURN(const std::vector<ImageFile> images,
                               ListImages(args.data, LabelsOf(client, args.model.model, source)));
  Progress progress(cli.quiet);
  TERN_CLIENT_ASSIGN_OR_RETURN(
      const QuantizeOutcome outcome,
      client.Quantize(start,
                      ReadSamples(MergeSamples(ChooseImages(images, args.calibration_count, 0), {}),
                                  [](size_t) {}),
                      [&](const v1::JobProgress& p) {
                        progress.Show(p.phase(), p.done() > 0 ? p.done() : -1, p.detail(),
                                      p.seconds_left() > 0 ? p.seconds_left() : -1);
                      }));
  TERN_CLIENT_RETURN_IF_ERROR(outcome.gate);
  return outcome.result.version();
}

void PrintOutcome(const Cli& cli, const v1::ModelVersion& version, uint64_t start) {
  const v1::FineTuningReport& tuning = version.report().fine_tuning();
  if (cli.json) {
    Json json = ToJson(version);
    json["start_version"] = start;
    json["fine_tuning"] = ToJson(tuning);
    cli.Print(json);
    return;
  }
  std::cout << "published " << Printable(version.model()) << " version " << version.version()
            << (version.is_default() ? " (default)" : "") << ": " << version.scheme() << ", "
            << Bytes(version.bytes()) << "\n";
  Table table({{"TOP-1 ON HELD-OUT IMAGES"}, {"VALUE (95 % INTERVAL)"}});
  table.Add({"float", Interval(tuning.float_top1())});
  table.Add({absl::StrCat("version ", start), Interval(tuning.start_top1())});
  table.Add({absl::StrCat("version ", version.version(), ", fine-tuned"), Interval(tuning.top1())});
  table.Print(std::cout);
  std::cout << "Measure on images of your own: ternctl evaluate --model "
            << Printable(version.model()) << " --version " << version.version() << " --data DIR\n";
}

absl::StatusOr<int> Finetune(const Cli& cli, const FinetuneArgs& args) {
  std::string tool = args.tool;
  if (tool.empty()) {
    const absl::StatusOr<std::string> found = FindProgram("tern-finetune");
    if (!found.ok()) {
      return absl::NotFoundError(
          absl::StrCat(found.status().message(),
                       "; `make finetune` builds it (it needs Debian's libtorch-dev), or name it "
                       "with --tool"));
    }
    tool = *found;
  }
  TERN_CLIENT_ASSIGN_OR_RETURN(auto client, cli.Connect());
  TERN_CLIENT_ASSIGN_OR_RETURN(const v1::ModelVersion given,
                               client->Report(args.model.model, args.model.version));
  uint64_t start = given.version(), source = args.float_version;
  if (given.scheme() == "fp32") {
    if (args.resume) {
      return absl::InvalidArgumentError(
          absl::StrCat("version ", start,
                       " is float: resume with the quantised version that was "
                       "trained (--version)"));
    }
    source = start;
    TERN_CLIENT_ASSIGN_OR_RETURN(start, Quantise(cli, *client, args, source));
    std::cerr << "quantised version " << source << " as version " << start << " to start from\n";
  } else if (source == 0) {
    source = given.report().source_version();
  }
  const std::string folder =
      args.folder.empty() ? absl::StrCat("finetune-", args.model.model, "-", start) : args.folder;
  std::error_code code;
  std::filesystem::create_directories(folder, code);
  if (code) return absl::NotFoundError(absl::StrCat(folder, ": ", code.message()));
  const std::string network = folder + "/float.onnx", version = folder + "/start.tern",
                    result = folder + "/tuned.tern";
  TERN_CLIENT_RETURN_IF_ERROR(Fetch(*client, args.model.model, source, network));
  TERN_CLIENT_RETURN_IF_ERROR(Fetch(*client, args.model.model, start, version));
  std::filesystem::remove(result, code);  // of a former run; only what this one writes is imported

  std::vector<std::string> arguments = {tool,     "--float", network,    "--start", version,
                                        "--data", args.data, "--output", result};
  for (const auto& [name, value] : args.passed) {
    if (value.empty()) continue;
    arguments.push_back(name);
    arguments.push_back(value);
  }
  if (args.resume) arguments.push_back("--resume");
  if (cli.quiet) arguments.push_back("--quiet");
  arguments.insert(arguments.end(), args.more.begin(), args.more.end());
  TERN_CLIENT_ASSIGN_OR_RETURN(const int exit_status, RunInForeground(arguments));
  if (exit_status != 0) {
    std::cerr << "ternctl: " << tool
              << (exit_status > 128 ? absl::StrCat(" was stopped by signal ", exit_status - 128)
                                    : absl::StrCat(" failed with status ", exit_status))
              << "; nothing was imported";
    if (std::filesystem::exists(result + ".checkpoint", code)) {
      std::cerr << "; the checkpoint is " << result << ".checkpoint: repeat with --version "
                << start << " --resume";
    }
    std::cerr << "\n";
    return exit_status;
  }
  // A model that was deleted and made anew while this trained has none of the old one's numbers.
  if (absl::IsNotFound(client->Report(args.model.model, source).status())) {
    return absl::FailedPreconditionError(
        absl::StrCat("the source version ", source, " of '", args.model.model,
                     "' was deleted meanwhile; nothing was imported, the result is ", result));
  }
  v1::ImportStart import;
  import.set_name(args.model.model);
  import.set_artifact(true);
  import.set_set_default(args.set_default);
  std::ifstream file(result, std::ios::binary);
  if (!file) {
    return absl::DataLossError(absl::StrCat(tool, " ended well, but wrote no ", result));
  }
  TERN_CLIENT_ASSIGN_OR_RETURN(const v1::ModelVersion imported, client->Import(import, file));
  TERN_CLIENT_ASSIGN_OR_RETURN(const v1::ModelVersion report,
                               client->Report(args.model.model, imported.version()));
  PrintOutcome(cli, report, start);
  return static_cast<int>(kOk);
}

}  // namespace

void AddFinetuneCommand(CLI::App& app, Cli& cli) {
  CLI::App* command = app.add_subcommand(
      "finetune", "Trains a quantised version on labelled images, here, with tern-finetune");
  command->footer(
      "Example:\n"
      "  ternctl finetune --model demo --version 3 --data train/ --epochs 3\n"
      "A float version is quantised first (--weights, --cluster). Other options of tern-finetune\n"
      "follow after --. The server sees no training image but those of that quantisation.");
  auto args = std::make_shared<FinetuneArgs>();
  AddModelArgs(command, &args->model, "Version to start from; 0 = the default");
  command->add_option("--float-version", args->float_version,
                      "The float version it was made from; 0 = the one its report names");
  command->add_option("--data,-d", args->data, "Labelled images, one sub-folder per class")
      ->required()
      ->check(CLI::ExistingDirectory);
  command->add_option("--folder", args->folder,
                      "Where files and checkpoints go (default: ./finetune-MODEL-VERSION)");
  command->add_option("--tool", args->tool,
                      "tern-finetune (default: beside ternctl, else in PATH)");
  for (const char* name : {"--epochs", "--batch", "--lr", "--distil-weight", "--crop-padding",
                           "--held-out", "--limit", "--label-offset", "--seed", "--threads"}) {
    command->add_option(name, args->passed[name], "As tern-finetune's");
  }
  command->add_flag("--resume", args->resume, "Continue from the folder's checkpoint");
  command->add_flag("--set-default", args->set_default, "Make the new version the default");
  command->add_option("--weights,-w", args->weights, "Weights, if the version is float")
      ->check(CLI::IsMember({"int8", "int4", "int3", "ternary"}));
  command->add_option("--cluster,-N", args->cluster,
                      "Cluster size, 1..256 or all, if the version is float");
  command->add_option("--calibration-count", args->calibration_count,
                      "Images of --data to quantise with, if the version is float");
  command->add_option("tool_options", args->more, "After --: further options of tern-finetune");
  command->callback([&cli, args] {
    cli.run = [&cli, args] {
      const absl::StatusOr<int> status = Finetune(cli, *args);
      return status.ok() ? *status : cli.Fail(status.status());
    };
  });
}

}  // namespace tern::client
