#include "server/serving/admission.h"

#include <utility>

#include "absl/strings/str_cat.h"
#include "server/base/retry_after.h"

namespace tern::serving {
namespace {

constexpr size_t kMaxClientName = 256;
// How long an image stays is not known here; a few batches of most networks.
constexpr absl::Duration kRetryAfter = absl::Milliseconds(100);

}  // namespace

Admission::Ticket::~Ticket() {
  std::lock_guard<std::mutex> lock(admission_->mutex_);
  admission_->bytes_ -= bytes_;
  --admission_->images_;
  const auto it = admission_->images_of_.find(client_);
  if (--it->second == 0) admission_->images_of_.erase(it);
  admission_->Tell();
}

absl::Status Admission::CheckFits(int64_t images, int64_t bytes) const {
  if (options_.max_client_images > 0 && images > options_.max_client_images) {
    return absl::ResourceExhaustedError(
        absl::StrCat("images: got ", images, " in one request, a client may have ",
                     options_.max_client_images, " here (--max_client_images)"));
  }
  if (bytes > options_.max_bytes) {
    return absl::ResourceExhaustedError(
        absl::StrCat("images: ", images, " of one request would hold ", bytes,
                     " bytes, all may hold ", options_.max_bytes, " (--max_waiting_bytes)"));
  }
  return absl::OkStatus();
}

absl::StatusOr<std::shared_ptr<Admission::Ticket>> Admission::Admit(absl::string_view client,
                                                                    int64_t bytes) {
  std::string name(client.substr(0, kMaxClientName));
  std::lock_guard<std::mutex> lock(mutex_);
  const auto it = images_of_.find(name);
  const int images = it == images_of_.end() ? 0 : it->second;
  if (options_.max_client_images > 0 && images >= options_.max_client_images) {
    metrics_->Rejected("client_limit");
    return RetryAfter(
        absl::ResourceExhaustedError(absl::StrCat(
            "this client has ", images, " images here, the limit is ", options_.max_client_images)),
        kRetryAfter);
  }
  if (bytes > options_.max_bytes - bytes_) {
    metrics_->Rejected("waiting_bytes");
    return RetryAfter(absl::ResourceExhaustedError(absl::StrCat(
                          "waiting images hold ", bytes_, " bytes, this one would add ", bytes,
                          ", the limit is ", options_.max_bytes)),
                      kRetryAfter);
  }
  bytes_ += bytes;
  ++images_;
  images_of_[name] = images + 1;
  Tell();
  return std::shared_ptr<Ticket>(new Ticket(this, std::move(name), bytes, images_ == 1));
}

void Admission::Tell() {
  metrics_->Waiting(bytes_, images_, static_cast<int64_t>(images_of_.size()));
}

}  // namespace tern::serving
