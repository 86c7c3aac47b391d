#include "server/rpc/profiler_service.h"

#include <algorithm>
#include <map>
#include <string>

#include "absl/strings/str_cat.h"
#include "server/base/status_macros.h"
#include "server/rpc/request_timer.h"
#include "server/serving/profile.h"

namespace tern::rpc {
namespace {

constexpr double kMaxSeconds = 60;
constexpr uint32_t kMaxRuns = 1000;

absl::Status Busy() { return absl::ResourceExhaustedError("another measurement is running"); }

}  // namespace

grpc::Status ProfilerService::Benchmark(grpc::ServerContext* context,
                                        const v1::BenchmarkRequest* request,
                                        v1::BenchmarkResponse* response) {
  RequestTimer timer(metrics_, "Benchmark");
  if (busy_.exchange(true)) return timer.Finish(Busy());
  const absl::Status status = DoBenchmark(context, *request, response);
  busy_ = false;
  return timer.Finish(status);
}

absl::Status ProfilerService::DoBenchmark(grpc::ServerContext* context,
                                          const v1::BenchmarkRequest& request,
                                          v1::BenchmarkResponse* response) {
  if (!(request.seconds() >= 0 && request.seconds() <= kMaxSeconds)) {
    return absl::InvalidArgumentError(
        absl::StrCat("seconds: got ", request.seconds(), ", want 0..", kMaxSeconds));
  }
  TERN_ASSIGN_OR_RETURN(const std::shared_ptr<const repository::LoadedModel> model,
                        repository_->Find(request.model(), request.version()));
  serving::BenchmarkOptions options;
  options.batch =
      request.batch() == 0 ? 1 : static_cast<int>(std::min<uint32_t>(request.batch(), 1 << 20));
  options.threads = request.threads() == 0
                        ? cpu_threads_
                        : static_cast<int>(std::min<uint32_t>(request.threads(), 1 << 20));
  options.sessions = request.sessions() == 0
                         ? 1
                         : static_cast<int>(std::min<uint32_t>(request.sessions(), 1 << 20));
  options.duration = absl::Seconds(request.seconds() == 0 ? 3 : request.seconds());
  options.cancelled = [context] { return context->IsCancelled(); };
  TERN_ASSIGN_OR_RETURN(const serving::BenchmarkResult result,
                        serving::Benchmark(model->plan, options));
  response->set_images_per_second(result.images_per_second);
  response->set_ms_per_image(result.ms_per_image);
  response->set_p50_ms(result.p50_ms);
  response->set_p90_ms(result.p90_ms);
  response->set_p99_ms(result.p99_ms);
  response->set_batches(result.batches);
  response->set_isa(model->isa);
  return absl::OkStatus();
}

grpc::Status ProfilerService::Profile(grpc::ServerContext* context,
                                      const v1::ProfileRequest* request,
                                      v1::ProfileResponse* response) {
  RequestTimer timer(metrics_, "Profile");
  if (busy_.exchange(true)) return timer.Finish(Busy());
  const absl::Status status = DoProfile(context, *request, response);
  busy_ = false;
  return timer.Finish(status);
}

absl::Status ProfilerService::DoProfile(grpc::ServerContext* context,
                                        const v1::ProfileRequest& request,
                                        v1::ProfileResponse* response) {
  if (request.runs() > kMaxRuns) {
    return absl::InvalidArgumentError(
        absl::StrCat("runs: got ", request.runs(), ", want at most ", kMaxRuns));
  }
  TERN_ASSIGN_OR_RETURN(const std::shared_ptr<const repository::LoadedModel> model,
                        repository_->Find(request.model(), request.version()));
  const int batch =
      request.batch() == 0 ? 1 : static_cast<int>(std::min<uint32_t>(request.batch(), 1 << 20));
  const int threads = request.threads() == 0
                          ? cpu_threads_
                          : static_cast<int>(std::min<uint32_t>(request.threads(), 1 << 20));
  const int runs = request.runs() == 0 ? 20 : static_cast<int>(request.runs());
  TERN_ASSIGN_OR_RETURN(const engine::RunTimes times,
                        serving::ProfileRuns(model->plan, batch, threads, runs,
                                             [context] { return context->IsCancelled(); }));
  const double total = absl::ToDoubleSeconds(times.total);
  const auto share = [&](double seconds) { return total > 0 ? seconds / total : 0; };
  std::map<std::string, double> work;  // seconds by kind
  double rest = total;
  const std::vector<engine::LayerInfo>& layers = model->plan->layers();
  for (size_t i = 0; i < layers.size(); ++i) {
    const double seconds = absl::ToDoubleSeconds(times.layers[i]);
    v1::LayerTime* layer = response->add_layers();
    layer->set_name(layers[i].name);
    layer->set_op(layers[i].op);
    layer->set_scheme(layers[i].scheme);
    layer->set_implementation(layers[i].implementation);
    layer->set_ms(seconds * 1e3);
    layer->set_share(share(seconds));
    if (seconds > 0)
      layer->set_gmacs_per_second(static_cast<double>(layers[i].macs) * batch / seconds * 1e-9);
    work[layers[i].op] += seconds;
    rest -= seconds;
  }
  for (int c = 0; c < engine::kConversions; ++c) {
    const double seconds = absl::ToDoubleSeconds(times.conversions[c]);
    if (seconds > 0) work[engine::Name(static_cast<engine::Conversion>(c))] = seconds;
    rest -= seconds;
  }
  work["between steps"] = std::max(rest, 0.0);
  double inside = 0;
  for (const auto& [kind, seconds] : work) {
    if (kind == graph::Name(graph::OpType::kConv) ||
        kind == graph::Name(graph::OpType::kFullyConnected)) {
      inside += seconds;
    }
    v1::WorkTime* row = response->add_work();
    row->set_kind(kind);
    row->set_ms(seconds * 1e3);
    row->set_share(share(seconds));
  }
  std::stable_sort(response->mutable_work()->begin(), response->mutable_work()->end(),
                   [](const v1::WorkTime& a, const v1::WorkTime& b) { return a.ms() > b.ms(); });
  response->set_total_ms(total * 1e3);
  response->set_outside_share(share(total - inside));
  return absl::OkStatus();
}

}  // namespace tern::rpc
