// ternctl sweep: one model over cluster sizes and schemes.

#include <google/protobuf/util/json_util.h>
#include <openssl/sha.h>

#include <atomic>
#include <filesystem>
#include <iostream>
#include <map>
#include <memory>
#include <optional>
#include <set>

#include "absl/strings/escaping.h"
#include "absl/strings/str_cat.h"
#include "absl/time/clock.h"
#include "client/commands.h"
#include "client/contract.h"
#include "client/output_file.h"
#include "client/progress.h"
#include "client/recipe.h"
#include "client/samples.h"
#include "client/status.h"
#include "client/sweep.h"
#include "client/table.h"

namespace tern::client {
namespace {

namespace fs = std::filesystem;

struct SweepArgs {
  std::string model;
  uint64_t from = 0;
  std::vector<std::string> weights = {"ternary", "int4", "int8"};
  std::vector<std::string> clusters = {"4", "8", "16", "32", "64", "all"};
  std::vector<std::string> methods = {"compensated"};
  std::vector<std::string> activations = {"affine"};
  std::string distill = "auto";
  std::string calibration;
  std::optional<uint64_t> calibration_count;
  std::string evaluation;
  uint64_t limit = 0;
  uint64_t folds = 0;
  int label_offset = 0;
  uint64_t seed = 0;
  bool quantize_first_and_last = false;
  bool publish = false;
  std::string out;
};

std::string Sha256(const std::string& bytes) {
  unsigned char digest[SHA256_DIGEST_LENGTH];
  SHA256(reinterpret_cast<const unsigned char*>(bytes.data()), bytes.size(), digest);
  return std::string(reinterpret_cast<const char*>(digest), sizeof(digest));
}

// Every recipe once, in the order of the arguments. int8 has no clusters.
std::vector<SweepRow> Rows(const SweepArgs& args, const std::vector<uint32_t>& clusters) {
  std::vector<SweepRow> rows;
  std::set<std::string> seen;
  for (const std::string& activations : args.activations) {
    for (const std::string& method : args.methods) {
      for (const std::string& weights : args.weights) {
        for (uint32_t cluster : weights == "int8" ? std::vector<uint32_t>{0} : clusters) {
          v1::Recipe recipe;
          recipe.set_weights(WeightsNamed(weights));
          recipe.set_cluster_size(cluster);
          recipe.set_activations(ActivationsNamed(activations));
          recipe.set_method(MethodNamed(method));
          recipe.set_distillation(DistillationNamed(args.distill));
          recipe.set_quantize_first_and_last_to_weights(args.quantize_first_and_last);
          recipe.set_seed(args.seed);
          if (seen.insert(recipe.SerializeAsString()).second) rows.push_back({.recipe = recipe});
        }
      }
    }
  }
  return rows;
}

// One quantisation of a row: the images it takes.
absl::StatusOr<std::vector<std::vector<Sample>>> Splits(Client& client, const SweepArgs& args) {
  const Labelling labelling = LabelsOf(client, args.model, args.from, args.label_offset);
  TERN_CLIENT_ASSIGN_OR_RETURN(std::vector<ImageFile> images,
                               ListImages(args.calibration, labelling));
  const auto choose = [&](const std::vector<ImageFile>& from, uint64_t otherwise) {
    return ChooseImages(from, args.calibration_count.value_or(otherwise), args.seed);
  };
  if (args.folds == 0) {
    TERN_CLIENT_ASSIGN_OR_RETURN(std::vector<ImageFile> evaluation,
                                 ListImages(args.evaluation, labelling));
    if (args.limit > 0) evaluation = ChooseImages(evaluation, args.limit, args.seed);
    return std::vector<std::vector<Sample>>{MergeSamples(choose(images, 500), evaluation)};
  }
  if (args.limit > 0) images = ChooseImages(images, args.limit, args.seed);
  if (images.size() < args.folds) {
    return absl::InvalidArgumentError(absl::StrCat("--folds ", args.folds, ": ", args.calibration,
                                                   " has only ", images.size(), " images"));
  }
  const std::vector<std::vector<ImageFile>> parts = SplitFolds(images, args.folds, args.seed);
  std::vector<std::vector<Sample>> splits;
  for (size_t fold = 0; fold < parts.size(); ++fold) {
    std::vector<ImageFile> others;
    for (size_t i = 0; i < parts.size(); ++i) {
      if (i != fold) others.insert(others.end(), parts[i].begin(), parts[i].end());
    }
    splits.push_back(MergeSamples(choose(others, 0), parts[fold]));
  }
  return splits;
}

// Finished quantisations, one file each in DIR/runs, named after everything that determines them:
// the request, the source version and the images' bytes, labels and uses.
class Finished {
 public:
  explicit Finished(std::string out) : out_(std::move(out)) {}

