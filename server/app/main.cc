// ternd: the server. Flags, wiring, signals; everything else lies in the folders below.
#include <fcntl.h>
#include <signal.h>
#include <unistd.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <filesystem>
#include <iostream>
#include <limits>
#include <memory>
#include <nlohmann/json.hpp>
#include <string>
#include <thread>
#include <vector>

#include "absl/flags/flag.h"
#include "absl/flags/parse.h"
#include "absl/flags/reflection.h"
#include "absl/flags/usage.h"
#include "absl/flags/usage_config.h"
#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "absl/synchronization/mutex.h"
#include "absl/time/clock.h"
#include "models/embedded.h"
#include "server/app/stop_signals.h"
#include "server/base/allocator.h"
#include "server/base/clock.h"
#include "server/base/cpu_budget.h"
#include "server/base/file.h"
#include "server/base/log_fields.h"
#include "server/base/status_macros.h"
#include "server/classify/top_k.h"
#include "server/engine/plan.h"
#include "server/http/routes.h"
#include "server/http/server.h"
#include "server/image/image.h"
#include "server/kernels/choices_file.h"
#include "server/kernels/dispatch.h"
#include "server/metrics/metrics.h"
#include "server/monitoring/label_join.h"
#include "server/oip/inference.h"
#include "server/repository/repository.h"
#include "server/repository/watch.h"
#include "server/rpc/acceptor.h"
#include "server/rpc/server.h"
#include "server/serving/classify.h"
#include "server/status_page/status_page.h"

ABSL_FLAG(std::string, repository, "",
          "Folder of the model repository (made if absent). Required.");
ABSL_FLAG(bool, read_only, false,
          "Never write into the repository, which must exist: several servers may share it, and "
          "import, quantise (but for dry runs), delete and set-default are refused.");
ABSL_FLAG(std::string, host, "0.0.0.0", "Address of the data port.");
ABSL_FLAG(int, port, 8500,
          "Data port (ImageClassifier, GRPCInferenceService, health); 0 = any free port.");
ABSL_FLAG(std::string, admin_host, "127.0.0.1",
          "Address of the admin port. Who reaches it can replace and delete models.");
ABSL_FLAG(int, admin_port, 8501,
          "Admin port (Quantizer, ModelRegistry, Profiler); 0 = any free port.");
ABSL_FLAG(
    std::string, admin_token_file, "",
    "File of bearer tokens, one of which every call of the admin port must bring: one token or "
    "name:token a line; read again when it changes.");
ABSL_FLAG(std::string, data_token_file, "",
          "The same for the data port, where tokens of the admin port are good too.");
ABSL_FLAG(
    std::string, tls_cert, "",
    "PEM file of the server's certificate and its chain: data and admin port then speak TLS. Read "
    "again when it changes, as are the others.");
ABSL_FLAG(std::string, tls_key, "", "PEM file of the certificate's key.");
ABSL_FLAG(std::string, tls_client_ca, "",
          "PEM file of authorities, one of whose certificates a client must bring.");
ABSL_FLAG(std::string, admin_tls_client_ca, "",
          "The same for the admin port; empty = what --tls_client_ca says.");
ABSL_FLAG(
    int, health_port, -1,
    "Port with health checks only, in plain text on --host, for probes that cannot do TLS; 0 = any "
    "free port, -1 = none.");
ABSL_FLAG(std::string, metrics_host, "0.0.0.0", "Address of the metrics port.");
ABSL_FLAG(
    int, metrics_port, 8502,
    "HTTP: /metrics for Prometheus, /v2 the Open Inference Protocol, /status/ for people; 0 = any "
    "free port.");
ABSL_FLAG(std::string, ports_file, "", "Gets the ports as JSON once the server is ready.");
ABSL_FLAG(bool, demo, false,
          "Put the embedded demo model into the repository as \"demo\", if it is not there.");
ABSL_FLAG(std::string, max_isa, "native",
          "Highest instruction set to use: scalar, avx2, avx512vnni or native. Can only lower the "
          "choice.");
