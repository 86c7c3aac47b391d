#include "tests/client/fake_server.h"

#include <grpcpp/ext/health_check_service_server_builder_option.h>
#include <grpcpp/grpcpp.h>
#include <grpcpp/health_check_service_interface.h>

#include <algorithm>

#include "absl/strings/str_cat.h"
#include "tern/v1/classifier.grpc.pb.h"
#include "tern/v1/profiler.grpc.pb.h"
#include "tern/v1/quantizer.grpc.pb.h"
#include "tern/v1/registry.grpc.pb.h"

namespace tern::client {
namespace {

using grpc::ServerContext;
using grpc::Status;
using grpc::StatusCode;

constexpr uint32_t kClasses = 10;

std::string ClassName(uint32_t index) { return absl::StrCat("class-", index); }

struct Shared {
  std::mutex mutex;
  Seen seen;

  void Note(const std::string& call) {
    std::lock_guard lock(mutex);
    seen.calls.push_back(call);
  }
};

v1::Proportion Share(double value, uint64_t total) {
  v1::Proportion p;
  p.set_value(value);
  p.set_low(value - 0.01);
  p.set_high(value + 0.01);
  p.set_hits(static_cast<uint64_t>(value * static_cast<double>(total)));
  p.set_total(total);
  return p;
}

v1::PairedComparison Compared(uint64_t total, double lost, double won) {
  v1::PairedComparison c;
  c.set_only_reference_right(static_cast<uint64_t>(lost * static_cast<double>(total) + 0.5));
  c.set_only_candidate_right(static_cast<uint64_t>(won * static_cast<double>(total) + 0.5));
  c.set_both_right(total - c.only_reference_right() - c.only_candidate_right());
  c.set_drop(lost - won);
  c.set_drop_low(lost - won - 0.02);
  c.set_drop_high(lost - won + 0.02);
  c.set_p_value(0.0001);
  return c;
}

// Its labels try to drive the terminal.
v1::ClassReport BadClass() {
  v1::ClassReport bad;
  bad.set_class_index(4);
  bad.set_label("night\x1b]0;ingale\n");
  bad.set_images(50);
  bad.set_reference_right(45);
  bad.set_candidate_right(20);
  v1::ClassReport::Confusion* other = bad.add_confused_with();
  other->set_class_index(7);
  other->set_label("<lark>\x07");
  other->set_images(25);
  return bad;
}

v1::QuantizationReport Report(const v1::Recipe& recipe, uint64_t calibration, uint64_t evaluation) {
  v1::QuantizationReport report;
  *report.mutable_recipe() = recipe;
  report.set_source_model("demo");
  report.set_source_version(1);
  report.set_calibration_images(calibration);
  report.set_evaluation_images(evaluation);
  v1::LayerReport* layer = report.add_layers();
  layer->set_name("conv1");
  layer->set_op("Conv");
  layer->set_scheme("ternary-cluster");
  layer->set_cluster_size(4);
  layer->set_weights(2304);
  layer->set_macs(2359296);
  layer->set_multiplications_removed(0.75);
  layer->set_output_sqnr_db(17.5);
  layer->set_bits_per_weight(4);
  report.set_bits_per_weight(4.1);
  report.set_bytes(123456);
  report.set_float_bytes(1089536);
  report.set_compression_ratio(8.8);
  report.set_multiplications_removed(0.7);
  if (evaluation > 0) {
    *report.mutable_float_top1() = Share(0.9, evaluation);
    *report.mutable_top1() = Share(0.8, evaluation);
    *report.mutable_agreement() = Share(0.85, evaluation);
    *report.mutable_comparison() = Compared(evaluation, 0.15, 0.05);
    report.set_overlapping_images(evaluation / 10);
    *report.add_worst_classes() = BadClass();
  }
  report.set_ms_per_image(1.5);
  report.set_float_ms_per_image(3);
  if (recipe.weights() == v1::MIXED) {
    v1::LayerSensitivity* sensitivity = report.add_sensitivity();
    sensitivity->set_layer("conv1\x1b[2J");
    sensitivity->set_weights(v1::INT4_CLUSTER);
    sensitivity->set_cluster_size(64);
    sensitivity->set_divergence(0.0125);
    for (int i = 0; i < 3; ++i) {
      v1::FrontierPoint* point = report.add_frontier();
      point->set_bits_per_weight(4.5 - i);
      point->set_predicted_ms(2.5 - 0.5 * i);
      point->set_predicted_divergence(0.01 * (1 + 10 * i));
      point->set_measured(i == 1);
      if (i == 1) point->set_divergence(0.2);
      point->set_chosen(i == 1);
      point->set_description("12 ternary N=64 & 30 <int4>");
    }
    report.mutable_distillation()->set_kind(v1::DISTILL_NETWORK);
    report.mutable_distillation()->set_steps(300);
    report.mutable_distillation()->set_kept(true);
  }
  report.set_sqnr_db(15.25);
  report.add_warnings("layer conv1 clips 2 % of its outputs");
  return report;
}

Status ClassifyOne(Shared& shared, const v1::ClassifyRequest& request,
                   v1::ClassifyResponse* response) {
  size_t number;
  {
    std::lock_guard lock(shared.mutex);
    shared.seen.classify.push_back(request);
    number = shared.seen.classify.size();
  }
  if (request.model() == "missing") return {StatusCode::NOT_FOUND, "no model 'missing'"};
  if (request.image().empty() || request.image()[0] == 'x') {
    return {StatusCode::INVALID_ARGUMENT, "image: unknown format"};
  }
  response->set_request_id(absl::StrCat("r", number));
  const auto best = static_cast<uint32_t>(request.image()[0] - '0') % kClasses;
  const uint32_t top_k = request.top_k() == 0 ? 5 : std::min(request.top_k(), kClasses);
  for (uint32_t i = 0; i < top_k; ++i) {
    v1::ClassScore* score = response->add_classes();
    score->set_index((best + i) % kClasses);
    score->set_label(ClassName(score->index()));
    score->set_probability(0.5f / static_cast<float>(i + 1));
  }
  v1::Receipt* receipt = response->mutable_receipt();
  receipt->set_model(request.model());
  receipt->set_version(request.version() == 0 ? 1 : request.version());
  receipt->set_scheme("fp32");
  receipt->set_isa("avx2");
  receipt->set_batch_size(2);
  receipt->mutable_timing()->set_inference_us(300);
  receipt->mutable_timing()->set_total_us(500);
  return Status::OK;
}

class Classifier : public v1::ImageClassifier::Service {
 public:
  explicit Classifier(Shared& shared) : shared_(shared) {}