  absl::Status Open() {
    if (out_.empty()) return absl::OkStatus();
    std::error_code code;
    fs::create_directories(fs::path(out_) / "runs", code);
    if (code) return absl::NotFoundError(absl::StrCat(out_, ": ", code.message()));
    return absl::OkStatus();
  }

  absl::StatusOr<std::string> Key(const v1::QuantizeStart& start, const v1::ModelVersion& source,
                                  const std::vector<Sample>& samples) {
    if (out_.empty()) return std::string();
    std::string text = absl::StrCat(start.SerializeAsString(), "|", source.version(), "|",
                                    source.bytes(), "|", source.classes());
    for (const Sample& sample : samples) {
      std::string& hash = hashes_[sample.file.path];
      if (hash.empty()) {
        TERN_CLIENT_ASSIGN_OR_RETURN(const std::string bytes,
                                     ReadFile(sample.file.path, size_t{60} << 20));
        hash = Sha256(bytes);
      }
      absl::StrAppend(&text, "|", sample.file.label ? absl::StrCat(*sample.file.label) : "-",
                      sample.calibration ? "c" : "", sample.evaluation ? "e" : "", hash);
    }
    return absl::BytesToHexString(Sha256(text).substr(0, 16));
  }

  // The result under `key`, or none. A file that does not parse counts as none: it is measured
  // again.
  std::optional<v1::QuantizeResult> Find(const std::string& key) const {
    if (out_.empty()) return std::nullopt;
    const auto text = ReadFile(Path(key), size_t{64} << 20);
    v1::QuantizeResult result;
    if (!text.ok() || !google::protobuf::util::JsonStringToMessage(*text, &result).ok()) {
      return std::nullopt;
    }
    return result;
  }

  absl::Status Keep(const std::string& key, const v1::QuantizeResult& result) const {
    if (out_.empty()) return absl::OkStatus();
    std::string text;
    google::protobuf::util::JsonPrintOptions options;
    options.add_whitespace = true;
    options.preserve_proto_field_names = true;
    if (!google::protobuf::util::MessageToJsonString(result, &text, options).ok()) {
      return absl::InternalError("the report cannot be written as JSON");
    }
    return WriteFile(Path(key), text);
  }

 private:
  std::string Path(const std::string& key) const {
    return (fs::path(out_) / "runs" / (key + ".json")).string();
  }

  const std::string out_;
  std::map<std::string, std::string> hashes_;  // SHA-256 by path
};

class Sweep {
 public:
  Sweep(const Cli& cli, const SweepArgs& args, std::vector<SweepRow> rows)
      : cli_(cli), args_(args), rows_(std::move(rows)), finished_(args.out), progress_(cli.quiet) {}

  absl::Status Run() {
    TERN_CLIENT_RETURN_IF_ERROR(finished_.Open());
    TERN_CLIENT_ASSIGN_OR_RETURN(client_, cli_.Connect());
    // Also tells an unknown model or a server that is down before anything is read.
    TERN_CLIENT_RETURN_IF_ERROR(FindSource());
    TERN_CLIENT_ASSIGN_OR_RETURN(splits_, Splits(*client_, args_));
    for (SweepRow& row : rows_) {
      const absl::Status status = RunRow(row);
      if (!status.ok()) {
        // The message of a server that is unreachable is the same for every row.
        if (absl::IsUnavailable(status) || absl::IsCancelled(status)) return status;
        row.error = status.ToString();
        progress_.Clear();
        std::cerr << "ternctl: " << Title(row) << ": " << Printable(row.error) << "\n";
        done_ += splits_.size() - row.reports.size();
      }
      TERN_CLIENT_RETURN_IF_ERROR(WriteJson());
    }
    progress_.Clear();
    return WritePlots();
  }

  const std::vector<SweepRow>& rows() const { return rows_; }
  bool failed() const {
    return std::any_of(rows_.begin(), rows_.end(),
                       [](const SweepRow& row) { return !row.error.empty(); });
  }

