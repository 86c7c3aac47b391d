// ternctl classify, label and health.

#include <deque>
#include <filesystem>
#include <iostream>
#include <iterator>
#include <memory>
#include <mutex>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "absl/time/clock.h"
#include "client/commands.h"
#include "client/contract.h"
#include "client/table.h"

namespace tern::client {
namespace {

constexpr size_t kMaxImageBytes = size_t{60} << 20;  // a message takes 64 MiB

struct ClassifyArgs {
  ModelArgs model;
  WishArgs wishes;
  std::vector<std::string> images;
  uint32_t top_k = 0;  // 0 = 5 for one image, 1 for several
  bool stream = false;
  bool send_labels = false;
  int window = 64;
};

absl::StatusOr<std::string> ReadImage(const std::string& path) {
  if (path != "-") return ReadFile(path, kMaxImageBytes);
  std::string bytes;
  char buffer[1 << 16];
  while (std::cin.read(buffer, sizeof(buffer)) || std::cin.gcount() > 0) {
    bytes.append(buffer, static_cast<size_t>(std::cin.gcount()));
    if (bytes.size() > kMaxImageBytes) {
      return absl::ResourceExhaustedError(
          absl::StrCat("standard input is larger than ", kMaxImageBytes, " bytes"));
    }
  }
  return bytes;
}

// Prints answers as they come, so a folder of any size takes no more memory than one image.
class AnswerPrinter {
 public:
  AnswerPrinter(const Cli& cli, bool single) : cli_(cli), single_(single) {
    if (cli_.json) std::cout << "{\"images\": [";
  }

  void Answer(const std::string& file, const v1::ClassifyResponse& response) {
    std::lock_guard lock(mutex_);
    ++images_;
    if (cli_.json) {
      Json json;
      json["file"] = file;
      json.update(ToJson(response));
      Element(json);
    } else if (single_) {
      Detailed(response);
    } else {
      std::cout << Printable(file);
      for (const v1::ClassScore& score : response.classes()) {
        std::cout << "  " << Name(score) << " " << Fixed(score.probability(), 4);
      }
      std::cout << "\n";
    }
  }

  void Error(const std::string& file, const absl::Status& status) {
    std::lock_guard lock(mutex_);
    ++errors_;
    if (cli_.json) {
      Json json;
      json["file"] = file;
      json["error"]["code"] = absl::StatusCodeToString(status.code());
      json["error"]["message"] = std::string(status.message());
      Element(json);
    }
    cli_.Fail(absl::Status(status.code(), absl::StrCat(Printable(file), ": ", status.message())));
  }

  // Ends the output; returns the exit code.
  int Finish(const absl::Status& status) {
    std::lock_guard lock(mutex_);
    if (cli_.json) {
      std::cout << (images_ + errors_ > 0 ? "\n], " : "], ") << "\"count\": " << images_
                << ", \"errors\": " << errors_ << "}\n";
    } else if (!single_) {
      std::cout << images_ << " images";
      if (errors_ > 0) std::cout << ", " << errors_ << " errors";
      std::cout << "\n";
    }
    if (!status.ok()) return cli_.Fail(status);
    return errors_ > 0 ? kFailed : kOk;
  }

 private:
  static std::string Name(const v1::ClassScore& score) {
    return score.label().empty() ? absl::StrCat("class ", score.index()) : Printable(score.label());
  }

  void Element(const Json& json) {
    std::cout << (images_ + errors_ > 1 ? ",\n" : "\n") << Dump(json, -1);
  }

  void Detailed(const v1::ClassifyResponse& response) {
    Table table(
        {{"", Table::kRight}, {"CLASS"}, {"INDEX", Table::kRight}, {"PROBABILITY", Table::kRight}});
    int rank = 0;
    for (const v1::ClassScore& score : response.classes()) {
      table.Add({absl::StrCat(++rank), Name(score), absl::StrCat(score.index()),
                 Fixed(score.probability(), 4)});
    }
    table.Print(std::cout);
    const v1::Receipt& receipt = response.receipt();
    const v1::Timing& t = receipt.timing();
    const auto ms = [](uint64_t us) { return Fixed(static_cast<double>(us) / 1e3, 2); };
    std::cout << Printable(receipt.model()) << " version " << receipt.version() << ", "
              << receipt.scheme() << " on " << receipt.isa() << ", batch of "
              << receipt.batch_size() << ", request " << Printable(response.request_id()) << "\n";
    if (receipt.degradation() != v1::Receipt::NONE) {
      std::cout << "in place of version " << receipt.degraded_from() << ": "
                << v1::Receipt::Degradation_Name(receipt.degradation()) << "\n";
    }
    std::cout << ms(t.total_us()) << " ms: decode " << ms(t.decode_us()) << ", preprocess "
              << ms(t.preprocess_us()) << ", queue " << ms(t.queue_us()) << ", inference "
              << ms(t.inference_us()) << "\n";
  }