  Status Classify(ServerContext*, const v1::ClassifyRequest* request,
                  v1::ClassifyResponse* response) override {
    return ClassifyOne(shared_, *request, response);
  }
  Status ClassifyStream(
      ServerContext*,
      grpc::ServerReaderWriter<v1::ClassifyStreamResponse, v1::ClassifyRequest>* stream) override {
    v1::ClassifyRequest request;
    while (stream->Read(&request)) {
      v1::ClassifyStreamResponse response;
      const Status status = ClassifyOne(shared_, request, response.mutable_response());
      if (!status.ok()) {
        response.mutable_error()->set_code(status.error_code());
        response.mutable_error()->set_message(status.error_message());
      }
      stream->Write(response);
    }
    return Status::OK;
  }
  Status ReportLabel(ServerContext*, const v1::ReportLabelRequest* request,
                     v1::ReportLabelResponse* response) override {
    if (request->request_id() != "r1") return {StatusCode::NOT_FOUND, "unknown request id"};
    response->set_model("demo");
    response->set_version(1);
    response->set_top1(request->label() == 3);
    response->set_top5(true);
    return Status::OK;
  }

 private:
  Shared& shared_;
};

v1::ModelVersion Version(uint64_t number, bool with_report) {
  v1::ModelVersion version;
  version.set_model("demo");
  version.set_version(number);
  version.set_is_default(number == 1);
  version.set_state(v1::READY);
  version.set_scheme(number == 1 ? "fp32" : "ternary-cluster");
  version.set_cluster_size(number == 1 ? 0 : 4);
  version.set_bits_per_weight(number == 1 ? 32 : 4.1);
  version.set_bytes(number == 1 ? 1089536 : 123456);
  version.set_classes(kClasses);
  for (int dim : {3, 32, 32}) version.add_input_shape(dim);
  for (uint32_t c = 0; with_report && c < kClasses; ++c) version.add_labels(ClassName(c));
  if (with_report && number != 1) {
    v1::Recipe recipe;
    recipe.set_weights(v1::TERNARY_CLUSTER);
    recipe.set_cluster_size(4);
    *version.mutable_report() = Report(recipe, 500, 1000);
    if (number == FakeServer::kImportedArtifact) {
      v1::FineTuningReport& tuning = *version.mutable_report()->mutable_fine_tuning();
      tuning.set_best_epoch(2);
      tuning.add_epochs();
      *tuning.mutable_float_top1() = Share(0.9, 1000);
      *tuning.mutable_start_top1() = Share(0.8, 1000);
      *tuning.mutable_top1() = Share(0.85, 1000);
    }
  }
  return version;
}

class Registry : public v1::ModelRegistry::Service {
 public:
  explicit Registry(Shared& shared) : shared_(shared) {}