  Json ToJsonText() const {
    Json json;
    json["model"] = args_.model;
    json["source_version"] = source_.version();
    json["calibration"] = args_.calibration;
    json["evaluation"] = args_.folds > 0 ? Json() : Json(args_.evaluation);
    json["folds"] = args_.folds > 0 ? Json(args_.folds) : Json();
    json["seed"] = args_.seed;
    json["rows"] = Json::array();
    for (const SweepRow& row : rows_) {
      if (row.error.empty() && row.reports.empty()) continue;  // not run yet
      json["rows"].push_back(ToJson(row));
    }
    return json;
  }

  void PrintTables(std::ostream& out) const {
    Table table({{"WEIGHTS"},
                 {"N", Table::kRight},
                 {"BITS/WEIGHT", Table::kRight},
                 {"MULTIPLICATIONS GONE", Table::kRight},
                 {"TOP-1 (95 % INTERVAL)"},
                 {"DROP, POINTS (95 % INTERVAL)"},
                 {"AGREES WITH FLOAT"},
                 {"MS", Table::kRight}});
    const SweepFigures* reference = nullptr;
    std::vector<SweepFigures> figures;
    for (const SweepRow& row : rows_) figures.push_back(Pool(row.reports));
    std::vector<double> float_ms;
    for (size_t i = 0; i < rows_.size(); ++i) {
      if (rows_[i].error.empty() && reference == nullptr) reference = &figures[i];
    }
    if (reference != nullptr) {
      table.Add({"float", "-", "32.00", "-", Interval(reference->float_top1), "-", "-",
                 Fixed(reference->float_ms, 3)});
    }
    for (size_t i = 0; i < rows_.size(); ++i) {
      const SweepRow& row = rows_[i];
      const SweepFigures& f = figures[i];
      std::vector<std::string> cells = {
          SchemeName(row.recipe, rows_),
          ClusterName(row.recipe.weights(), row.recipe.cluster_size())};
      if (!row.error.empty()) {
        cells.push_back("failed");
      } else {
        cells.insert(cells.end(), {Fixed(f.bits_per_weight, 2), Percent(f.multiplications_removed),
                                   Interval(f.top1), f.labelled ? Points(f.comparison) : "-",
                                   Interval(f.agreement), Fixed(f.ms, 3)});
      }
      table.Add(std::move(cells));
    }
    table.Print(out);
    if (reference == nullptr) return;
    out << reference->images << " evaluation images";
    if (args_.folds > 0) {
      out << ", each in one of " << args_.folds << " folds; counts added over the folds\n\n";
      PrintFolds(out);
    } else {
      out << "\n";
    }
    std::set<std::string> warnings;
    for (size_t i = 0; i < rows_.size(); ++i) {
      for (const std::string& warning : figures[i].warnings) {
        if (args_.folds == 0 && warnings.insert(warning).second) {
          out << "warning: " << Title(rows_[i]) << ": " << Printable(warning) << "\n";
        }
      }
    }
    if (!args_.out.empty()) {
      out << "written: " << Printable((fs::path(args_.out) / "sweep.json").string())
          << ", drop.svg, bits.svg, ms.svg\n";
    }
  }

 private:
  std::string Title(const SweepRow& row) const {
    const std::string n = ClusterName(row.recipe.weights(), row.recipe.cluster_size());
    return absl::StrCat(SchemeName(row.recipe, rows_), n == "-" ? "" : absl::StrCat(" N=", n));
  }

  void PrintFolds(std::ostream& out) const {
    Table table({{"WEIGHTS"},
                 {"N", Table::kRight},
                 {"FOLD", Table::kRight},
                 {"IMAGES", Table::kRight},
                 {"FLOAT TOP-1", Table::kRight},
                 {"TOP-1", Table::kRight},
                 {"DROP, POINTS", Table::kRight},
                 {"AGREES WITH FLOAT", Table::kRight}});
    for (const SweepRow& row : rows_) {
      if (!row.error.empty()) continue;
      for (size_t fold = 0; fold < row.reports.size(); ++fold) {
        const SweepFigures f = Pool({row.reports[fold]});
        table.Add({SchemeName(row.recipe, rows_),
                   ClusterName(row.recipe.weights(), row.recipe.cluster_size()),
                   absl::StrCat(fold + 1), absl::StrCat(f.images),
                   f.labelled ? Percent(f.float_top1.value()) : "-",
                   f.labelled ? Percent(f.top1.value()) : "-",
                   f.labelled ? Fixed(100 * f.comparison.drop(), 2) : "-",
                   f.agreement.total() > 0 ? Percent(f.agreement.value()) : "-"});
      }
    }
    table.Print(out);
  }

