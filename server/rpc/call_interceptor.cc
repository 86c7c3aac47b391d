#include "server/rpc/call_interceptor.h"

#include <google/protobuf/message.h>
#include <google/protobuf/text_format.h>

#include <algorithm>
#include <map>
#include <optional>
#include <string>
#include <utility>

#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "google/rpc/error_details.pb.h"
#include "google/rpc/status.pb.h"
#include "server/base/clock.h"
#include "server/base/log_fields.h"
#include "server/rpc/grpc_status.h"
#include "server/rpc/identity.h"
#include "server/rpc/trace_context.h"
#include "server/serving/classify.h"

namespace tern::rpc {
namespace {

using ::grpc::experimental::InterceptionHookPoints;
using ::grpc::experimental::InterceptorBatchMethods;

constexpr size_t kMaxWhatBytes = 512;
constexpr char kTraceHeader[] = "traceparent";
// gRPC's clients retry no earlier than this many milliseconds, and never if it is negative (gRFC
// A6).
constexpr char kPushbackHeader[] = "grpc-retry-pushback-ms";

using Metadata = std::multimap<grpc::string_ref, grpc::string_ref>;

std::vector<absl::string_view> Values(const Metadata& metadata, const char* key) {
  std::vector<absl::string_view> values;
  const auto [begin, end] = metadata.equal_range(key);
  for (auto it = begin; it != end; ++it) values.emplace_back(it->second.data(), it->second.size());
  return values;
}

bool IsRequestId(absl::string_view id) {
  return !id.empty() && id.size() <= serving::kMaxRequestIdBytes &&
         std::all_of(id.begin(), id.end(), [](char c) { return c > ' ' && c <= '~'; });
}

std::string ValidRequestId(const Metadata& metadata) {
  const auto values = Values(metadata, kRequestIdHeader);
  return values.size() == 1 && IsRequestId(values[0]) ? std::string(values[0]) : "";
}

// `model: "r50" version: 2`: the fields that are set and plain.
void DescribeFields(const google::protobuf::Message& message, std::string* out) {
  using google::protobuf::FieldDescriptor;
  std::vector<const FieldDescriptor*> fields;
  message.GetReflection()->ListFields(message, &fields);
  for (const FieldDescriptor* field : fields) {
    if (out->size() > kMaxWhatBytes) return;
    if (field->is_repeated() || field->type() == FieldDescriptor::TYPE_BYTES) continue;
    if (field->cpp_type() == FieldDescriptor::CPPTYPE_MESSAGE) {
      if (field->name() == "start") {
        DescribeFields(message.GetReflection()->GetMessage(message, field), out);
      }
      continue;
    }
    std::string value;
    google::protobuf::TextFormat::PrintFieldValueToString(message, field, -1, &value);
    absl::StrAppend(out, out->empty() ? "" : " ", field->name(), ": ", value);
  }
}

// The hint of google.rpc.RetryInfo in a status's details, if there is one.
std::optional<absl::Duration> RetryHintOf(const std::string& status_details) {
  google::rpc::Status details;
  if (status_details.empty() || !details.ParseFromString(status_details)) return std::nullopt;
  for (const google::protobuf::Any& detail : details.details()) {
    google::rpc::RetryInfo info;
    if (detail.UnpackTo(&info)) {
      return absl::Seconds(info.retry_delay().seconds()) +
             absl::Nanoseconds(info.retry_delay().nanos());
    }
  }
  return std::nullopt;
}

class CallInterceptor final : public grpc::experimental::Interceptor {
 public:
  CallInterceptor(const PortGuard* guard, CallCounts* counts,
                  grpc::experimental::ServerRpcInfo* info, bool audit, bool ours)
      : guard_(guard),
        counts_(counts),
        info_(info),
        audit_(audit && ours),
        ours_(ours),
        start_(Clock::Real()->Now()) {
    if (ours_) ++counts_->running;
  }
  ~CallInterceptor() override {
    if (ours_) --counts_->running;
  }

  void Intercept(InterceptorBatchMethods* methods) override {
    if (methods->QueryInterceptionHookPoint(InterceptionHookPoints::POST_RECV_INITIAL_METADATA)) {
      OnMetadata(methods->GetRecvInitialMetadata());
    }
    if (audit_ && methods->QueryInterceptionHookPoint(InterceptionHookPoints::POST_RECV_MESSAGE)) {
      OnMessage(methods->GetRecvMessage());
    }
    if (methods->QueryInterceptionHookPoint(InterceptionHookPoints::PRE_SEND_INITIAL_METADATA)) {
      OnAnswer(methods->GetSendInitialMetadata());
    }
    if (ours_ && methods->QueryInterceptionHookPoint(InterceptionHookPoints::PRE_SEND_STATUS)) {
      OnStatus(methods->GetSendStatus());
      if (std::multimap<std::string, std::string>* trailers = methods->GetSendTrailingMetadata()) {
        AddPushback(methods->GetSendStatus(), trailers);
      }
    }
    methods->Proceed();
  }