ABSL_FLAG(int, threads, 0, "CPU threads to use; 0 = cgroup quota and affinity decide.");
ABSL_FLAG(int, max_batch, 8, "Largest batch of models whose config names none.");
ABSL_FLAG(absl::Duration, max_delay, absl::ZeroDuration(),
          "How long a request may wait for company while a worker is idle, for models whose config "
          "says nothing.");
ABSL_FLAG(
    absl::Duration, target_p99, absl::ZeroDuration(),
    "Time from request to answer that 99 % should keep, for models whose config says nothing: "
    "chooses batch size and delay by itself and refuses what would miss it; 0 = none.");
ABSL_FLAG(int, priority_levels, 3,
          "Priorities are 1 (first) to this; requests without one have the middle.");
ABSL_FLAG(int, max_queue, 256,
          "Waiting requests per model version, for models whose config says nothing.");
ABSL_FLAG(int, max_waiting, 1024, "Images that wait to be decoded, of all models.");
ABSL_FLAG(int64_t, max_waiting_bytes, int64_t{512} << 20,
          "What images that wait or run may hold together: encoded, and as network input.");
ABSL_FLAG(uint64_t, max_receive_bytes, 256ull << 20,
          "What requests that have not arrived completely may hold together, for each gRPC port.");
ABSL_FLAG(int, max_client_images, 0,
          "Images of one client (authenticated identity, else address) at once; 0 = no limit.");
