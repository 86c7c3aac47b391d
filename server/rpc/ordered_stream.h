// A bidirectional call whose every request has one answer, sent in the order of the requests while
// later ones are worked on already.
#ifndef TERN_SERVER_RPC_ORDERED_STREAM_H_
#define TERN_SERVER_RPC_ORDERED_STREAM_H_

#include <atomic>
#include <deque>
#include <functional>
#include <memory>
#include <mutex>
#include <string>
#include <utility>

#include "absl/status/status.h"
#include "grpcpp/support/server_callback.h"
#include "server/rpc/request_timer.h"

namespace tern::rpc {

// Requests of one stream between read and answer. Bounds the memory of a stream, and is enough to
// fill batches.
inline constexpr int kStreamWindow = 32;

// Deletes itself in OnDone. Finish is called once: after the last read, the last slot's answer and
// the last write.
template <typename Request, typename Response>
class OrderedStream final : public grpc::ServerBidiReactor<Request, Response> {
 public:
  using Answer = std::function<void(Response)>;
  // Starts the work of one request and calls `answer` once, on any thread, perhaps before it
  // returns. `request` is gone when it returns. `*cancelled` becomes true when the client goes
  // away.
  using Start = std::function<void(
      const Request& request, std::shared_ptr<const std::atomic<bool>> cancelled, Answer answer)>;

  OrderedStream(metrics::Metrics* metrics, std::string method, Start start)
      : start_(std::move(start)),
        timer_(metrics, std::move(method)),
        cancelled_(std::make_shared<std::atomic<bool>>(false)) {
    this->StartRead(&request_);
  }

  void OnReadDone(bool ok) override {
    if (ok) {
      auto slot = std::make_shared<Slot>();
      {
        std::lock_guard<std::mutex> lock(mutex_);
        slots_.push_back(slot);
      }
      start_(request_, cancelled_, [this, slot](Response response) {
        std::unique_lock<std::mutex> lock(mutex_);
        slot->response = std::move(response);
        slot->ready = true;
        Advance(std::move(lock));
      });
    }
    // Only now may the next read overwrite request_.
    std::unique_lock<std::mutex> lock(mutex_);
    reading_ = false;
    reads_done_ = !ok;
    Advance(std::move(lock));
  }

  void OnWriteDone(bool ok) override {
    std::unique_lock<std::mutex> lock(mutex_);
    writing_ = false;
    if (!ok) broken_ = true;
    slots_.pop_front();
    Advance(std::move(lock));
  }

  void OnCancel() override { *cancelled_ = true; }
  void OnDone() override { delete this; }

 private:
  struct Slot {
    bool ready = false;
    Response response;
  };

  // Starts whatever can start. `this` may be gone when it returns: Finish can lead to OnDone at
  // once.
  void Advance(std::unique_lock<std::mutex> lock) {
    if (broken_) {
      while (!writing_ && !slots_.empty() && slots_.front()->ready) slots_.pop_front();
    }
    if (!writing_ && !broken_ && !slots_.empty() && slots_.front()->ready) {
      writing_ = true;
      this->StartWrite(&slots_.front()->response);
    }
    if (!reading_ && !reads_done_ && static_cast<int>(slots_.size()) < kStreamWindow) {
      reading_ = true;
      this->StartRead(&request_);
    }
    const bool finish = reads_done_ && slots_.empty() && !writing_ && !finished_;
    if (finish) finished_ = true;
    lock.unlock();
    if (finish) {
      this->Finish(
          timer_.Finish(broken_ ? absl::CancelledError("the client went away") : absl::OkStatus()));
    }
  }

  const Start start_;
  RequestTimer timer_;
  const std::shared_ptr<std::atomic<bool>> cancelled_;
  Request request_;  // of the read in progress
  std::mutex mutex_;
  std::deque<std::shared_ptr<Slot>> slots_;
  bool reading_ = true, reads_done_ = false, writing_ = false, broken_ = false, finished_ = false;
};

}  // namespace tern::rpc

#endif  // TERN_SERVER_RPC_ORDERED_STREAM_H_
