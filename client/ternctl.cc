// ternctl: the command line of a Tern server.

#include <CLI/CLI.hpp>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <iostream>
#include <set>
#include <string>

#include "absl/strings/match.h"
#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "client/commands.h"
#include "client/status.h"
#include "client/table.h"

namespace tern::client {

absl::StatusOr<std::unique_ptr<Client>> Cli::Connect(int channels, bool retry) const {
  ClientOptions options;
  options.server = server;
  options.admin = admin;
  options.channels = channels;
  options.tls = tls;
  options.token_file = token_file;
  if (!retry) options.retry.max_attempts = 1;
  if (timeout_seconds > 0) {
    options.deadline = absl::Seconds(timeout_seconds);
    options.transfer_deadline = options.deadline;
    options.job_deadline = options.deadline;
  }
  return Client::Connect(std::move(options));
}

int Cli::Fail(const absl::Status& status) const {
  std::cout.flush();
  std::cerr << "ternctl: " << absl::StatusCodeToString(status.code()) << ": "
            << Printable(std::string(status.message())) << "\n";
  return kFailed;
}

void Warn(const std::string& text) {
  static std::set<std::string> said;
  if (said.insert(text).second) std::cerr << "ternctl: warning: " << Printable(text) << "\n";
}

Labelling LabelsOf(Client& client, const std::string& model, uint64_t version, int offset) {
  Labelling labelling;
  labelling.offset = offset;
  labelling.warn = Warn;
  labelling.classes = [&client, model, version]() -> absl::StatusOr<Classes> {
    TERN_CLIENT_ASSIGN_OR_RETURN(const v1::ListResponse list, client.Models(model));
    uint64_t ready = 0;
    for (const v1::ModelVersion& v : list.versions()) {
      if (v.state() != v1::READY) continue;
      const bool wanted = version == 0 ? ready == 0 || v.is_default() : v.version() == version;
      if (wanted) ready = v.version();
    }
    if (ready == 0) {
      TERN_CLIENT_RETURN_IF_ERROR(client.Report(model, version).status());  // does it exist?
      return absl::UnavailableError(
          absl::StrCat("model ", model,
                       version == 0 ? " has no version" : absl::StrCat(" has no version ", version),
                       " that is ready: its labels say what the sub-folders are"));
    }
    TERN_CLIENT_ASSIGN_OR_RETURN(const v1::ModelVersion found, client.Report(model, ready));
    return Classes{found.classes(), {found.labels().begin(), found.labels().end()}};
  };
  return labelling;
}

void Cli::Print(const Json& json) const { std::cout << Dump(json) << "\n"; }

void AddModelArgs(CLI::App* command, ModelArgs* args, const std::string& version_help) {
  command->add_option("--model,-m", args->model, "The model's name")->required();
  command->add_option("--version,-v", args->version, version_help);
}

namespace {

constexpr char kFooter[] = R"(Examples:
  ternctl import   --name r20 --onnx resnet20.onnx --preprocess cifar10 --labels labels.txt
  ternctl quantize --model r20 --weights ternary --cluster 4 --calibration train/ --evaluation test/
  ternctl classify --model r20 cat.jpg
  ternctl evaluate --model r20 --version 2 --reference-version 1 --data test/
  ternctl sweep    --model r20 --calibration train/ --evaluation test/ --out study/
  ternctl bench    --model r20 --data test/ --concurrency 8 --seconds 10
  ternctl models

Folders of images are one sub-folder per class, or a flat folder with a labels.txt of `file index`
lines. Sub-folders that have the names of the model's labels are those classes; if none has, their
alphabetical order gives the index.
With --json only JSON goes to standard output; progress and errors go to standard error.
Exit status: 0 success, 1 failure, 2 wrong usage, 3 quantised but not published (accuracy gate);
finetune: also what tern-finetune ended with, 128 + n for signal n.)";

// CLI11 takes nan and inf for numbers, and -1 or what is too large for the largest of uint64_t.
void CheckNumbers(CLI::App* command) {
  for (CLI::Option* option : command->get_options()) {
    const std::string type = option->get_type_name();
    if (absl::StartsWith(type, "FLOAT")) {
      option->check([](const std::string& text) {
        double value = 0;
        const bool ok = absl::SimpleAtod(text, &value) && std::isfinite(value);
        return ok ? "" : "got '" + text + "', want a finite number";
      });
    } else if (absl::StartsWith(type, "UINT")) {
      option->check([](const std::string& text) {
        uint64_t value = 0;
        return absl::SimpleAtoi(text, &value) ? ""
                                              : "got '" + text + "', want a number of 0 or more";
      });
    }
  }
  for (CLI::App* child : command->get_subcommands({})) CheckNumbers(child);
}

int Main(int argc, char** argv) {
  Cli cli;
  CLI::App app("Talks to a Tern server: imports, quantises, evaluates and classifies.", "ternctl");
  app.footer(kFooter);
  app.option_defaults()->always_capture_default();
  app.add_option("--server", cli.server,
                 "Data port: HOST:PORT, a list HOST:PORT,HOST:PORT or dns:///HOST:PORT")
      ->envname("TERN_SERVER");
  app.add_option("--admin", cli.admin, "Admin port, HOST:PORT")->envname("TERN_ADMIN");
  app.add_flag("--tls", cli.tls.system_roots, "TLS with the system's authorities");
  app.add_option("--tls-ca", cli.tls.ca, "TLS; PEM file of the server's authorities")
      ->envname("TERN_TLS_CA");
  app.add_option("--tls-cert", cli.tls.certificate, "PEM file of the client's certificate")
      ->envname("TERN_TLS_CERT");
  app.add_option("--tls-key", cli.tls.key, "PEM file of the certificate's key")
      ->envname("TERN_TLS_KEY");
  app.add_option("--tls-server-name", cli.tls.server_name,
                 "Name that the server's certificate must have; empty: the host of the address")
      ->envname("TERN_TLS_SERVER_NAME");
  app.add_option("--token-file", cli.token_file, "File with the bearer token")
      ->envname("TERN_TOKEN_FILE");
  app.add_flag("--json", cli.json, "Print JSON on standard output");
  app.add_flag("--quiet,-q", cli.quiet, "No progress on standard error");
  app.add_option("--timeout", cli.timeout_seconds,
                 "Deadline in seconds of each call; 0: 30 s, 600 s for transfers, none for jobs")
      ->check(CLI::NonNegativeNumber);
  app.set_version_flag(
      "--version",
      [&app]() -> std::string {
        // It falls through from commands that have no --version of their own.
        if (!app.get_subcommands().empty()) throw CLI::ExtrasError("ternctl", {"--version"});
        return "ternctl " TERN_VERSION;
      },
      "Print the version and exit");
  app.require_subcommand(1);
  app.fallthrough();  // --server, --admin, --json, ... may also follow the sub-command
  AddRegistryCommands(app, cli);
  AddQuantizeCommands(app, cli);
  AddClassifyCommands(app, cli);
  AddBenchCommands(app, cli);
  AddCompareCommand(app, cli);
  AddSweepCommand(app, cli);
  AddFinetuneCommand(app, cli);
  CheckNumbers(&app);

  try {
    app.parse(argc, argv);
  } catch (const CLI::ParseError& error) {
    return app.exit(error) == 0 ? kOk : kUsage;  // help is no error
  }
  const int code = cli.run();
  std::cout.flush();
  if (!std::cout) {
    std::fprintf(stderr, "ternctl: DATA_LOSS: writing to standard output failed\n");
    return kFailed;
  }
  return code;
}

}  // namespace
}  // namespace tern::client

int main(int argc, char** argv) { return tern::client::Main(argc, argv); }
