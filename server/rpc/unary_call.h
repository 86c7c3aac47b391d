// A unary call with one answer, given on any thread, perhaps before its method has returned.
#ifndef TERN_SERVER_RPC_UNARY_CALL_H_
#define TERN_SERVER_RPC_UNARY_CALL_H_

#include <atomic>
#include <string>
#include <utility>

#include "absl/status/status.h"
#include "grpcpp/support/server_callback.h"
#include "server/rpc/request_timer.h"

namespace tern::rpc {

// Deletes itself.
class UnaryCall final : public grpc::ServerUnaryReactor {
 public:
  // Calls `start(call)`, which sees to it that call->Answer() is called once. What is returned is
  // the method's to return.
  template <typename Start>
  static grpc::ServerUnaryReactor* Serve(grpc::CallbackServerContext* context,
                                         metrics::Metrics* metrics, std::string method,
                                         Start start) {
    auto* call = new UnaryCall(metrics, std::move(method));
    start(call);
    if (!call->second_.exchange(true)) return call;
    // gRPC ends calls with a reactor of ours on yet another thread, but not those with its own.
    grpc::ServerUnaryReactor* reactor = context->DefaultReactor();
    reactor->Finish(std::move(call->status_));
    delete call;
    return reactor;
  }

  // The response is filled by then. The call may be gone when this returns.
  void Answer(const absl::Status& status) {
    status_ = timer_.Finish(status);
    if (second_.exchange(true)) Finish(std::move(status_));
  }

  void OnDone() override { delete this; }

 private:
  UnaryCall(metrics::Metrics* metrics, std::string method) : timer_(metrics, std::move(method)) {}

  RequestTimer timer_;
  grpc::Status status_;
  // Set by the first of the two, the answer and the method's end; the second ends the call.
  std::atomic<bool> second_{false};
};

}  // namespace tern::rpc

#endif  // TERN_SERVER_RPC_UNARY_CALL_H_
