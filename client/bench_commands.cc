// ternctl bench and profile.

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

// Images are read before the clock starts; a larger data set is used in part.
constexpr size_t kMaxPreloadedBytes = size_t{256} << 20;

struct BenchArgs {
  ModelArgs model;
  WishArgs wishes;
  std::string data;
  LoadOptions load;
  std::string arrivals = "poisson";
  int channels = 1;
  bool retry = false;
  uint32_t top_k = 0;
  bool engine = false;
  uint32_t batch = 1;
  uint32_t threads = 0;
  uint32_t sessions = 1;
};

absl::StatusOr<std::vector<v1::ClassifyRequest>> Preload(const BenchArgs& args) {
  TERN_CLIENT_ASSIGN_OR_RETURN(const std::vector<ImageFile> files,
                               ListImages(args.data, {.warn = Warn}));
  std::vector<v1::ClassifyRequest> requests;
  size_t bytes = 0;
  for (const ImageFile& file : ChooseImages(files, 0, args.load.seed)) {
    v1::ClassifyRequest request;
    TERN_CLIENT_ASSIGN_OR_RETURN(*request.mutable_image(), ReadFile(file.path, size_t{60} << 20));
    bytes += request.image().size();
    if (bytes > kMaxPreloadedBytes && !requests.empty()) break;
    request.set_model(args.model.model);
    request.set_version(args.model.version);
    request.set_top_k(args.top_k);
    Apply(args.wishes, &request);
    requests.push_back(std::move(request));
  }
  return requests;
}

absl::StatusOr<LoadResult> BenchServer(const Cli& cli, const BenchArgs& args) {
  TERN_CLIENT_ASSIGN_OR_RETURN(const std::vector<v1::ClassifyRequest> requests, Preload(args));
  TERN_CLIENT_ASSIGN_OR_RETURN(auto client, cli.Connect(args.channels, args.retry));
  // A server that is down or does not know the model ends the run here, not as a million errors.
  TERN_CLIENT_RETURN_IF_ERROR(client->Classify(requests[0]).status());
  Progress progress(cli.quiet);
  progress.Show("running", -1,
                absl::StrCat(Fixed(args.load.warmup + args.load.seconds, 1), " s, ",
                             requests.size(), " different images"),
                -1);
  return RunLoad(args.load, [&](uint64_t number, Done done) {
    client->ClassifyAsync(requests[number % requests.size()], std::move(done));
  });
}

int RunBenchServer(const Cli& cli, const BenchArgs& args) {
  const absl::StatusOr<LoadResult> result = BenchServer(cli, args);
  if (!result.ok()) return cli.Fail(result.status());
  const bool open = args.load.rate > 0;
  if (cli.json) {
    Json json;
    json["mode"] = open ? "open" : "closed";
    if (open) {
      json["rate"] = args.load.rate;
      json["arrivals"] = args.arrivals;
    } else {
      json["concurrency"] = args.load.concurrency;
    }
    json.update(ToJson(*result));
    cli.Print(json);
  } else {
    if (open) {
      std::cout << "open loop, " << Fixed(args.load.rate, 1) << " images/s offered ("
                << args.arrivals << "), latency from the intended time of sending\n";
    } else {
      std::cout << "closed loop, " << args.load.concurrency << " in flight\n";
    }
    Table table({{"IMAGES/S", Table::kRight},
                 {"MS/IMAGE", Table::kRight},
                 {"MEAN MS", Table::kRight},
                 {"P50", Table::kRight},
                 {"P90", Table::kRight},
                 {"P95", Table::kRight},
                 {"P99", Table::kRight},
                 {"P99.9", Table::kRight},
                 {"MAX", Table::kRight},
                 {"ERRORS", Table::kRight},
                 {"BATCH", Table::kRight}});
    table.Add({Fixed(result->images_per_second, 1), Fixed(result->ms_per_image, 3),
               Fixed(result->mean_ms, 3), Fixed(result->p50_ms, 3), Fixed(result->p90_ms, 3),
               Fixed(result->p95_ms, 3), Fixed(result->p99_ms, 3), Fixed(result->p999_ms, 3),
               Fixed(result->max_ms, 3), absl::StrCat(result->errors),
               Fixed(result->batch_size, 2)});
    table.Print(std::cout);
    std::cout << "in the server, mean: decode " << Fixed(result->decode_us / 1e3, 3)
              << " ms, preprocess " << Fixed(result->preprocess_us / 1e3, 3) << ", queue "
              << Fixed(result->queue_us / 1e3, 3) << ", inference "
              << Fixed(result->inference_us / 1e3, 3) << ", total "
              << Fixed(result->total_us / 1e3, 3) << "\n";
    if (result->not_sent > 0) {
      std::cout << result->not_sent
                << " requests were due and not sent before the end: the rate is more than was "
                   "answered, or than this client sends\n";
    }
    for (const auto& [code, count] : result->errors_by_code) {
      std::cout << count << " x " << code << "\n";
    }
  }
  if (result->errors > 0) {
    std::cerr << "ternctl: first error: " << Printable(result->first_error) << "\n";
  }
  return result->images > 0 ? kOk : kFailed;
}