  const Cli& cli_;
  const bool single_;
  std::mutex mutex_;
  uint64_t images_ = 0;
  uint64_t errors_ = 0;
};

v1::ClassifyRequest MakeRequest(const ClassifyArgs& args, const ImageFile& file, uint32_t top_k,
                                std::string bytes) {
  v1::ClassifyRequest request;
  request.set_model(args.model.model);
  request.set_version(args.model.version);
  request.set_top_k(top_k);
  request.set_image(std::move(bytes));
  Apply(args.wishes, &request);
  if (args.send_labels && file.label) request.set_label(*file.label);
  return request;
}

// One stream for all files; answers come in the order of the requests.
absl::Status ClassifyOverStream(Client& client, const ClassifyArgs& args,
                                const std::vector<ImageFile>& files, uint32_t top_k,
                                AnswerPrinter& printer) {
  size_t next = 0;
  std::mutex mutex;
  std::deque<std::string> waiting;  // sent and not answered; at most the window
  return client.ClassifyStream(
      [&]() -> absl::StatusOr<std::optional<v1::ClassifyRequest>> {
        while (next < files.size()) {
          const ImageFile& file = files[next++];
          absl::StatusOr<std::string> bytes = ReadImage(file.path);
          if (!bytes.ok()) {
            printer.Error(file.path, bytes.status());
            continue;
          }
          std::lock_guard lock(mutex);
          waiting.push_back(file.path);
          return MakeRequest(args, file, top_k, *std::move(bytes));
        }
        return std::nullopt;
      },
      [&](const v1::ClassifyStreamResponse& response) -> absl::Status {
        std::string file;
        {
          std::lock_guard lock(mutex);
          if (waiting.empty()) return absl::InternalError("more answers than requests");
          file = std::move(waiting.front());
          waiting.pop_front();
        }
        if (response.has_response()) {
          printer.Answer(file, response.response());
        } else {
          printer.Error(file, absl::Status(static_cast<absl::StatusCode>(response.error().code()),
                                           response.error().message()));
        }
        return absl::OkStatus();
      },
      args.window);
}

int RunClassify(const Cli& cli, const ClassifyArgs& args) {
  const auto client = cli.Connect();
  if (!client.ok()) return cli.Fail(client.status());
  const Labelling labelling = args.send_labels
                                  ? LabelsOf(**client, args.model.model, args.model.version)
                                  : Labelling{.warn = Warn};
  std::vector<ImageFile> files;
  bool folder = false;
  for (const std::string& image : args.images) {
    if (image == "-") {
      files.push_back({image, std::nullopt});
      continue;
    }
    std::error_code code;
    folder = folder || std::filesystem::is_directory(image, code);
    absl::StatusOr<std::vector<ImageFile>> found = ListImages(image, labelling);
    if (!found.ok()) return cli.Fail(found.status());
    files.insert(files.end(), std::make_move_iterator(found->begin()),
                 std::make_move_iterator(found->end()));
  }
  const bool single = files.size() == 1;
  const uint32_t top_k = args.top_k > 0 ? args.top_k : single ? 0 : 1;  // 0 = the server's choice
  AnswerPrinter printer(cli, single);
  if (args.stream || folder) {
    return printer.Finish(ClassifyOverStream(**client, args, files, top_k, printer));
  }
  for (const ImageFile& file : files) {
    absl::StatusOr<std::string> bytes = ReadImage(file.path);
    if (!bytes.ok()) {
      printer.Error(file.path, bytes.status());
      continue;
    }
    const auto answer = (*client)->Classify(MakeRequest(args, file, top_k, *std::move(bytes)));
    if (answer.ok()) {
      printer.Answer(file.path, *answer);
    } else {
      printer.Error(file.path, answer.status());
      // No image will fare better.
      if (absl::IsUnavailable(answer.status()) || absl::IsNotFound(answer.status()) ||
          absl::IsUnimplemented(answer.status())) {
        break;
      }
    }
  }
  return printer.Finish(absl::OkStatus());
}

int RunLabel(const Cli& cli, const std::string& request_id, uint32_t label) {
  const auto client = cli.Connect();
  if (!client.ok()) return cli.Fail(client.status());
  const auto answer = (*client)->ReportLabel(request_id, label);
  if (!answer.ok()) return cli.Fail(answer.status());
  if (cli.json) {
    Json json;
    json["model"] = answer->model();
    json["version"] = answer->version();
    json["top1"] = answer->top1();
    json["top5"] = answer->top5();
    cli.Print(json);
  } else {
    std::cout << Printable(answer->model()) << " version " << answer->version() << ": "
              << (answer->top1()   ? "top-1 was right"
                  : answer->top5() ? "right class among the top 5"
                                   : "right class not among the top 5")
              << "\n";
  }
  return kOk;
}

int RunHealth(const Cli& cli, const std::string& service, double wait_seconds) {
  const auto client = cli.Connect();
  if (!client.ok()) return cli.Fail(client.status());
  const absl::Time deadline = absl::Now() + absl::Seconds(wait_seconds);
  absl::StatusOr<bool> healthy = (*client)->Healthy(service);
  while (!(healthy.ok() && *healthy) && absl::Now() < deadline) {
    absl::SleepFor(absl::Milliseconds(100));
    healthy = (*client)->Healthy(service);
  }
  if (!healthy.ok()) return cli.Fail(healthy.status());
  if (cli.json) {
    Json json;
    json["service"] = service;
    json["serving"] = *healthy;
    cli.Print(json);
  } else {
    std::cout << (*healthy ? "SERVING" : "NOT_SERVING") << "\n";
  }
  return *healthy ? kOk : kFailed;
}

}  // namespace

void AddWishArgs(CLI::App* command, WishArgs* args) {
  command->add_option("--priority", args->priority,
                      "1 = first, up to the server's --priority_levels; 0 = the middle");
  command
      ->add_option("--min-accuracy", args->min_accuracy,
                   "Least published top-1 (0..1) of the version that answers")
      ->check(CLI::Range(0.0, 1.0));
  command
      ->add_option("--max-latency", args->max_latency_ms,
                   "Milliseconds; a faster version may answer to keep it")
      ->check(CLI::Range(0.0, 4e6));
}

void Apply(const WishArgs& args, v1::ClassifyRequest* request) {
  if (args.priority > 0) request->set_priority(args.priority);
  if (args.min_accuracy) request->set_min_accuracy(*args.min_accuracy);
  if (args.max_latency_ms) {
    request->set_max_latency_us(static_cast<uint32_t>(*args.max_latency_ms * 1000));
  }
}

void AddClassifyCommands(CLI::App& app, Cli& cli) {
  {
    CLI::App* command = app.add_subcommand("classify", "Classifies images");
    command->footer(
        "Examples:\n"
        "  ternctl classify --model demo cat.jpg\n"
        "  ternctl classify --model demo --top-k 3 photos/ --json\n"
        "  curl -s https://example.org/cat.jpg | ternctl classify --model demo -");
    auto args = std::make_shared<ClassifyArgs>();
    AddModelArgs(command, &args->model, "Version; 0 = the default");
    command->add_option("images", args->images, "Files, folders, or - for standard input")
        ->required();
    command->add_option("--top-k,-k", args->top_k,
                        "Classes per image; 0 = 5 for one image, 1 for several");
    AddWishArgs(command, &args->wishes);
    command->add_flag("--stream", args->stream, "One ClassifyStream call (folders always do)");
    command->add_option("--window", args->window, "Requests in flight on the stream")
        ->check(CLI::Range(1, 4096));
    command->add_flag("--send-labels", args->send_labels,
                      "Send the class that the folder gives: counts towards live accuracy; "
                      "sub-folders need the admin port, for the model's labels");
    command->callback([&cli, args] { cli.run = [&cli, args] { return RunClassify(cli, *args); }; });
  }
  {
    CLI::App* command = app.add_subcommand("label", "Reports the true class of an earlier request");
    auto id = std::make_shared<std::string>();
    auto label = std::make_shared<uint32_t>(0);
    command->add_option("--request-id", *id, "As printed by classify")->required();
    command->add_option("--label", *label, "Class index")->required();
    command->callback(
        [&cli, id, label] { cli.run = [&cli, id, label] { return RunLabel(cli, *id, *label); }; });
  }
  {
    CLI::App* command = app.add_subcommand("health", "Asks whether the server, or a model, serves");
    auto service = std::make_shared<std::string>();
    auto wait = std::make_shared<double>(0);
    command->add_option("--service", *service, "A model's name; empty = the server");
    command->add_option("--wait", *wait, "Seconds to wait until it does")
        ->check(CLI::NonNegativeNumber);
    command->callback([&cli, service, wait] {
      cli.run = [&cli, service, wait] { return RunHealth(cli, *service, *wait); };
    });
  }
}

}  // namespace tern::client
