// ternctl compare: every version of a model side by side on the same images.

#include <iostream>
#include <memory>

#include "absl/strings/str_cat.h"
#include "client/commands.h"
#include "client/contract.h"
#include "client/load_generator.h"
#include "client/progress.h"
#include "client/status.h"
#include "client/table.h"

namespace tern::client {
namespace {

struct CompareArgs {
  std::string model;
  std::string data;
  int label_offset = 0;
  LoadOptions load;
};

struct Row {
  v1::ModelVersion version;
  v1::EvaluateResult accuracy;
  LoadResult speed;
};

// Float versions are the reference of agreement: the lowest ready one.
uint64_t ReferenceOf(const v1::ListResponse& versions) {
  for (const v1::ModelVersion& version : versions.versions()) {
    if (version.state() == v1::READY && version.scheme() == "fp32") return version.version();
  }
  return 0;
}

absl::StatusOr<std::vector<Row>> Compare(const Cli& cli, const CompareArgs& args) {
  TERN_CLIENT_ASSIGN_OR_RETURN(auto client, cli.Connect());
  TERN_CLIENT_ASSIGN_OR_RETURN(
      const std::vector<ImageFile> files,
      ListImages(args.data, LabelsOf(*client, args.model, 0, args.label_offset)));
  TERN_CLIENT_ASSIGN_OR_RETURN(const v1::ListResponse versions, client->Models(args.model));
  const uint64_t reference = ReferenceOf(versions);
  std::vector<v1::ClassifyRequest> requests;
  for (const ImageFile& file : ChooseImages(files, 200, args.load.seed)) {
    v1::ClassifyRequest request;
    TERN_CLIENT_ASSIGN_OR_RETURN(*request.mutable_image(), ReadFile(file.path, size_t{60} << 20));
    request.set_model(args.model);
    requests.push_back(std::move(request));
  }
  std::vector<Row> rows;
  Progress progress(cli.quiet);
  for (int i = 0; i < versions.versions_size(); ++i) {
    Row row;
    row.version = versions.versions(i);
    if (row.version.state() != v1::READY) continue;
    const double done = static_cast<double>(i) / versions.versions_size();
    progress.Show("comparing", done, absl::StrCat("version ", row.version.version()), -1);
    v1::EvaluateStart start;
    start.set_model(args.model);
    start.set_version(row.version.version());
    start.set_reference_version(reference);
    size_t next = 0;
    TERN_CLIENT_ASSIGN_OR_RETURN(
        row.accuracy,
        client->Evaluate(start, [&]() -> absl::StatusOr<std::optional<v1::SampleImage>> {
          if (next == files.size()) return std::nullopt;
          const ImageFile& file = files[next++];
          v1::SampleImage image;
          TERN_CLIENT_ASSIGN_OR_RETURN(*image.mutable_image(),
                                       ReadFile(file.path, size_t{60} << 20));
          image.set_name(file.path);
          if (file.label.has_value()) image.set_label(*file.label);
          return image;
        }));
    for (v1::ClassifyRequest& request : requests) request.set_version(row.version.version());
    row.speed = RunLoad(args.load, [&](uint64_t number, Done on_answer) {
      client->ClassifyAsync(requests[number % requests.size()], std::move(on_answer));
    });
    rows.push_back(std::move(row));
  }
  return rows;
}

std::string Scheme(const v1::ModelVersion& version) {
  if (version.cluster_size() == 0) return version.scheme();
  return absl::StrCat(version.scheme(), " N=", version.cluster_size());
}

int RunCompare(const Cli& cli, const CompareArgs& args) {
  const absl::StatusOr<std::vector<Row>> rows = Compare(cli, args);
  if (!rows.ok()) return cli.Fail(rows.status());
  if (cli.json) {
    Json json;
    json["model"] = args.model;
    json["versions"] = Json::array();
    for (const Row& row : *rows) {
      Json entry = ToJson(row.version);
      entry["accuracy"] = ToJson(row.accuracy);
      entry["speed"] = ToJson(row.speed);
      json["versions"].push_back(std::move(entry));
    }
    cli.Print(json);
    return kOk;
  }
  Table table({{"VERSION", Table::kRight},
               {"WEIGHTS"},
               {"BITS/WEIGHT", Table::kRight},
               {"FILE", Table::kRight},
               {"TOP-1", Table::kRight},
               {"AGREES WITH FLOAT", Table::kRight},
               {"P50 MS", Table::kRight},
               {"IMAGES/S", Table::kRight}});
  for (const Row& row : *rows) {
    table.Add(
        {absl::StrCat(row.version.version(), row.version.is_default() ? "*" : ""),
         Scheme(row.version), Fixed(row.version.bits_per_weight(), 2), Bytes(row.version.bytes()),
         row.accuracy.top1().total() > 0 ? Percent(row.accuracy.top1().value()) : "-",
         row.accuracy.agreement().total() > 0 ? Percent(row.accuracy.agreement().value()) : "-",
         Fixed(row.speed.p50_ms, 3), Fixed(row.speed.images_per_second, 0)});
  }
  table.Print(std::cout);
  std::cout << "* = default; " << (rows->empty() ? 0 : rows->front().accuracy.images())
            << " images; p50 and images/s over gRPC, " << args.load.concurrency
            << " request(s) in flight\n";
  return kOk;
}

}  // namespace

void AddCompareCommand(CLI::App& app, Cli& cli) {
  auto args = std::make_shared<CompareArgs>();
  args->load.concurrency = 1;
  args->load.seconds = 2;
  args->load.warmup = 0.2;
  CLI::App* command = app.add_subcommand(
      "compare", "Every version of a model side by side: size, accuracy, agreement, latency");
  command->add_option("--model,-m", args->model, "The model's name")->required();
  command->add_option("--data,-d", args->data, "Folder of images, labelled or not")->required();
  command->add_option("--label-offset", args->label_offset, kLabelOffsetHelp);
  command->add_option("--seconds", args->load.seconds, "Measured time per version")
      ->check(CLI::Range(0.1, 3600.0));
  command->add_option("--concurrency,-c", args->load.concurrency, "Requests in flight")
      ->check(CLI::Range(1, 10000));
  command->callback([&cli, args] { cli.run = [&cli, args] { return RunCompare(cli, *args); }; });
}

}  // namespace tern::client