  Status Import(ServerContext*, grpc::ServerReader<v1::ImportRequest>* reader,
                v1::ImportResponse* response) override {
    v1::ImportRequest request;
    std::lock_guard lock(shared_.mutex);
    while (reader->Read(&request)) {
      if (request.has_start()) shared_.seen.import = request.start();
      shared_.seen.imported_bytes += request.chunk();
    }
    *response->mutable_version() =
        Version(shared_.seen.import.artifact() ? FakeServer::kImportedArtifact : 1, false);
    return Status::OK;
  }
  Status List(ServerContext*, const v1::ListRequest* request, v1::ListResponse* response) override {
    if (request->model() == "missing") return Missing();
    if (request->model() == "broken") {
      v1::ModelVersion* damaged = response->add_versions();
      damaged->set_model("broken");
      damaged->set_version(1);
      damaged->set_state(v1::UNAVAILABLE);
      damaged->set_reason("checksum of section 3");
      damaged->set_bits_per_weight(32);
      return Status::OK;
    }
    *response->add_versions() = Version(1, false);
    *response->add_versions() = Version(2, false);
    return Status::OK;
  }
  Status Get(ServerContext*, const v1::GetRequest* request, v1::ModelVersion* response) override {
    if (request->model() == "missing") return Missing();
    {
      std::lock_guard lock(shared_.mutex);
      const std::string deletion = absl::StrCat("Delete demo ", request->version());
      if (std::count(shared_.seen.calls.begin(), shared_.seen.calls.end(), deletion) > 0) {
        return {StatusCode::NOT_FOUND, "no such version"};
      }
    }
    *response = Version(request->version() == 0 ? 1 : request->version(), true);
    return Status::OK;
  }
  Status Load(ServerContext*, const v1::VersionRequest* request,
              v1::ModelVersion* response) override {
    return Answer("Load", *request, response);
  }
  Status Unload(ServerContext*, const v1::VersionRequest* request,
                v1::ModelVersion* response) override {
    return Answer("Unload", *request, response);
  }
  Status SetDefault(ServerContext*, const v1::VersionRequest* request,
                    v1::ModelVersion* response) override {
    return Answer("SetDefault", *request, response);
  }
  Status Delete(ServerContext*, const v1::VersionRequest* request,
                v1::DeleteResponse* response) override {
    response->set_versions_removed(request->version() == 0 ? 2 : 1);
    v1::ModelVersion unused;
    return Answer("Delete", *request, &unused);
  }
  Status Export(ServerContext*, const v1::ExportRequest* request,
                grpc::ServerWriter<v1::ExportResponse>* writer) override {
    v1::ExportResponse response;
    response.set_file_name(request->format() == v1::ExportRequest::ONNX ? "model.onnx"
                                                                        : "model.tern");
    const std::string bytes = FakeServer::ExportedBytes();
    const size_t half = bytes.size() / 2;
    response.set_chunk(bytes.substr(0, half));
    writer->Write(response);
    // The transfer of "missing" breaks in the middle.
    if (request->model() == "missing") return {StatusCode::DATA_LOSS, "checksum of section 3"};
    response.clear_file_name();
    response.set_chunk(bytes.substr(half));
    writer->Write(response);
    return Status::OK;
  }