int RunBenchEngine(const Cli& cli, const BenchArgs& args) {
  const auto client = cli.Connect();
  if (!client.ok()) return cli.Fail(client.status());
  v1::BenchmarkRequest request;
  request.set_model(args.model.model);
  request.set_version(args.model.version);
  request.set_batch(args.batch);
  request.set_threads(args.threads);
  request.set_sessions(args.sessions);
  request.set_seconds(args.load.seconds);
  absl::StatusOr<v1::BenchmarkResponse> response;
  {
    Progress progress(cli.quiet);
    progress.Show("running", -1, absl::StrCat(Fixed(args.load.seconds, 1), " s in the server"), -1);
    response = (*client)->Benchmark(request);
  }
  if (!response.ok()) return cli.Fail(response.status());
  if (cli.json) {
    Json json;
    json["mode"] = "engine";
    json["batch"] = args.batch;
    json["threads"] = args.threads;
    json["sessions"] = args.sessions;
    json.update(ToJson(*response));
    cli.Print(json);
    return kOk;
  }
  std::cout << "engine alone (" << response->isa() << "), " << args.sessions
            << " session(s), batch of " << args.batch << ", "
            << (args.threads == 0 ? "all" : absl::StrCat(args.threads)) << " thread(s), "
            << response->batches() << " batches; percentiles per batch\n";
  Table table({{"IMAGES/S", Table::kRight},
               {"MS/IMAGE", Table::kRight},
               {"P50", Table::kRight},
               {"P90", Table::kRight},
               {"P99", Table::kRight}});
  table.Add({Fixed(response->images_per_second(), 1), Fixed(response->ms_per_image(), 3),
             Fixed(response->p50_ms(), 3), Fixed(response->p90_ms(), 3),
             Fixed(response->p99_ms(), 3)});
  table.Print(std::cout);
  return kOk;
}

struct ProfileArgs {
  ModelArgs model;
  uint32_t batch = 1;
  uint32_t threads = 1;
  uint32_t runs = 20;
};

int RunProfile(const Cli& cli, const ProfileArgs& args) {
  const auto client = cli.Connect();
  if (!client.ok()) return cli.Fail(client.status());
  v1::ProfileRequest request;
  request.set_model(args.model.model);
  request.set_version(args.model.version);
  request.set_batch(args.batch);
  request.set_threads(args.threads);
  request.set_runs(args.runs);
  const absl::StatusOr<v1::ProfileResponse> response = (*client)->Profile(request);
  if (!response.ok()) return cli.Fail(response.status());
  if (cli.json) {
    cli.Print(ToJson(*response));
    return kOk;
  }
  Table table({{"LAYER"},
               {"OP"},
               {"SCHEME"},
               {"IMPLEMENTATION"},
               {"MS", Table::kRight},
               {"SHARE", Table::kRight},
               {"GMAC/S", Table::kRight}});
  for (const v1::LayerTime& layer : response->layers()) {
    table.Add({layer.name(), layer.op(), layer.scheme(), layer.implementation(),
               Fixed(layer.ms(), 3), Percent(layer.share()),
               layer.gmacs_per_second() > 0 ? Fixed(layer.gmacs_per_second(), 1) : "-"});
  }
  table.Print(std::cout);
  std::cout << "\n";
  Table work({{"WORK"}, {"MS", Table::kRight}, {"SHARE", Table::kRight}});
  for (const v1::WorkTime& row : response->work())
    work.Add({row.kind(), Fixed(row.ms(), 3), Percent(row.share())});
  work.Add({"total", Fixed(response->total_ms(), 3), Percent(1)});
  work.Print(std::cout);
  std::cout << "outside convolutions and fully connected layers: "
            << Percent(response->outside_share()) << "\n";
  return kOk;
}

}  // namespace

