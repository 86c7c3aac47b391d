// ternctl import, models, report, export, set-default, load, unload, delete.

#include <cerrno>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <iostream>
#include <map>
#include <memory>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "client/commands.h"
#include "client/contract.h"
#include "client/output_file.h"
#include "client/progress.h"
#include "client/status.h"
#include "client/table.h"

namespace tern::client {
namespace {

std::string StateName(v1::VersionState state) {
  std::string name = v1::VersionState_Name(state);
  for (char& c : name) c = static_cast<char>(std::tolower(c));
  return name;
}

std::string ClusterName(uint32_t size, const std::string& scheme) {
  if (scheme == "fp32" || scheme == "int8") return "-";
  return size == 0 ? "all" : absl::StrCat(size);
}

void PrintVersion(const v1::ModelVersion& version, const std::string& verb) {
  std::cout << verb << " " << Printable(version.model()) << " version " << version.version()
            << (version.is_default() ? " (default)" : "") << ": " << version.scheme() << ", "
            << Bytes(version.bytes()) << ", " << StateName(version.state()) << "\n";
}

struct ImportArgs {
  std::string name;
  std::string onnx;
  std::string artifact;
  std::string preprocess;
  std::string labels;
  bool jpeg_scaling = false;
  bool set_default = false;
};

absl::StatusOr<v1::ModelVersion> Import(const Cli& cli, const ImportArgs& args) {
  v1::ImportStart start;
  start.set_name(args.name);
  start.set_set_default(args.set_default);
  start.set_artifact(!args.artifact.empty());
  if (!start.artifact()) {
    TERN_CLIENT_ASSIGN_OR_RETURN(*start.mutable_preprocessing(),
                                 LoadPreprocessing(args.preprocess));
    if (args.jpeg_scaling) start.mutable_preprocessing()->set_jpeg_scaling(true);
  }
  if (!args.labels.empty()) {
    TERN_CLIENT_ASSIGN_OR_RETURN(const std::vector<std::string> labels, LoadLabels(args.labels));
    start.mutable_labels()->Add(labels.begin(), labels.end());
  }
  const std::string& path = start.artifact() ? args.artifact : args.onnx;
  std::ifstream file(path, std::ios::binary);
  if (!file) return absl::NotFoundError(absl::StrCat(path, ": ", std::strerror(errno)));
  TERN_CLIENT_ASSIGN_OR_RETURN(auto client, cli.Connect());
  Progress progress(cli.quiet);
  progress.Show("importing", -1, path, -1);
  return client->Import(start, file);
}

int RunModels(const Cli& cli, const std::string& model) {
  const auto client = cli.Connect();
  if (!client.ok()) return cli.Fail(client.status());
  const absl::StatusOr<v1::ListResponse> list = (*client)->Models(model);
  if (!list.ok()) return cli.Fail(list.status());
  if (cli.json) {
    Json json;
    json["versions"] = Json::array();
    for (const auto& version : list->versions()) json["versions"].push_back(ToJson(version));
    cli.Print(json);
    return kOk;
  }
  Table table({{"MODEL"},
               {"VERSION", Table::kRight},
               {"DEFAULT"},
               {"STATE"},
               {"SCHEME"},
               {"N", Table::kRight},
               {"BITS/WEIGHT", Table::kRight},
               {"SIZE", Table::kRight},
               {"INPUT"},
               {"CLASSES", Table::kRight},
               {"REASON"}});
  for (const v1::ModelVersion& version : list->versions()) {
    std::vector<std::string> row = {version.model(), absl::StrCat(version.version()),
                                    version.is_default() ? "*" : "", StateName(version.state())};
    if (version.scheme().empty()) {
      row.insert(row.end(), 6, "-");  // never read: nothing is known of its network
    } else {
      row.insert(row.end(),
                 {version.scheme(), ClusterName(version.cluster_size(), version.scheme()),
                  Fixed(version.bits_per_weight(), 2), Bytes(version.bytes()),
                  absl::StrJoin(version.input_shape(), "x"), absl::StrCat(version.classes())});
    }
    row.push_back(version.reason());
    table.Add(std::move(row));
  }
  table.Print(std::cout);
  return kOk;
}

int RunReport(const Cli& cli, const ModelArgs& args) {
  const auto client = cli.Connect();
  if (!client.ok()) return cli.Fail(client.status());
  const absl::StatusOr<v1::ModelVersion> version = (*client)->Report(args.model, args.version);
  if (!version.ok()) return cli.Fail(version.status());
  if (cli.json) {
    Json json = ToJson(*version);
    json["labels"] = std::vector<std::string>(version->labels().begin(), version->labels().end());
    json["report"] = version->has_report() ? ToJson(version->report()) : Json();
    cli.Print(json);
    return kOk;
  }
  PrintVersion(*version, "model");
  if (!version->has_report()) {
    std::cout << (version->scheme() == "fp32" ? "a float network: it has no quantisation report\n"
                                              : "imported quantised: Tern has no report of how\n");
    return kOk;
  }
  PrintReport(version->report(), std::cout);
  return kOk;
}

absl::StatusOr<std::string> Export(const Cli& cli, const ModelArgs& args,
                                   v1::ExportRequest::Format format, const std::string& output) {
  TERN_CLIENT_ASSIGN_OR_RETURN(auto client, cli.Connect());
  if (output == "-") return client->Export(args.model, args.version, format, std::cout);
  TERN_CLIENT_ASSIGN_OR_RETURN(const std::unique_ptr<OutputFile> file, OutputFile::Open(output));
  TERN_CLIENT_ASSIGN_OR_RETURN(std::string name,
                               client->Export(args.model, args.version, format, file->stream()));
  TERN_CLIENT_RETURN_IF_ERROR(file->Keep());
  return name;
}

int RunExport(const Cli& cli, const ModelArgs& args, v1::ExportRequest::Format format,
              const std::string& output) {
  if (cli.json && output == "-") {
    std::cerr << "ternctl: --json and --output - both want standard output\n";
    return kUsage;
  }
  const absl::StatusOr<std::string> name = Export(cli, args, format, output);
  if (!name.ok()) return cli.Fail(name.status());
  if (output == "-") return kOk;
  std::error_code code;
  const uint64_t bytes = std::filesystem::file_size(output, code);  // an error for a pipe
  if (cli.json) {
    Json json;
    json["file_name"] = *name;
    json["output"] = output;
    json["bytes"] = code ? Json() : Json(bytes);
    cli.Print(json);
  } else {
    std::cout << "wrote " << Printable(output) << " (" << Printable(*name)
              << (code ? "" : absl::StrCat(", ", Bytes(bytes))) << ")\n";
  }
  return kOk;
}

using VersionMethod = absl::StatusOr<v1::ModelVersion> (Client::*)(const std::string&, uint64_t);

int RunOnVersion(const Cli& cli, const ModelArgs& args, VersionMethod method,
                 const std::string& verb) {
  const auto client = cli.Connect();
  if (!client.ok()) return cli.Fail(client.status());
  const absl::StatusOr<v1::ModelVersion> version = ((**client).*method)(args.model, args.version);
  if (!version.ok()) return cli.Fail(version.status());
  if (cli.json) {
    cli.Print(ToJson(*version));
  } else {
    PrintVersion(*version, verb);
  }
  return kOk;
}

int RunDelete(const Cli& cli, const ModelArgs& args) {
  const auto client = cli.Connect();
  if (!client.ok()) return cli.Fail(client.status());
  const absl::StatusOr<v1::DeleteResponse> response = (*client)->Delete(args.model, args.version);
  if (!response.ok()) return cli.Fail(response.status());
  if (cli.json) {
    Json json;
    json["model"] = args.model;
    json["versions_removed"] = response->versions_removed();
    cli.Print(json);
  } else {
    std::cout << "removed " << response->versions_removed() << " version(s) of " << args.model
              << "\n";
  }
  return kOk;
}

void AddVersionCommand(CLI::App& app, Cli& cli, const std::string& name, const std::string& help,
                       const std::string& version_help, bool version_required, VersionMethod method,
                       const std::string& verb) {
  CLI::App* command = app.add_subcommand(name, help);
  auto args = std::make_shared<ModelArgs>();
  AddModelArgs(command, args.get(), version_help);
  if (version_required) command->get_option("--version")->required();
  command->callback([&cli, args, method, verb] {
    cli.run = [&cli, args, method, verb] { return RunOnVersion(cli, *args, method, verb); };
  });
}

}  // namespace

void AddRegistryCommands(CLI::App& app, Cli& cli) {
  {
    CLI::App* command = app.add_subcommand(
        "import", "Uploads an ONNX network or an exported artifact as a new version");
    command->footer(
        "Examples:\n  ternctl import --name r20 --onnx resnet20.onnx --preprocess cifar10\n"
        "  ternctl import --name r20 --artifact resnet20-ternary.tern");
    auto args = std::make_shared<ImportArgs>();
    command->add_option("--name,-n", args->name, "The model's name: [a-z0-9][a-z0-9._-]{0,63}")
        ->required();
    CLI::Option* onnx = command
                            ->add_option("--onnx", args->onnx,
                                         "ONNX file, float or int8 in QDQ form, weights inside")
                            ->check(CLI::ExistingFile);
    CLI::Option* preprocess = command->add_option(
        "--preprocess", args->preprocess,
        "How an image becomes the network's input: cifar10 (Resize 32, centre crop), "
        "imagenet (Resize 256, centre crop), imagenet-299 (Resize 342), or a text-format "
        "tern.v1.Preprocessing file");
    CLI::Option* labels = command->add_option("--labels", args->labels, "Class names, one per line")
                              ->check(CLI::ExistingFile);
    CLI::Option* jpeg_scaling =
        command->add_flag("--jpeg-scaling", args->jpeg_scaling,
                          "Decode large JPEGs at 1/8, 1/4 or 1/2 of their size, where the "
                          "contract's resize step still "
                          "shrinks them: faster, with slightly different pixels");
    onnx->needs(preprocess);
    command
        ->add_option("--artifact", args->artifact,
                     "A .tern file (ternctl export, tern-finetune), which brings its own "
                     "preprocessing and labels")
        ->check(CLI::ExistingFile)
        ->excludes(onnx)
        ->excludes(preprocess)
        ->excludes(jpeg_scaling)
        ->excludes(labels);
    command->add_flag("--set-default", args->set_default,
                      "Make it the default version even if the model has one");
    command->callback([&cli, args] {
      if (args->onnx.empty() && args->artifact.empty()) {
        throw CLI::RequiredError("import: --onnx FILE or --artifact FILE");
      }
      cli.run = [&cli, args] {
        const absl::StatusOr<v1::ModelVersion> version = Import(cli, *args);
        if (!version.ok()) return cli.Fail(version.status());
        if (cli.json) {
          cli.Print(ToJson(*version));
        } else {
          PrintVersion(*version, "imported");
        }
        return static_cast<int>(kOk);
      };
    });
  }
  {
    CLI::App* command = app.add_subcommand("models", "Lists models and versions");
    auto model = std::make_shared<std::string>();
    command->add_option("model", *model, "Only this model");
    command->callback(
        [&cli, model] { cli.run = [&cli, model] { return RunModels(cli, *model); }; });
  }
  {
    CLI::App* command =
        app.add_subcommand("report", "Shows how a version was quantised and what came out");
    auto args = std::make_shared<ModelArgs>();
    AddModelArgs(command, args.get(), "Version; 0 = the default");
    command->callback([&cli, args] { cli.run = [&cli, args] { return RunReport(cli, *args); }; });
  }
  {
    CLI::App* command = app.add_subcommand(
        "export", "Downloads a version: its stored file (.tern or ONNX), or any version as ONNX");
    command->footer(
        "Example:\n  ternctl export --model r20 --version 3 --format onnx --output r20-v3.onnx");
    auto args = std::make_shared<ModelArgs>();
    auto output = std::make_shared<std::string>();
    AddModelArgs(command, args.get(), "Version; 0 = the default");
    command->add_option("--output,-o", *output, "File to write, - for standard output")->required();
    auto format = std::make_shared<v1::ExportRequest::Format>(v1::ExportRequest::STORED);
    const std::map<std::string, v1::ExportRequest::Format> formats{
        {"stored", v1::ExportRequest::STORED}, {"onnx", v1::ExportRequest::ONNX}};
    command
        ->add_option("--format", *format,
                     "stored (default), or onnx: quantised versions with QuantizeLinear and "
                     "DequantizeLinear")
        ->transform(CLI::CheckedTransformer(formats));
    command->callback([&cli, args, output, format] {
      cli.run = [&cli, args, output, format] { return RunExport(cli, *args, *format, *output); };
    });
  }
  AddVersionCommand(app, cli, "set-default", "Makes a version the one served by default", "Version",
                    true, &Client::SetDefault, "now serving");
  AddVersionCommand(app, cli, "load", "Loads a version and waits until it is ready",
                    "Version; 0 = the default", false, &Client::Load, "loaded");
  AddVersionCommand(app, cli, "unload", "Takes a version out of memory", "Version", true,
                    &Client::Unload, "unloaded");
  {
    CLI::App* command = app.add_subcommand("delete", "Removes a version, or a model, from disk");
    auto args = std::make_shared<ModelArgs>();
    auto all = std::make_shared<bool>(false);
    command->add_option("--model,-m", args->model, "The model's name")->required();
    CLI::Option* version =
        command->add_option("--version,-v", args->version, "Version")->check(CLI::PositiveNumber);
    command->add_flag("--all", *all, "All versions: the whole model")->excludes(version);
    command->callback([&cli, args, all] {
      if (args->version == 0 && !*all) {
        throw CLI::RequiredError("delete: --version N or --all");
      }
      cli.run = [&cli, args] { return RunDelete(cli, *args); };
    });
  }
}

}  // namespace tern::client