 private:
  static Status Missing() { return {StatusCode::NOT_FOUND, "no model 'missing'"}; }
  Status Answer(const std::string& call, const v1::VersionRequest& request,
                v1::ModelVersion* response) {
    if (request.model() == "missing") return Missing();
    shared_.Note(call + " " + request.model() + " " + std::to_string(request.version()));
    *response = Version(request.version(), false);
    return Status::OK;
  }

  Shared& shared_;
};

class Quantizer : public v1::Quantizer::Service {
 public:
  explicit Quantizer(Shared& shared) : shared_(shared) {}

  Status Quantize(
      ServerContext*,
      grpc::ServerReaderWriter<v1::QuantizeResponse, v1::QuantizeRequest>* stream) override {
    v1::QuantizeRequest request;
    stream->Read(&request);
    const v1::QuantizeStart start = request.start();
    if (start.model() == "missing") return {StatusCode::NOT_FOUND, "no model 'missing'"};
    if (start.source_version() == 2) {
      return {StatusCode::FAILED_PRECONDITION, "version 2 is not float"};
    }
    std::vector<v1::SampleImage> samples;
    uint64_t calibration = 0;
    uint64_t evaluation = 0;
    while (stream->Read(&request)) {
      samples.push_back(request.image());
      calibration += request.image().calibration() ? 1 : 0;
      evaluation += request.image().evaluation() ? 1 : 0;
    }
    {
      std::lock_guard lock(shared_.mutex);
      shared_.seen.quantize = start;
      ++shared_.seen.quantizations;
      shared_.seen.samples = samples;
    }
    if (start.recipe().cluster_size() == 13) return {StatusCode::INTERNAL, "thirteen\x1b[2J"};
    v1::QuantizeResponse response;
    response.mutable_progress()->set_phase("calibrating");
    response.mutable_progress()->set_done(0.5);
    response.mutable_progress()->set_detail("conv1");
    stream->Write(response);
    const bool gate_met =
        !start.recipe().has_max_top1_drop() || start.recipe().max_top1_drop() >= 0.1;
    const bool published = gate_met && !start.dry_run();
    v1::QuantizeResult* result = response.mutable_result();
    result->set_model(start.model());
    result->set_version(published ? 3 : 0);
    result->set_published(published);
    *result->mutable_report() = Report(start.recipe(), calibration, evaluation);
    stream->Write(response);
    if (gate_met) return Status::OK;
    return {StatusCode::FAILED_PRECONDITION, "top-1 fell by 0.1, at most 0.05 allowed"};
  }

  Status Evaluate(
      ServerContext*,
      grpc::ServerReaderWriter<v1::EvaluateResponse, v1::EvaluateRequest>* stream) override {
    v1::EvaluateRequest request;
    stream->Read(&request);
    const v1::EvaluateStart start = request.start();
    if (start.model() == "missing") return {StatusCode::NOT_FOUND, "no model 'missing'"};
    std::vector<v1::SampleImage> samples;
    while (stream->Read(&request)) samples.push_back(request.image());
    uint64_t right = 0;
    uint64_t labelled = 0;
    for (const v1::SampleImage& sample : samples) {
      if (!sample.has_label()) continue;
      ++labelled;
      right += static_cast<uint32_t>(sample.image()[0] - '0') == sample.label() ? 1 : 0;
    }
    {
      std::lock_guard lock(shared_.mutex);
      shared_.seen.evaluate = start;
      shared_.seen.samples = samples;
    }
    v1::EvaluateResponse response;
    response.mutable_progress()->set_phase("evaluating");
    stream->Write(response);
    v1::EvaluateResult* result = response.mutable_result();
    result->set_model(start.model());
    result->set_version(start.version() == 0 ? 1 : start.version());
    result->set_images(samples.size());
    result->set_labelled(labelled);
    if (labelled > 0) {
      *result->mutable_top1() =
          Share(static_cast<double>(right) / static_cast<double>(labelled), labelled);
      *result->mutable_top5() = Share(1, labelled);
    }
    if (start.reference_version() != 0) {
      *result->mutable_agreement() = Share(0.5, samples.size());
      result->set_divergence(0.25);
      *result->mutable_comparison() = Compared(labelled, 0.1, 0);
      *result->add_worst_classes() = BadClass();
    }
    result->add_warnings("too few\x1b[2J");
    stream->Write(response);
    return Status::OK;
  }