ABSL_FLAG(uint64_t, max_image_bytes, 16ull << 20, "Largest encoded image.");
ABSL_FLAG(uint64_t, max_pixels, 40'000'000, "Most pixels of an image; checked before decoding.");
ABSL_FLAG(uint64_t, label_memory, 100'000, "Predictions remembered for ReportLabel.");
ABSL_FLAG(absl::Duration, label_memory_age, absl::Hours(24), "How long they are remembered.");
ABSL_FLAG(uint64_t, live_window, 10'000,
          "Labels, and shadow comparisons, in the windows of tern_live_*: at most so many ...");
ABSL_FLAG(absl::Duration, live_window_age, absl::Hours(1), "... and none older than this.");
ABSL_FLAG(int, count_codes_every, 100,
          "Every n-th batch has its activation codes at the ends of their range counted, for "
          "tern_live_at_limit_ratio; 0 = none.");
ABSL_FLAG(bool, warm_up, false,
          "Run every batch size once in every session before a version is ready.");
ABSL_FLAG(
    absl::Duration, poll_interval, absl::ZeroDuration(),
    "Look for new, changed and removed versions and moved default pointers in the repository's "
    "folder this often; 0 = never.");
ABSL_FLAG(double, shadow_fraction, 0,
          "Share (0..1) of the images of quantised versions that run again on the float version at "
          "idle times, for tern_shadow_* and tern_live_agreement_ratio.");
ABSL_FLAG(int, profile_every, 0,
          "Every n-th batch is timed layer by layer, for tern_layer_duration_seconds; 0 = none.");
ABSL_FLAG(absl::Duration, drain, absl::ZeroDuration(),
          "After SIGTERM: how long to answer as usual with health NOT_SERVING before closing.");
ABSL_FLAG(absl::Duration, grace, absl::Seconds(20), "Then: how long running calls may take.");
ABSL_FLAG(absl::Duration, max_connection_age, absl::Minutes(2),
          "After this long, give or take a tenth, a data connection is closed once its calls have "
          "ended, so that clients look the server's name up again and find new replicas; 0 = never.");
ABSL_FLAG(std::string, log_level, "info", "debug, info, warn, error or off.");
ABSL_FLAG(std::string, log_format, "text", "text, or json: one object a line.");

namespace tern {
namespace {

constexpr int kMaxPlanBatch = 32;
constexpr int kMaxPriorityLevels = 16;
// An idle connection takes 14 kB: 220 MB for as many.
constexpr int kDescriptors = 16384;

absl::Status AddDemoModel(repository::Repository* repository) {
  if (repository->Info("demo", 0).ok()) return absl::OkStatus();
  TERN_ASSIGN_OR_RETURN(const v1::Preprocessing preprocessing,
                        image::NamedPreprocessing("cifar10"));
  TERN_ASSIGN_OR_RETURN(const std::vector<std::string> labels,
                        classify::ParseLabels(models::DemoLabels(), 0));
  return repository->Import("demo", models::DemoOnnx(), preprocessing, labels, true).status();
}

std::string Text(absl::Duration value) { return absl::FormatDuration(value); }
template <typename T>
std::string Text(T value) {
  return absl::StrCat(value);
}

template <typename T>
absl::Status CheckRange(const absl::Flag<T>& flag, T least, T most) {
  const T value = absl::GetFlag(flag);
  if (value >= least && value <= most) return absl::OkStatus();
  return absl::InvalidArgumentError(absl::StrCat(
      "--", absl::GetFlagReflectionHandle(flag).Name(), ": got ", Text(value),
      ", want ", Text(least), " to ", Text(most)));
}

// What each flag may say by itself, before anything is made or loaded.
absl::Status CheckFlags() {
  constexpr int kPort = 65535;  // the operating system would take a larger number modulo 65536
  constexpr int kMostInt = std::numeric_limits<int>::max();
  constexpr uint64_t kMostBytes = uint64_t{1} << 40;
  const absl::Duration zero = absl::ZeroDuration(), tick = absl::Milliseconds(1);
  const absl::Duration day = absl::Hours(24);
  for (const absl::Status& status :
       {CheckRange(FLAGS_port, 0, kPort), CheckRange(FLAGS_admin_port, 0, kPort),
        CheckRange(FLAGS_metrics_port, 0, kPort), CheckRange(FLAGS_health_port, -1, kPort),
        CheckRange(FLAGS_threads, 0, 256), CheckRange(FLAGS_max_batch, 1, kMaxPlanBatch),
        CheckRange(FLAGS_max_delay, zero, absl::Minutes(1)),
        CheckRange(FLAGS_target_p99, zero, absl::Minutes(1)),
        CheckRange(FLAGS_priority_levels, 1, kMaxPriorityLevels),
        CheckRange(FLAGS_max_queue, 1, kMostInt), CheckRange(FLAGS_max_waiting, 1, kMostInt),
        CheckRange(FLAGS_max_waiting_bytes, int64_t{1}, static_cast<int64_t>(kMostBytes)),
        CheckRange(FLAGS_max_client_images, 0, kMostInt),
        CheckRange(FLAGS_max_image_bytes, uint64_t{1}, kMostBytes),
        CheckRange(FLAGS_max_pixels, uint64_t{1}, kMostBytes),
        CheckRange(FLAGS_label_memory, uint64_t{0}, uint64_t{100'000'000}),
        CheckRange(FLAGS_label_memory_age, tick, 365 * day),
        CheckRange(FLAGS_live_window, uint64_t{1}, uint64_t{10'000'000}),
        CheckRange(FLAGS_live_window_age, tick, 365 * day),
        CheckRange(FLAGS_count_codes_every, 0, kMostInt),
        CheckRange(FLAGS_profile_every, 0, kMostInt),
        CheckRange(FLAGS_shadow_fraction, 0.0, 1.0), CheckRange(FLAGS_drain, zero, day),
        CheckRange(FLAGS_grace, zero, day)}) {
    TERN_RETURN_IF_ERROR(status);
  }
  if (absl::GetFlag(FLAGS_poll_interval) != zero) {
    TERN_RETURN_IF_ERROR(CheckRange(FLAGS_poll_interval, absl::Milliseconds(100), day));
  }
  // A connection per second and client at most.
  if (absl::GetFlag(FLAGS_max_connection_age) != zero) {
    TERN_RETURN_IF_ERROR(CheckRange(FLAGS_max_connection_age, absl::Seconds(1), day));
  }
  return absl::OkStatus();
}

absl::Status Run() {
  TERN_ASSIGN_OR_RETURN(const LogFormat log_format,
                        ParseLogFormat(absl::GetFlag(FLAGS_log_format)));
  TERN_RETURN_IF_ERROR(InitLog(absl::GetFlag(FLAGS_log_level), log_format));
  StopSignals::Start();
  TERN_RETURN_IF_ERROR(CheckFlags());
  const std::string root = absl::GetFlag(FLAGS_repository);
  if (root.empty()) return absl::InvalidArgumentError("--repository is required (a folder)");
  const bool read_only = absl::GetFlag(FLAGS_read_only);
  if (read_only && absl::GetFlag(FLAGS_demo)) {
    return absl::InvalidArgumentError("--demo writes into the repository, --read_only forbids it");
  }
  TERN_ASSIGN_OR_RETURN(const kernels::Isa isa, kernels::SelectIsa(absl::GetFlag(FLAGS_max_isa)));
  if (isa < kernels::DetectIsa() || absl::GetFlag(FLAGS_max_isa) != "native") {
    TERN_RETURN_IF_ERROR(engine::CapOneDnnIsa(isa));
  }
  CpuBudget budget = ReadCpuBudget();
  if (absl::GetFlag(FLAGS_threads) > 0) budget.threads = absl::GetFlag(FLAGS_threads);
  TERN_LOG_INFO("ternd {}: CPU budget {}, instruction set {}", TERN_VERSION, budget.ToString(),
                kernels::IsaName(isa));

  metrics::Metrics metrics;
  metrics.Machine(budget.threads, TERN_VERSION, kernels::IsaName(isa), engine::OneDnnVersion());
  monitoring::LabelJoin labels(absl::GetFlag(FLAGS_label_memory), &metrics,
                               absl::GetFlag(FLAGS_label_memory_age));

  serving::ShadowComparer shadow(absl::GetFlag(FLAGS_shadow_fraction), &metrics);

  serving::RunnerOptions runner;
  runner.shadow = &shadow;
  runner.monitor.window.most = absl::GetFlag(FLAGS_live_window);
  runner.monitor.window.age = absl::GetFlag(FLAGS_live_window_age);
  runner.count_codes_every = absl::GetFlag(FLAGS_count_codes_every);
  runner.warm_up = absl::GetFlag(FLAGS_warm_up);
  runner.profile_every = absl::GetFlag(FLAGS_profile_every);
  runner.cpu_threads = budget.threads;
  runner.default_max_batch = absl::GetFlag(FLAGS_max_batch);
  runner.default_max_delay = absl::GetFlag(FLAGS_max_delay);
  runner.default_max_queue = absl::GetFlag(FLAGS_max_queue);
  runner.default_target_p99 = absl::GetFlag(FLAGS_target_p99);
  runner.priority_levels = absl::GetFlag(FLAGS_priority_levels);
  runner.metrics = &metrics;
  repository::RepositoryOptions repository_options;
  repository_options.root = root;
  repository_options.read_only = read_only;
  repository_options.plan.isa = isa;
  repository_options.plan.max_batch = kMaxPlanBatch;
  repository_options.plan.load_threads = budget.threads;
  repository_options.metrics = &metrics;
  repository_options.make_servable =
      [runner](std::shared_ptr<const repository::LoadedModel> model) {
        return serving::ModelRunner::Create(std::move(model), runner);
      };
  const engine::PlanOptions plan_options = repository_options.plan;
  const std::string choices = root + "/.kernel-choices";
  const absl::Status known = kernels::ReadChoices(choices, TERN_VERSION);
  if (!known.ok() && !absl::IsNotFound(known)) {
    TERN_LOG_WARN("kernel choices are measured again: {}", known.ToString());
  }
  TERN_ASSIGN_OR_RETURN(std::unique_ptr<repository::Repository> repository,
                        repository::Repository::Open(std::move(repository_options)));
  const auto keep_choices = [&] {
    if (read_only) return;
    const absl::Status kept = kernels::WriteChoices(choices, TERN_VERSION);
    if (!kept.ok()) TERN_LOG_WARN("kernel choices are not kept: {}", kept.ToString());
  };
  keep_choices();
  ReturnFreedMemory();
  shadow.SetRepository(repository.get());
  if (absl::GetFlag(FLAGS_demo)) {
    TERN_RETURN_IF_ERROR(Annotate(AddDemoModel(repository.get()), "--demo"));
  }

  serving::ClassifierOptions classifier_options;
  classifier_options.limits.max_bytes = absl::GetFlag(FLAGS_max_image_bytes);
  classifier_options.limits.max_pixels = absl::GetFlag(FLAGS_max_pixels);
  classifier_options.decode_threads = budget.threads;
  classifier_options.max_waiting = absl::GetFlag(FLAGS_max_waiting);
  classifier_options.priority_levels = runner.priority_levels;
  classifier_options.admission.max_bytes = absl::GetFlag(FLAGS_max_waiting_bytes);
  classifier_options.admission.max_client_images = absl::GetFlag(FLAGS_max_client_images);
  auto classifier = std::make_unique<serving::Classifier>(repository.get(), &labels, &metrics,
                                                          classifier_options);
  oip::Inference inference(repository.get(), classifier.get(), TERN_VERSION);

  rpc::ServerOptions server_options;
  server_options.host = absl::GetFlag(FLAGS_host);
  server_options.port = absl::GetFlag(FLAGS_port);
  server_options.admin_host = absl::GetFlag(FLAGS_admin_host);
  server_options.admin_port = absl::GetFlag(FLAGS_admin_port);
  server_options.admin_token_file = absl::GetFlag(FLAGS_admin_token_file);
  server_options.data_token_file = absl::GetFlag(FLAGS_data_token_file);
  server_options.tls_certificate = absl::GetFlag(FLAGS_tls_cert);
  server_options.tls_key = absl::GetFlag(FLAGS_tls_key);
  server_options.tls_client_ca = absl::GetFlag(FLAGS_tls_client_ca);
  server_options.admin_tls_client_ca = absl::GetFlag(FLAGS_admin_tls_client_ca).empty()
                                           ? absl::GetFlag(FLAGS_tls_client_ca)
                                           : absl::GetFlag(FLAGS_admin_tls_client_ca);
  if (absl::GetFlag(FLAGS_health_port) >= 0) {
    server_options.health_port = absl::GetFlag(FLAGS_health_port);
  }
  server_options.cpu_threads = budget.threads;
  server_options.limits = classifier_options.limits;
  server_options.max_receive_bytes = absl::GetFlag(FLAGS_max_receive_bytes);
  server_options.plan = plan_options;
  server_options.max_connection_age = absl::GetFlag(FLAGS_max_connection_age);
  StopSignals::Serve();
  TERN_ASSIGN_OR_RETURN(std::unique_ptr<rpc::Server> server,
                        rpc::Server::Start(server_options, repository.get(), classifier.get(),
                                           &inference, &labels, &metrics));

  http::Routes routes(&inference, &metrics,
                      [&server](absl::string_view method, const std::string* authorization) {
                        std::vector<absl::string_view> values;
                        if (authorization != nullptr) values.push_back(*authorization);
                        return server->CheckDataCall(method, values);
                      });
  status_page::Options page;
  page.server_version = TERN_VERSION;
  page.start_time = Clock::Real()->Now();
  page.max_image_bytes = classifier_options.limits.max_bytes;
  page.max_pixels = classifier_options.limits.max_pixels;
  status_page::AddStatusPage(repository.get(), &metrics, page, &routes);
  http::ServerOptions web_options;
  web_options.host = absl::GetFlag(FLAGS_metrics_host);
  web_options.port = absl::GetFlag(FLAGS_metrics_port);
  // An image of the largest size in base64, or a few smaller ones.
  web_options.max_body_bytes =
      2 * std::min<uint64_t>(classifier_options.limits.max_bytes, 1 << 30) + (64 << 10);
  web_options.max_total_body_bytes = 8 * web_options.max_body_bytes;
  inference.LimitMessageBytes(web_options.max_body_bytes);
  web_options.refused = [&routes](int status) { routes.Refused(status); };
  TERN_ASSIGN_OR_RETURN(
      std::unique_ptr<http::Server> web,
      http::Server::Start(web_options, [&routes](http::Request request, http::Respond respond) {
        routes.Handle(std::move(request), std::move(respond));
      }));

  nlohmann::json ports = {{"port", server->port()},
                          {"admin_port", server->admin_port()},
                          {"metrics_port", web->port()}};
  if (server->health_port() != 0) ports["health_port"] = server->health_port();
  if (!absl::GetFlag(FLAGS_ports_file).empty()) {
    TERN_RETURN_IF_ERROR(
        WriteFileAtomically(absl::GetFlag(FLAGS_ports_file), {ports.dump() + "\n"}));
  }
  std::unique_ptr<repository::Watcher> watcher;
  if (const absl::Duration interval = absl::GetFlag(FLAGS_poll_interval);
      interval > absl::ZeroDuration()) {
    watcher = std::make_unique<repository::Watcher>(repository.get(), root, &metrics,
                                                    [&server] { server->UpdateHealth(); });
    watcher->Start(interval);
  }
  TERN_LOG_INFO("ready: data port {}, admin port {}, metrics http://{}:{}/metrics", server->port(),
                server->admin_port(), absl::GetFlag(FLAGS_metrics_host), web->port());

  StopSignals::Wait();
  server->SetDraining();
  watcher.reset();
  keep_choices();
  absl::SleepFor(absl::GetFlag(FLAGS_drain));
  // Side by side: both have the whole grace for the calls that they took.
  std::thread closing([&] { web->Shutdown(absl::GetFlag(FLAGS_grace)); });
  server->Shutdown(absl::GetFlag(FLAGS_grace));
  closing.join();
  shadow.SetRepository(nullptr);
  repository->Shutdown();
  classifier.reset();
  server.reset();
  web.reset();
  repository.reset();
  TERN_LOG_INFO("stopped");
  return absl::OkStatus();
}

}  // namespace
}  // namespace tern

namespace {

bool flags_parsed = false;

// Descriptors 0 to 2 stay what everyone takes them for: closed ones would go to the next files and
// sockets, and the log would be written into them.
void OpenStandardDescriptors() {
  int fd = 0;
  do fd = ::open("/dev/null", O_RDWR);
  while (fd >= 0 && fd <= STDERR_FILENO);
  if (fd > STDERR_FILENO) ::close(fd);
}

void DescribeFlags() {
  absl::SetProgramUsageMessage(
      "Low-precision image classification over gRPC.\n\n"
      "  ternd --repository DIR [--demo] [--port 8500 --admin_port 8501 --metrics_port 8502]");
  absl::FlagsUsageConfig config;
  const auto ours = [](absl::string_view file) { return absl::EndsWith(file, "server/app/main.cc"); };
  config.contains_helpshort_flags = config.contains_help_flags = ours;
  config.contains_helppackage_flags = ours;
  config.version_string = [] { return "ternd " TERN_VERSION "\n"; };
  absl::SetFlagsUsageConfig(config);
}

// Abseil ends the process with status 1 for a flag that it cannot parse and for --help.
void StatusOfParsing(int status, void* asked_for_help) {
  if (flags_parsed || status == 0) return;
  std::cout.flush();
  std::_Exit(asked_for_help != nullptr ? 0 : 2);
}

}  // namespace

int main(int argc, char** argv) {
  OpenStandardDescriptors();
  tern::KeepFreedMemory();
  // gRPC's locks are Abseil's, and Debian builds it with the search for lock cycles, a
  // twentieth of what a call costs.
  absl::SetMutexDeadlockDetectionMode(absl::OnDeadlockCycle::kIgnore);
  tern::rpc::RaiseDescriptorLimit(tern::kDescriptors);
  tern::StopSignals::Block();
  signal(SIGPIPE, SIG_IGN);

  DescribeFlags();
  const auto help = std::find_if(argv + 1, argv + argc, [](absl::string_view argument) {
    return absl::StartsWith(argument, "--help") || absl::StartsWith(argument, "-help");
  });
  ::on_exit(StatusOfParsing, help == argv + argc ? nullptr : *help);
  const std::vector<char*> rest = absl::ParseCommandLine(argc, argv);
  flags_parsed = true;
  if (rest.size() > 1) {
    std::cerr << "ternd: unexpected argument \"" << rest[1]
              << "\" (flags are written --name=value)\n";
    return 2;
  }
  const absl::Status status = tern::Run();
  if (status.ok()) return 0;
  std::cerr << "ternd: " << status << "\n";
  return status.code() == absl::StatusCode::kInvalidArgument ? 2 : 1;
}