  absl::Status FindSource() {
    TERN_CLIENT_ASSIGN_OR_RETURN(const v1::ListResponse versions, client_->Models(args_.model));
    for (const v1::ModelVersion& version : versions.versions()) {
      const bool wanted = args_.from != 0
                              ? version.version() == args_.from
                              : version.state() == v1::READY && version.scheme() == "fp32";
      if (!wanted) continue;
      source_ = version;
      return absl::OkStatus();
    }
    return absl::NotFoundError(
        args_.from != 0
            ? absl::StrCat("model ", args_.model, " has no version ", args_.from)
            : absl::StrCat("model ", args_.model, " has no float version that is ready"));
  }

  absl::Status RunRow(SweepRow& row) {
    row.resumed = true;
    for (size_t fold = 0; fold < splits_.size(); ++fold) {
      v1::QuantizeStart start;
      start.set_model(args_.model);
      start.set_source_version(source_.version());
      *start.mutable_recipe() = row.recipe;
      start.set_dry_run(!args_.publish);
      TERN_CLIENT_ASSIGN_OR_RETURN(const std::string key,
                                   finished_.Key(start, source_, splits_[fold]));
      std::optional<v1::QuantizeResult> result = finished_.Find(key);
      if (!result.has_value()) {
        row.resumed = false;
        TERN_CLIENT_ASSIGN_OR_RETURN(result, RunOne(row, fold, start));
        TERN_CLIENT_RETURN_IF_ERROR(finished_.Keep(key, *result));
        ++measured_;
      }
      ++done_;
      row.reports.push_back(result->report());
      if (result->published()) row.versions.push_back(result->version());
    }
    return absl::OkStatus();
  }

  absl::StatusOr<v1::QuantizeResult> RunOne(const SweepRow& row, size_t fold,
                                            const v1::QuantizeStart& start) {
    const std::vector<Sample>& samples = splits_[fold];
    std::string title = Title(row);
    if (args_.folds > 0) absl::StrAppend(&title, " fold ", fold + 1);
    std::atomic<size_t> sent{0};
    const auto show = [&](double share, const std::string& detail) {
      const double total = static_cast<double>(rows_.size() * splits_.size());
      const double done = static_cast<double>(done_) + share;
      // Of the quantisations that this call measures; those resumed took no time.
      const double measured = static_cast<double>(measured_) + share;
      const double elapsed = absl::ToDoubleSeconds(absl::Now() - begin_);
      const double left = measured > 0.1 ? elapsed / measured * (total - done) : -1;
      progress_.Show("sweep", done / total, absl::StrCat(title, ": ", detail), left);
    };
    TERN_CLIENT_ASSIGN_OR_RETURN(
        const QuantizeOutcome outcome,
        client_->Quantize(start,
                          ReadSamples(samples,
                                      [&](size_t count) {
                                        sent = count;
                                        show(0.05 * static_cast<double>(count) /
                                                 static_cast<double>(samples.size()),
                                             absl::StrCat("sending ", count, "/", samples.size()));
                                      }),
                          [&](const v1::JobProgress& p) {
                            if (sent < samples.size()) return;
                            // Calibration takes most of the time.
                            const double share = p.phase() == "calibrating" ? 0.05 + 0.75 * p.done()
                                                 : p.phase() == "evaluating" ? 0.8 + 0.15 * p.done()
                                                 : p.phase() == "receiving"  ? 0.05
                                                                             : 0.95;
                            show(share, absl::StrCat(p.phase(), " ", p.detail()));
                          }));
    return outcome.result;
  }

  absl::Status WriteJson() const {
    if (args_.out.empty()) return absl::OkStatus();
    return WriteFile((fs::path(args_.out) / "sweep.json").string(), Dump(ToJsonText()) + "\n");
  }
  absl::Status WritePlots() const {
    if (args_.out.empty()) return absl::OkStatus();
    const fs::path out(args_.out);
    TERN_CLIENT_RETURN_IF_ERROR(
        WriteFile((out / "drop.svg").string(), RenderSvg({LossByClusterSize(args_.model, rows_)})));
    TERN_CLIENT_RETURN_IF_ERROR(
        WriteFile((out / "bits.svg").string(), RenderSvg({AccuracyByBits(args_.model, rows_)})));
    return WriteFile((out / "ms.svg").string(), RenderSvg({AccuracyByTime(args_.model, rows_)}));
  }