 private:
  Shared& shared_;
};

class Profiler : public v1::Profiler::Service {
 public:
  Status Benchmark(ServerContext*, const v1::BenchmarkRequest* request,
                   v1::BenchmarkResponse* response) override {
    if (request->model() == "missing") return {StatusCode::NOT_FOUND, "no model 'missing'"};
    response->set_images_per_second(100 * request->batch());
    response->set_ms_per_image(10.0 / request->batch());
    response->set_p50_ms(10);
    response->set_p90_ms(11);
    response->set_p99_ms(12);
    response->set_batches(50);
    response->set_isa("avx2");
    return Status::OK;
  }
  Status Profile(ServerContext*, const v1::ProfileRequest*,
                 v1::ProfileResponse* response) override {
    v1::LayerTime* layer = response->add_layers();
    layer->set_name("conv1");
    layer->set_op("Conv");
    layer->set_scheme("ternary-cluster");
    layer->set_implementation("cluster_avx2");
    layer->set_ms(0.25);
    layer->set_share(1);
    layer->set_gmacs_per_second(9.4);
    v1::WorkTime* work = response->add_work();
    work->set_kind("reorder");
    work->set_ms(0.0625);
    work->set_share(0.25);
    response->set_total_ms(0.25);
    response->set_outside_share(0.25);
    return Status::OK;
  }
};

}  // namespace

struct FakeServer::Impl {
  Shared shared;
  Classifier classifier{shared};
  Registry registry{shared};
  Quantizer quantizer{shared};
  Profiler profiler;
  int data_port = 0;
  int admin_port = 0;
  std::unique_ptr<grpc::Server> data;
  std::unique_ptr<grpc::Server> admin;
};

FakeServer::FakeServer() : impl_(std::make_unique<Impl>()) {
  grpc::EnableDefaultHealthCheckService(true);
  const auto credentials = grpc::InsecureServerCredentials();
  grpc::ServerBuilder data;
  data.SetMaxReceiveMessageSize(64 << 20);
  data.AddListeningPort("127.0.0.1:0", credentials, &impl_->data_port);
  data.RegisterService(&impl_->classifier);
  impl_->data = data.BuildAndStart();
  impl_->data->GetHealthCheckService()->SetServingStatus("loading", false);
  grpc::ServerBuilder admin;
  admin.SetMaxReceiveMessageSize(64 << 20);
  admin.AddListeningPort("127.0.0.1:0", credentials, &impl_->admin_port);
  admin.RegisterService(&impl_->registry);
  admin.RegisterService(&impl_->quantizer);
  admin.RegisterService(&impl_->profiler);
  impl_->admin = admin.BuildAndStart();
}

FakeServer::~FakeServer() {
  // A deadline already over: the tests' idle channels would hold a patient shutdown up.
  impl_->data->Shutdown(std::chrono::system_clock::now());
  impl_->admin->Shutdown(std::chrono::system_clock::now());
}

std::string FakeServer::server() const { return absl::StrCat("127.0.0.1:", impl_->data_port); }
std::string FakeServer::admin() const { return absl::StrCat("127.0.0.1:", impl_->admin_port); }

Seen FakeServer::seen() const {
  std::lock_guard lock(impl_->shared.mutex);
  return impl_->shared.seen;
}

std::string FakeServer::ExportedBytes() {
  std::string bytes;
  for (int i = 0; i < 3'000'000; ++i) bytes.push_back(static_cast<char>(i * 31 % 251));
  return bytes;
}

}  // namespace tern::client