 private:
  void OnMetadata(Metadata* metadata) {
    if (metadata == nullptr) return;
    metadata->erase(kTokenNameKey);
    if (std::optional<std::string> name = guard_->TokenName(Values(*metadata, "authorization"))) {
      token_name_ = *std::move(name);
      metadata->emplace(kTokenNameKey, token_name_);
    }
    const auto trace = Values(*metadata, kTraceHeader);
    if (trace.size() == 1 && !TraceIdOf(trace[0]).empty()) traceparent_ = std::string(trace[0]);
    request_id_ = ValidRequestId(*metadata);
    // Now: a call that is cancelled forgets its peer.
    if (ours_) {
      caller_ = CallerOf(*info_->server_context()).ToString();
      peer_ = info_->server_context()->peer();
    }
  }

  void OnMessage(const void* message) {
    if (message == nullptr || described_) return;
    described_ = true;
    // gRPC hands out the request's address without its type. Every generated message derives from
    // Message alone, so that both begin at the same address.
    DescribeFields(*static_cast<const google::protobuf::Message*>(message), &what_);
    if (what_.size() > kMaxWhatBytes) {
      what_.resize(kMaxWhatBytes);
      what_ += "...";
    }
  }

  void OnAnswer(std::multimap<std::string, std::string>* metadata) {
    if (metadata == nullptr) return;
    if (!traceparent_.empty()) metadata->emplace(kTraceHeader, traceparent_);
    if (const auto set = metadata->find(kRequestIdHeader); set != metadata->end()) {
      request_id_ = set->second;
    } else if (!request_id_.empty()) {
      metadata->emplace(kRequestIdHeader, request_id_);
    }
  }

  // The hint of google.rpc.RetryInfo in the form that gRPC's own retries obey. RESOURCE_EXHAUSTED
  // stands for a full queue, which passes, and for a request that is too large, which does not:
  // without a hint it is of the second kind.
  static void AddPushback(const grpc::Status& status,
                          std::multimap<std::string, std::string>* trailers) {
    if (const std::optional<absl::Duration> after = RetryHintOf(status.error_details())) {
      trailers->emplace(kPushbackHeader, absl::StrCat(absl::ToInt64Milliseconds(*after)));
    } else if (status.error_code() == grpc::StatusCode::RESOURCE_EXHAUSTED) {
      trailers->emplace(kPushbackHeader, "-1");
    }
  }

  void OnStatus(const grpc::Status& status) {
    ++(counts_->closing ? counts_->given_up : counts_->answered);
    const bool fault = status.error_code() == grpc::StatusCode::INTERNAL ||
                       status.error_code() == grpc::StatusCode::UNKNOWN ||
                       status.error_code() == grpc::StatusCode::DATA_LOSS;
    const auto level = fault ? spdlog::level::err : spdlog::level::debug;
    const bool log = spdlog::should_log(level) && (fault || !audit_);
    if (!audit_ && !log) return;
    LogFields fields = {{"caller", caller_}, {"peer", peer_}, {"method", info_->method()}};
    if (audit_) fields.emplace_back("request", what_);
    fields.emplace_back("result", CodeName(status));
    fields.emplace_back(
        "seconds", absl::StrFormat("%.6f", absl::ToDoubleSeconds(Clock::Real()->Now() - start_)));
    if (!status.ok()) fields.emplace_back("error", status.error_message());
    if (!request_id_.empty()) fields.emplace_back("request_id", request_id_);
    if (!traceparent_.empty()) fields.emplace_back("trace_id", TraceIdOf(traceparent_));
    if (audit_) AuditLog("call", fields);
    if (log) Log(level, "call", fields);
  }

  const PortGuard* const guard_;
  CallCounts* const counts_;
  grpc::experimental::ServerRpcInfo* const info_;
  const bool audit_, ours_;
  const absl::Time start_;
  std::string token_name_;  // the context's metadata points to it
  std::string caller_, peer_;
  std::string traceparent_, request_id_;
  std::string what_;
  bool described_ = false;
};

class Factory final : public grpc::experimental::ServerInterceptorFactoryInterface {
 public:
  Factory(std::shared_ptr<PortGuard> guard, std::shared_ptr<CallCounts> counts, bool audit)
      : guard_(std::move(guard)), counts_(std::move(counts)), audit_(audit) {}

  grpc::experimental::Interceptor* CreateServerInterceptor(
      grpc::experimental::ServerRpcInfo* info) override {
    const bool ours = !absl::StartsWith(info->method(), "/grpc.");
    return new CallInterceptor(guard_.get(), counts_.get(), info, audit_, ours);
  }

 private:
  const std::shared_ptr<PortGuard> guard_;
  const std::shared_ptr<CallCounts> counts_;
  const bool audit_;
};

}  // namespace

void NameRequest(grpc::ServerContextBase* context, bool generated, std::string* id) {
  if (generated) {
    std::string sent = ValidRequestId(context->client_metadata());
    if (!sent.empty()) *id = std::move(sent);
  }
  if (IsRequestId(*id)) context->AddInitialMetadata(kRequestIdHeader, *id);
}

std::vector<std::unique_ptr<grpc::experimental::ServerInterceptorFactoryInterface>>
MakeCallInterceptors(std::shared_ptr<PortGuard> guard, std::shared_ptr<CallCounts> counts,
                     bool audit) {
  std::vector<std::unique_ptr<grpc::experimental::ServerInterceptorFactoryInterface>> creators;
  creators.push_back(std::make_unique<Factory>(std::move(guard), std::move(counts), audit));
  return creators;
}

}  // namespace tern::rpc