void AddBenchCommands(CLI::App& app, Cli& cli) {
  {
    CLI::App* command =
        app.add_subcommand("bench", "Measures throughput and latency, of the server or its engine");
    command->footer(
        "Examples:\n"
        "  ternctl bench --model r20 --data test/ --concurrency 8 --seconds 10   (closed loop)\n"
        "  ternctl bench --model r20 --data test/ --rate 200 --seconds 30        (open loop)\n"
        "  ternctl bench --engine --model r20 --batch 8 --threads 1 --seconds 5  (no network, no "
        "images)");
    auto args = std::make_shared<BenchArgs>();
    AddModelArgs(command, &args->model, "Version; 0 = the default");
    command->add_option("--data,-d", args->data, "Folder of images, or one")
        ->check(CLI::ExistingPath);
    command
        ->add_option("--concurrency,-c", args->load.concurrency, "Closed loop: requests in flight")
        ->check(CLI::Range(1, 4096));
    command->add_option("--rate", args->load.rate, "Open loop: images per second to offer")
        ->check(CLI::Range(0.0, 1e6))
        ->excludes("--concurrency");
    command->add_option("--arrivals", args->arrivals, "Open loop: gaps between requests")
        ->check(CLI::IsMember({"poisson", "fixed"}));
    command->add_option("--seconds,-s", args->load.seconds, "How long to measure")
        ->check(CLI::Range(0.1, 86400.0));
    command->add_option("--warmup", args->load.warmup, "Seconds before that, not counted")
        ->check(CLI::Range(0.0, 3600.0));
    command->add_option("--channels", args->channels, "Connections")->check(CLI::Range(1, 64));
    command->add_flag(
        "--retry", args->retry,
        "Retry failed calls as other commands do; only what fails after that counts as failed");
    command->add_option("--top-k,-k", args->top_k,
                        "Classes per answer; 0 = 5, or all if there are fewer");
    AddWishArgs(command, &args->wishes);
    command->add_option("--seed", args->load.seed, "Of the images' order and the arrivals");
    CLI::Option* engine =
        command->add_flag("--engine", args->engine, "The engine alone, inside the server");
    command->add_option("--batch,-b", args->batch, "Engine: images per run")
        ->check(CLI::PositiveNumber)
        ->needs(engine);
    command->add_option("--threads,-t", args->threads, "Engine: threads; 0 = all the server has")
        ->needs(engine);
    command->add_option("--sessions", args->sessions, "Engine: concurrent sessions")
        ->check(CLI::PositiveNumber)
        ->needs(engine);
    for (const char* name :
         {"--data", "--concurrency", "--rate", "--arrivals", "--warmup", "--channels", "--retry",
          "--top-k", "--priority", "--min-accuracy", "--max-latency", "--seed"}) {
      engine->excludes(name);
    }
    command->callback([&cli, args] {
      if (!args->engine && args->data.empty()) {
        throw CLI::RequiredError("bench: --data FOLDER or --engine");
      }
      args->load.poisson = args->arrivals == "poisson";
      cli.run = [&cli, args] {
        return args->engine ? RunBenchEngine(cli, *args) : RunBenchServer(cli, *args);
      };
    });
  }
  {
    CLI::App* command = app.add_subcommand("profile", "Times every layer inside the server");
    auto args = std::make_shared<ProfileArgs>();
    AddModelArgs(command, &args->model, "Version; 0 = the default");
    command->add_option("--batch,-b", args->batch, "Images per run")->check(CLI::PositiveNumber);
    command->add_option("--threads,-t", args->threads, "Threads; 0 = all the server has");
    command->add_option("--runs", args->runs, "Runs; times are means over their middle half")
        ->check(CLI::Range(1, 1000));
    command->callback([&cli, args] { cli.run = [&cli, args] { return RunProfile(cli, *args); }; });
  }
}

}  // namespace tern::client
