#include "server/rpc/registry_service.h"

#include <algorithm>
#include <filesystem>
#include <fstream>

#include "absl/strings/str_cat.h"
#include "server/base/status_macros.h"
#include "server/rpc/request_timer.h"

namespace tern::rpc {
namespace {

constexpr size_t kChunkBytes = 1 << 20;

v1::VersionState ToProto(repository::State state) {
  switch (state) {
    case repository::State::kLoading:
      return v1::LOADING;
    case repository::State::kReady:
      return v1::READY;
    case repository::State::kUnavailable:
      return v1::UNAVAILABLE;
    case repository::State::kUnloaded:
      return v1::UNLOADED;
  }
  return v1::UNKNOWN;
}

void ToProto(const repository::VersionInfo& info, v1::ModelVersion* version) {
  version->set_model(info.model);
  version->set_version(info.version);
  version->set_is_default(info.is_default);
  version->set_state(ToProto(info.state));
  version->set_reason(info.reason);
  version->set_scheme(info.scheme);
  version->set_cluster_size(info.cluster_size);
  version->set_bytes(info.file_bytes);
  version->set_classes(info.classes);
  version->set_bits_per_weight(info.bits_per_weight);
  for (int64_t dim : info.input_shape.dims()) version->add_input_shape(dim);
}

absl::Status Fill(const absl::StatusOr<repository::VersionInfo>& info, v1::ModelVersion* version) {
  if (info.ok()) ToProto(*info, version);
  return info.status();
}

}  // namespace

grpc::Status RegistryService::Import(grpc::ServerContext* context,
                                     grpc::ServerReader<v1::ImportRequest>* reader,
                                     v1::ImportResponse* response) {
  RequestTimer timer(metrics_, "Import");
  const absl::Status status = DoImport(context, reader, response);
  changed_();
  return timer.Finish(status);
}

absl::Status RegistryService::DoImport(grpc::ServerContext* context,
                                       grpc::ServerReader<v1::ImportRequest>* reader,
                                       v1::ImportResponse* response) {
  v1::ImportRequest request;
  if (!reader->Read(&request) || !request.has_start()) {
    return absl::InvalidArgumentError("the first message must be `start`");
  }
  const v1::ImportStart start = request.start();
  TERN_RETURN_IF_ERROR(repository::ValidateModelName(start.name()));
  if (start.artifact() && (start.has_preprocessing() || start.labels_size() > 0)) {
    return absl::InvalidArgumentError(
        "preprocessing and labels must be absent: an artifact brings its own");
  }
  const char* const kind = start.artifact() ? "artifact" : "ONNX file";
  std::string file;
  while (reader->Read(&request)) {
    if (!request.has_chunk())
      return absl::InvalidArgumentError("messages after the first must be chunks");
    if (file.size() + request.chunk().size() > max_onnx_bytes_) {
      return absl::ResourceExhaustedError(
          absl::StrCat(kind, ": more than ", max_onnx_bytes_, " bytes"));
    }
    file += request.chunk();
  }
  if (context->IsCancelled()) {
    return absl::CancelledError(
        absl::StrCat("cancelled after ", file.size(), " bytes of the ", kind));
  }
  if (file.empty())
    return absl::InvalidArgumentError(absl::StrCat("no bytes of the ", kind, " were sent"));
  if (start.artifact()) {
    return Fill(repository_->ImportArtifact(start.name(), file, start.set_default()),
                response->mutable_version());
  }
  const std::vector<std::string> labels(start.labels().begin(), start.labels().end());
  return Fill(
      repository_->Import(start.name(), file, start.preprocessing(), labels, start.set_default()),
      response->mutable_version());
}

grpc::Status RegistryService::List(grpc::ServerContext* context, const v1::ListRequest* request,
                                   v1::ListResponse* response) {
  RequestTimer timer(metrics_, "List");
  for (const repository::VersionInfo& info : repository_->List(request->model())) {
    ToProto(info, response->add_versions());
  }
  if (response->versions().empty() && !request->model().empty()) {
    return timer.Finish(
        absl::NotFoundError(absl::StrCat("model \"", request->model(), "\" does not exist")));
  }
  return timer.Finish(absl::OkStatus());
}

grpc::Status RegistryService::Get(grpc::ServerContext* context, const v1::GetRequest* request,
                                  v1::ModelVersion* response) {
  RequestTimer timer(metrics_, "Get");
  const absl::Status status =
      Fill(repository_->Info(request->model(), request->version()), response);
  if (status.ok()) {
    // What only a loaded version knows; a version that is not ready still answers with its state.
    const auto model = repository_->Find(request->model(), request->version());
    if (model.ok()) {
      *response->mutable_preprocessing() = (*model)->preprocessing;
      for (const std::string& label : (*model)->labels) response->add_labels(label);
      if ((*model)->report.has_recipe()) *response->mutable_report() = (*model)->report;
    }
  }
  return timer.Finish(status);
}

grpc::Status RegistryService::Load(grpc::ServerContext* context, const v1::VersionRequest* request,
                                   v1::ModelVersion* response) {
  RequestTimer timer(metrics_, "Load");
  const absl::Status status =
      Fill(repository_->Load(request->model(), request->version()), response);
  changed_();
  return timer.Finish(status);
}

grpc::Status RegistryService::Unload(grpc::ServerContext* context,
                                     const v1::VersionRequest* request,
                                     v1::ModelVersion* response) {
  RequestTimer timer(metrics_, "Unload");
  const absl::Status status =
      Fill(repository_->Unload(request->model(), request->version()), response);
  changed_();
  return timer.Finish(status);
}

grpc::Status RegistryService::SetDefault(grpc::ServerContext* context,
                                         const v1::VersionRequest* request,
                                         v1::ModelVersion* response) {
  RequestTimer timer(metrics_, "SetDefault");
  const absl::Status status =
      Fill(repository_->SetDefault(request->model(), request->version()), response);
  changed_();
  return timer.Finish(status);
}

grpc::Status RegistryService::Delete(grpc::ServerContext* context,
                                     const v1::VersionRequest* request,
                                     v1::DeleteResponse* response) {
  RequestTimer timer(metrics_, "Delete");
  const absl::StatusOr<uint64_t> removed =
      repository_->Delete(request->model(), request->version());
  if (removed.ok()) response->set_versions_removed(*removed);
  changed_();
  return timer.Finish(removed.status());
}

grpc::Status RegistryService::Export(grpc::ServerContext* context, const v1::ExportRequest* request,
                                     grpc::ServerWriter<v1::ExportResponse>* writer) {
  RequestTimer timer(metrics_, "Export");
  return timer.Finish(DoExport(*request, writer));
}

absl::Status RegistryService::DoExport(const v1::ExportRequest& request,
                                       grpc::ServerWriter<v1::ExportResponse>* writer) {
  v1::ExportResponse response;
  if (request.format() == v1::ExportRequest::ONNX) {
    TERN_ASSIGN_OR_RETURN(const std::string bytes,
                          repository_->ReadAsOnnx(request.model(), request.version()));
    response.set_file_name("model.onnx");
    for (size_t at = 0; at < bytes.size(); at += kChunkBytes) {
      response.set_chunk(bytes.data() + at, std::min(kChunkBytes, bytes.size() - at));
      if (!writer->Write(response)) return absl::CancelledError("the client went away");
      response.clear_file_name();
    }
    return absl::OkStatus();
  }
  if (request.format() != v1::ExportRequest::STORED) {
    return absl::InvalidArgumentError(
        absl::StrCat("format: got ", static_cast<int>(request.format()), ", want STORED or ONNX"));
  }
  TERN_ASSIGN_OR_RETURN(const std::string path,
                        repository_->FilePath(request.model(), request.version()));
  std::ifstream file(path, std::ios::binary);
  if (!file) return absl::InternalError(absl::StrCat("cannot open ", path));
  response.set_file_name(std::filesystem::path(path).filename().string());
  std::string chunk(kChunkBytes, '\0');
  do {
    file.read(chunk.data(), static_cast<std::streamsize>(chunk.size()));
    if (file.bad()) return absl::InternalError(absl::StrCat("cannot read ", path));
    response.set_chunk(chunk.data(), file.gcount());
    if (!writer->Write(response)) return absl::CancelledError("the client went away");
    response.clear_file_name();
  } while (file);
  return absl::OkStatus();
}

}  // namespace tern::rpc
