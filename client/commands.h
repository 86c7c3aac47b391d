// The sub-commands of ternctl. Each Add function declares its commands on the parser; the chosen
// one leaves itself in Cli::run.
#ifndef TERN_CLIENT_COMMANDS_H_
#define TERN_CLIENT_COMMANDS_H_

#include <CLI/CLI.hpp>
#include <cstdint>
#include <functional>
#include <memory>
#include <optional>
#include <string>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "client/dataset.h"
#include "client/json.h"
#include "client/tern_client.h"

namespace tern::client {

enum ExitCode { kOk = 0, kFailed = 1, kUsage = 2, kGateNotMet = 3 };

// What all commands share.
struct Cli {
  std::string server = "127.0.0.1:8500";
  std::string admin = "127.0.0.1:8501";
  TlsOptions tls;
  std::string token_file;
  bool json = false;
  bool quiet = false;
  double timeout_seconds = 0;  // 0 = the client's defaults
  std::function<int()> run;

  // `retry` false: what fails counts as failed, for measurements.
  absl::StatusOr<std::unique_ptr<Client>> Connect(int channels = 1, bool retry = true) const;
  // Prints `ternctl: CODE: message` on stderr; returns kFailed.
  int Fail(const absl::Status& status) const;
  // Prints JSON on stdout.
  void Print(const Json& json) const;
};

// `ternctl: warning: ` and the text on stderr, the same text once.
void Warn(const std::string& text);

// Labels by the classes of the model's version (0 = the default, or one that is ready);
// ImageFolders need the admin port for it. `client` must outlive it.
Labelling LabelsOf(Client& client, const std::string& model, uint64_t version, int offset = 0);

inline constexpr char kLabelOffsetHelp[] =
    "Added to the indices that a labels.txt or the order of sub-folders gives (1 for networks with "
    "a background class)";

// A model and one of its versions, as most commands take them.
struct ModelArgs {
  std::string model;
  uint64_t version = 0;
};
void AddModelArgs(CLI::App* command, ModelArgs* args, const std::string& version_help);

// What a ClassifyRequest wishes for beside its answer.
struct WishArgs {
  uint32_t priority = 0;  // 0 = the server's default
  std::optional<double> min_accuracy;
  std::optional<double> max_latency_ms;
};
void AddWishArgs(CLI::App* command, WishArgs* args);
void Apply(const WishArgs& args, v1::ClassifyRequest* request);

void AddRegistryCommands(CLI::App& app, Cli& cli);  // import, models, report, export, ...
void AddQuantizeCommands(CLI::App& app, Cli& cli);  // quantize, evaluate
void AddClassifyCommands(CLI::App& app, Cli& cli);  // classify, label, health
void AddBenchCommands(CLI::App& app, Cli& cli);     // bench, profile
void AddCompareCommand(CLI::App& app, Cli& cli);    // compare
void AddSweepCommand(CLI::App& app, Cli& cli);      // sweep
void AddFinetuneCommand(CLI::App& app, Cli& cli);   // finetune

// The quantisation report as text.
void PrintReport(const v1::QuantizationReport& report, std::ostream& out);
// The classes that lost most, with what they are taken for; nothing if there are none.
void PrintWorstClasses(const google::protobuf::RepeatedPtrField<v1::ClassReport>& classes,
                       std::ostream& out);

}  // namespace tern::client

#endif  // TERN_CLIENT_COMMANDS_H_
