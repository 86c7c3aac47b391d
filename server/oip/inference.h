// The Open Inference Protocol without a transport: what rpc and http serve alike.
#ifndef TERN_SERVER_OIP_INFERENCE_H_
#define TERN_SERVER_OIP_INFERENCE_H_

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <functional>
#include <limits>
#include <string>

#include "absl/status/statusor.h"
#include "absl/time/time.h"
#include "inference/grpc_service.pb.h"
#include "server/repository/repository.h"
#include "server/serving/classify.h"

namespace tern::oip {

struct Caller {
  absl::Time deadline = absl::InfiniteFuture();
  std::function<bool()> cancelled;  // true once the caller has gone away; may be null
  std::string client;               // as serving::ClassifyInput's
  bool on_this_thread = false;      // as that
};

using InferDone = std::function<void(absl::StatusOr<inference::ModelInferResponse>)>;

// Thread safe. No call blocks, unless Caller::on_this_thread allows it.
//
// A model's name and version: version "" = the default one. INVALID_ARGUMENT if it is not a number,
// NOT_FOUND if there is none, UNAVAILABLE if it is not ready.
class Inference {
 public:
  // `server_version` is Tern's. Nothing is owned.
  Inference(repository::Repository* repository, serving::Classifier* classifier,
            std::string server_version)
      : repository_(repository),
        classifier_(classifier),
        server_version_(std::move(server_version)) {}

  // A transport takes no messages of more bytes. For the start of one at a time.
  void LimitMessageBytes(uint64_t bytes) {
    max_message_bytes_ = std::min(max_message_bytes_.load(), bytes);
  }

  // False once SetDraining() was called.
  bool ServerReady() const { return !draining_; }
  void SetDraining() { draining_ = true; }

  inference::ServerMetadataResponse ServerMetadata() const;
  // False also for a model that does not exist.
  absl::StatusOr<bool> ModelReady(const std::string& name, const std::string& version) const;
  absl::StatusOr<inference::ModelMetadataResponse> ModelMetadata(const std::string& name,
                                                                 const std::string& version) const;
  // max_batch_size is kMaxImages, or less: what the version's queue takes, and what one message can
  // hold of FP32 images.
  absl::StatusOr<inference::ModelConfig> ModelConfig(const std::string& name,
                                                     const std::string& version) const;
  // Here name "" means every model, and version "" every version; those that are not ready are left
  // out, unless nothing of a model is.
  absl::StatusOr<inference::ModelStatisticsResponse> ModelStatistics(
      const std::string& name, const std::string& version) const;
  inference::RepositoryIndexResponse RepositoryIndex(bool only_ready) const;

  // `done` is called once, on any thread, perhaps before this returns. `request` is not used after
  // that. The errors of ParseInfer and Classifier::ClassifyAll. The request's id, "ID/i" for image
  // i of several, is the one that ReportLabel takes.
  void ModelInfer(const inference::ModelInferRequest& request, Caller caller, InferDone done) const;

 private:
  repository::Repository* const repository_;
  serving::Classifier* const classifier_;
  const std::string server_version_;
  std::atomic<uint64_t> max_message_bytes_ = std::numeric_limits<uint64_t>::max();
  std::atomic<bool> draining_{false};
};

}  // namespace tern::oip

#endif  // TERN_SERVER_OIP_INFERENCE_H_