  const Cli& cli_;
  const SweepArgs& args_;
  std::vector<SweepRow> rows_;
  std::vector<std::vector<Sample>> splits_;
  Finished finished_;
  std::unique_ptr<Client> client_;
  v1::ModelVersion source_;
  const absl::Time begin_ = absl::Now();
  size_t done_ = 0, measured_ = 0;  // quantisations
  Progress progress_;
};

int RunSweep(const Cli& cli, const SweepArgs& args, const std::vector<uint32_t>& clusters) {
  Sweep sweep(cli, args, Rows(args, clusters));
  const absl::Status status = sweep.Run();
  if (!status.ok()) return cli.Fail(status);
  if (cli.json) {
    cli.Print(sweep.ToJsonText());
  } else {
    sweep.PrintTables(std::cout);
  }
  return sweep.failed() ? kFailed : kOk;
}

}  // namespace

void AddSweepCommand(CLI::App& app, Cli& cli) {
  CLI::App* command = app.add_subcommand(
      "sweep", "Accuracy, size and time over cluster sizes and schemes (publishes nothing)");
  command->footer(
      "Examples:\n"
      "  ternctl sweep --model r20 --calibration train/ --evaluation test/ --out study/\n"
      "  ternctl sweep --model r20 --calibration photos/ --folds 5 --weights ternary --clusters "
      "4,64\n"
      "\n"
      "DIR of --out gets sweep.json, drop.svg, bits.svg, ms.svg, and in runs/ one file per "
      "finished\n"
      "quantisation: a second sweep takes from there what it would measure again. Recipes that "
      "fail\n"
      "are reported, the others go on, and the exit status is 1.");
  auto args = std::make_shared<SweepArgs>();
  command->add_option("--model,-m", args->model, "The model's name")->required();
  command->add_option("--from", args->from, "Float version to start from; 0 = the lowest");
  const auto list = [&](const std::string& name, std::vector<std::string>& values,
                        const std::string& help) {
    return command->add_option(name, values, help)->delimiter(',');
  };
  list("--weights,-w", args->weights, "Weights")
      ->check(CLI::IsMember({"int8", "int4", "int3", "ternary"}));
  list("--clusters,-N", args->clusters, "Input channels that share one scale, each 1..256 or all");
  list("--methods", args->methods, "How codes are chosen")
      ->check(CLI::IsMember({"compensated", "corrected", "direct"}));
  list("--activations", args->activations, "8-bit activations")
      ->check(CLI::IsMember({"affine", "dfp8"}));
  command->add_option("--distill", args->distill, "Training of scales and biases without labels")
      ->check(CLI::IsMember({"auto", "off", "network", "blocks"}));
  command->add_option("--calibration", args->calibration, "Folder of calibration images")
      ->required()
      ->check(CLI::ExistingDirectory);
  command->add_option("--calibration-count", args->calibration_count,
                      "How many of them, spread over the classes; 0 = all. Default: 500, with "
                      "--folds all");
  CLI::Option* evaluation =
      command
          ->add_option("--evaluation", args->evaluation, "Folder of labelled images to measure on")
          ->check(CLI::ExistingDirectory);
  CLI::Option* folds =
      command
          ->add_option(
              "--folds", args->folds,
              "Cross-validation: the calibration images are split into so many parts; each "
              "is evaluated with the others as calibration")
          ->check(CLI::Range(2, 100))
          ->excludes(evaluation);
  command->add_option("--limit", args->limit, "At most so many images to measure on; 0 = all");
  command->add_option("--label-offset", args->label_offset, kLabelOffsetHelp);
  command->add_option("--seed", args->seed, "Of the choice of images and of the methods");
  command->add_flag("--quantize-first-and-last", args->quantize_first_and_last,
                    "The first and last layer too (else they stay int8)");
  command->add_flag("--publish", args->publish, "Keep every network as a version of the model")
      ->excludes(folds);
  command->add_option("--out", args->out, "Folder for the results; made if absent");
  command->callback([&cli, args, evaluation, folds] {
    if (evaluation->empty() && folds->empty()) {
      throw CLI::ValidationError("--evaluation or --folds is needed: images to measure on");
    }
    std::vector<uint32_t> clusters;
    for (const std::string& text : args->clusters) {
      const absl::StatusOr<uint32_t> size = ParseClusterSize(text);
      if (!size.ok())
        throw CLI::ValidationError("--clusters", std::string(size.status().message()));
      clusters.push_back(*size);
    }
    cli.run = [&cli, args, clusters] { return RunSweep(cli, *args, clusters); };
  });
}

}  // namespace tern::client
