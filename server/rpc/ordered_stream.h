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
#include "grpc/grpc.h"
#include "grpcpp/support/server_callback.h"
#include "server/rpc/deadline.h"
#include "server/rpc/open_streams.h"
#include "server/rpc/request_timer.h"

namespace tern::rpc {

// Requests of one stream between read and answer. Bounds the memory of a stream, and is enough to
// fill batches.
inline constexpr int kStreamWindow = 32;

// A client's deadline is earlier than the one that we see by the call's way here and by what gRPC
// rounds up: at most 100 ms if it is less than 100 s.
inline constexpr absl::Duration kDeadlineSlack = absl::Milliseconds(200);

// Owned by `open` until OnDone. Finish is called once: after the last read or Stop, the last slot's
// answer and the last write.
template <typename Request, typename Response>
class OrderedStream final : public grpc::ServerBidiReactor<Request, Response>, public OpenStream {
 public:
  // The outcome of the request, for tern_stream_requests_total, and what the client is told.
  using Answer = std::function<void(const absl::Status&, Response)>;
  // Starts the work of one request and calls `answer` once, on any thread, perhaps before it
  // returns. `request` is gone when it returns. `*cancelled` becomes true when the client goes
  // away.
  using Start = std::function<void(
      const Request& request, std::shared_ptr<const std::atomic<bool>> cancelled, Answer answer)>;

  // The stream of the call `context`, which is the method's to return.
  static OrderedStream* Open(grpc::CallbackServerContext* context, OpenStreams* open,
                             metrics::Metrics* metrics, std::string method, Start start) {
    const std::shared_ptr<OrderedStream> stream(
        new OrderedStream(context, open, metrics, std::move(method), std::move(start)));
    OrderedStream* const reactor = stream.get();
    open->Add(stream);
    return reactor;
  }

  void OnReadDone(bool ok) override {
    if (ok) {
      auto slot = std::make_shared<Slot>();
      {
        std::lock_guard<std::mutex> lock(mutex_);
        if (finished_) return;  // it came too late
        slots_.push_back(slot);
      }
      start_(request_, cancelled_, [this, slot](const absl::Status& status, Response response) {
        metrics_->StreamRequest(method_, absl::StatusCodeToString(status.code()));
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
    too_large_ = !ok && slots_.empty() && !grpc_call_failed_before_recv_message(context_->c_call());
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
  void OnDone() override {
    {
      std::lock_guard<std::mutex> lock(mutex_);
      timer_.Finish(Outcome(status_));
    }
    open_->Remove(this);
  }

  void Stop() override {
    std::unique_lock<std::mutex> lock(mutex_);
    stopping_ = true;
    Advance(std::move(lock));
  }

 private:
  struct Slot {
    bool ready = false;
    Response response;
  };

  OrderedStream(grpc::CallbackServerContext* context, OpenStreams* open, metrics::Metrics* metrics,
                std::string method, Start start)
      : context_(context),
        open_(open),
        start_(std::move(start)),
        metrics_(metrics),
        method_(std::move(method)),
        timer_(metrics, method_),
        deadline_(Deadline(*context)),
        cancelled_(std::make_shared<std::atomic<bool>>(false)) {
    this->StartRead(&request_);
  }

  // What the client got if it was told `status`. gRPC says that a call was cancelled, but not why.
  absl::Status Outcome(const absl::Status& status) const {
    if (!status.ok() || (!broken_ && !context_->IsCancelled())) return status;
    if (Clock::Real()->Now() + kDeadlineSlack >= deadline_) {
      return absl::DeadlineExceededError("the deadline passed");
    }
    if (too_large_) return absl::ResourceExhaustedError("a message is over the limit");
    return absl::CancelledError("the client went away");
  }

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
    if (!reading_ && !reads_done_ && !stopping_ &&
        static_cast<int>(slots_.size()) < kStreamWindow) {
      reading_ = true;
      this->StartRead(&request_);
    }
    const bool finish = (reads_done_ || stopping_) && slots_.empty() && !writing_ && !finished_;
    if (finish) {
      finished_ = true;
      status_ = Outcome(reads_done_ ? absl::OkStatus()
                                    : absl::UnavailableError("the server is stopping"));
    }
    lock.unlock();
    if (finish) this->Finish(ToGrpc(status_));
  }

  grpc::CallbackServerContext* const context_;
  OpenStreams* const open_;
  const Start start_;
  metrics::Metrics* const metrics_;
  const std::string method_;
  RequestTimer timer_;
  const absl::Time deadline_;
  const std::shared_ptr<std::atomic<bool>> cancelled_;
  Request request_;  // of the read in progress
  std::mutex mutex_;
  std::deque<std::shared_ptr<Slot>> slots_;
  bool reading_ = true, reads_done_ = false, writing_ = false, broken_ = false, finished_ = false;
  bool stopping_ = false;
  // A read failed in a call that had not: the client is done, or gRPC cancels it for this.
  bool too_large_ = false;
  absl::Status status_;  // of Finish
};

}  // namespace tern::rpc

#endif  // TERN_SERVER_RPC_ORDERED_STREAM_H_
