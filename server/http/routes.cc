#include "server/http/routes.h"

#include <algorithm>
#include <initializer_list>
#include <memory>
#include <optional>
#include <utility>
#include <vector>

#include "absl/status/status.h"
#include "absl/strings/ascii.h"
#include "absl/strings/escaping.h"
#include "absl/strings/match.h"
#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_split.h"
#include "absl/strings/strip.h"
#include "absl/time/time.h"
#include "nlohmann/json.hpp"
#include "server/base/clock.h"
#include "server/base/limit_message.h"
#include "server/base/log.h"
#include "server/base/retry_after.h"
#include "server/base/status_macros.h"
#include "server/http/inference_json.h"

namespace tern::http {
namespace {

using nlohmann::json;

// Of an inference. HTTP brings no deadline, and a client that hangs up is not noticed before the
// answer is written; `timeout` in the request's parameters shortens it.
constexpr absl::Duration kInferDeadline = absl::Seconds(30);
constexpr char kJsonBytes[] = "inference-header-content-length";

int HttpStatus(const absl::Status& status) {
  switch (status.code()) {
    case absl::StatusCode::kOk:
      return 200;
    case absl::StatusCode::kInvalidArgument:
    case absl::StatusCode::kFailedPrecondition:
    case absl::StatusCode::kOutOfRange:
      return 400;
    case absl::StatusCode::kUnauthenticated:
      return 401;
    case absl::StatusCode::kPermissionDenied:
      return 403;
    case absl::StatusCode::kNotFound:
      return 404;
    case absl::StatusCode::kResourceExhausted:
      // Clients send again what got 429; an image over a limit stays over it.
      return RetryAfterOf(status).has_value() ? 429 : 413;
    case absl::StatusCode::kUnimplemented:
      return 501;
    case absl::StatusCode::kUnavailable:
      return 503;
    case absl::StatusCode::kDeadlineExceeded:
      return 504;
    default:
      return 500;
  }
}

// As rpc::Caller names an address, so that a host is one client over both.
std::string ClientOf(const Request& request) {
  const bool ipv6 = absl::StrContains(request.client, ':');
  return ipv6 ? absl::StrCat("address:ipv6:%5B", request.client, "%5D")
              : absl::StrCat("address:ipv4:", request.client);
}

Response StatusResponse(const absl::Status& status) {
  Response response = ErrorResponse(HttpStatus(status), LimitMessage(status.message()));
  if (const auto after = RetryAfterOf(status); after.has_value()) {
    response.headers.emplace_back(
        "Retry-After", absl::StrCat(absl::ToInt64Seconds(absl::Ceil(*after, absl::Seconds(1)))));
  }
  if (response.status == 401) response.headers.emplace_back("WWW-Authenticate", "Bearer");
  return response;
}

Response JsonResponse(std::string body) {
  Response response;
  response.body = std::move(body);
  return response;
}

// One call under /v2, counted as an RPC is: in flight, duration and code.
class Call {
 public:
  Call(metrics::Metrics* metrics, const char* name, Respond respond)
      : metrics_(metrics),
        method_(absl::StrCat("http.", name)),
        start_(Clock::Real()->Now()),
        respond_(std::move(respond)) {
    metrics_->InFlight(method_, 1);
  }
  Call(const Call&) = delete;
  Call& operator=(const Call&) = delete;

  // Call one of them once.
  void Finish(Response response) { Finish(absl::OkStatus(), std::move(response)); }
  void Finish(const absl::Status& status) { Finish(status, StatusResponse(status)); }
  template <typename M>
  void Finish(const absl::StatusOr<M>& message) {
    if (!message.ok()) return Finish(message.status());
    Finish(JsonResponse(MessageToJson(*message)));
  }

 private:
  void Finish(const absl::Status& status, Response response) {
    metrics_->InFlight(method_, -1);
    metrics_->Request(method_, absl::StatusCodeToString(status.code()),
                      Clock::Real()->Now() - start_);
    if (response.status == 500) TERN_LOG_ERROR("{}: {}", method_, status.ToString());
    respond_(std::move(response));
  }

  metrics::Metrics* const metrics_;
  const std::string method_;
  const absl::Time start_;
  const Respond respond_;
};

// A part of a path with those bytes decoded that need no %XX. All others stay as they are, which no
// name of a model has: a separator, NUL or '%' does not come about, nor do "." and "..".
std::string DecodePart(const std::string& part) {
  std::string decoded;
  for (size_t i = 0; i < part.size(); ++i) {
    char byte = part[i];
    if (byte == '%' && i + 2 < part.size() && absl::ascii_isxdigit(part[i + 1]) &&
        absl::ascii_isxdigit(part[i + 2])) {
      const char code = absl::HexStringToBytes(part.substr(i + 1, 2))[0];
      if (absl::ascii_isalnum(code) || absl::StrContains("-._~", absl::string_view(&code, 1))) {
        byte = code;
        i += 2;
      }
    }
    decoded += byte;
  }
  return decoded == "." || decoded == ".." ? part : decoded;
}

// What a path under /v2 says.
struct Target {
  const char* name = nullptr;  // the call, as in gRPC; null = there is no such path
  const char* method = "GET";
  std::string model, version;
};

Target ParsePath(absl::string_view path) {
  std::vector<std::string> parts = absl::StrSplit(path, '/', absl::SkipEmpty());
  parts.erase(parts.begin());  // v2
  const auto is = [&](std::initializer_list<absl::string_view> want) {
    return std::equal(parts.begin(), parts.end(), want.begin(), want.end());
  };
  if (parts.empty()) return {"ServerMetadata"};
  if (is({"health", "live"})) return {"ServerLive"};
  if (is({"health", "ready"})) return {"ServerReady"};
  if (is({"models", "stats"})) return {"ModelStatistics"};
  if (is({"repository", "index"})) return {"RepositoryIndex", "POST"};
  Target target;
  if (parts[0] != "models" || parts.size() < 2) return target;
  target.model = DecodePart(parts[1]);
  size_t at = 2;
  if (parts.size() >= 4 && parts[2] == "versions") {
    target.version = DecodePart(parts[3]);
    at = 4;
  }
  if (parts.size() == at) {
    target.name = "ModelMetadata";
  } else if (parts.size() == at + 1) {
    const std::string& what = parts[at];
    target.name = what == "ready"    ? "ModelReady"
                  : what == "config" ? "ModelConfig"
                  : what == "stats"  ? "ModelStatistics"
                  : what == "infer"  ? "ModelInfer"
                                     : nullptr;
    if (what == "infer") target.method = "POST";
  }
  return target;
}

// 200 or 503: some health checks read the status, some "ready" in `body`, to which it is added.
Response Readiness(bool ready, const char* what, json body = json::object()) {
  body["ready"] = ready;
  if (!ready) body["error"] = absl::StrCat(what, " is not ready");
  Response response = JsonResponse(body.dump(-1, ' ', false, json::error_handler_t::replace));
  response.status = ready ? 200 : 503;
  return response;
}

absl::StatusOr<std::optional<uint64_t>> JsonBytes(const Request& request) {
  const auto found = request.headers.find(kJsonBytes);
  if (found == request.headers.end()) return std::nullopt;
  uint64_t bytes = 0;
  if (!absl::SimpleAtoi(found->second, &bytes)) {
    return absl::InvalidArgumentError(absl::StrCat(
        "Inference-Header-Content-Length: got '", found->second.substr(0, 32), "', want a number"));
  }
  return bytes;
}

absl::StatusOr<Response> InferResponse(const absl::StatusOr<inference::ModelInferResponse>& answer,
                                       const std::vector<bool>& binary) {
  TERN_RETURN_IF_ERROR(answer.status());
  TERN_ASSIGN_OR_RETURN(InferAnswer formatted, FormatInferAnswer(*answer, binary));
  Response response = JsonResponse(std::move(formatted.body));
  if (formatted.json_bytes.has_value()) {
    response.content_type = "application/octet-stream";
    response.headers.emplace_back("Inference-Header-Content-Length",
                                  absl::StrCat(*formatted.json_bytes));
  }
  return response;
}

void Infer(const oip::Inference& inference, const Target& target, Request request,
           std::string caller, std::shared_ptr<Call> call) {
  const absl::StatusOr<std::optional<uint64_t>> json_bytes = JsonBytes(request);
  if (!json_bytes.ok()) return call->Finish(json_bytes.status());
  absl::StatusOr<InferBody> body = ParseInferBody(request.body, *json_bytes);
  if (!body.ok()) return call->Finish(body.status());
  std::string().swap(request.body);
  body->request.set_model_name(target.model);
  body->request.set_model_version(target.version);
  inference.ModelInfer(
      body->request, {Clock::Real()->Now() + kInferDeadline, nullptr, std::move(caller)},
      [call, binary = std::move(body->binary),
       post = std::move(request.post)](absl::StatusOr<inference::ModelInferResponse> answer) {
        // Here the other images of the batch would wait for the JSON of this one.
        post([call, binary, answer = std::move(answer)] {
          absl::StatusOr<Response> response = InferResponse(answer, binary);
          if (!response.ok()) return call->Finish(response.status());
          call->Finish(*std::move(response));
        });
      });
}

}  // namespace

Routes::Routes(const oip::Inference* inference, metrics::Metrics* metrics, Authorize authorize)
    : inference_(inference), metrics_(metrics), authorize_(std::move(authorize)) {
  AddPage("/metrics", [metrics](const Request&) {
    Response response;
    response.content_type = kMetricsText;
    response.body = metrics->Render();
    return response;
  });
}

void Routes::AddPage(std::string path, Page page) { pages_[std::move(path)] = std::move(page); }

const Routes::Page* Routes::FindPage(const std::string& path) const {
  const auto exact = pages_.find(path);
  if (exact != pages_.end()) return &exact->second;
  for (const auto& [pattern, page] : pages_) {
    absl::string_view prefix = pattern;
    if (absl::ConsumeSuffix(&prefix, "*") && absl::StartsWith(path, prefix)) return &page;
  }
  return nullptr;
}

void Routes::Refused(int status) const {
  const absl::StatusCode code = status == 400   ? absl::StatusCode::kInvalidArgument
                                : status == 501 ? absl::StatusCode::kUnimplemented
                                : status == 503 ? absl::StatusCode::kUnavailable
                                                : absl::StatusCode::kResourceExhausted;
  metrics_->Request("http", absl::StatusCodeToString(code), absl::ZeroDuration());
}

void Routes::Handle(Request request, Respond respond) const {
  const Page* page = FindPage(request.path);
  const bool v2 = request.path == "/v2" || absl::StartsWith(request.path, "/v2/");
  const Target target = v2 ? ParsePath(request.path) : Target();
  if (page == nullptr && target.name == nullptr) {
    return respond(
        ErrorResponse(404, absl::StrCat("there is no path ", request.path.substr(0, 256))));
  }
  const char* method = page != nullptr ? "GET" : target.method;
  if (request.method != method) {
    Response response = ErrorResponse(
        405, absl::StrCat("method: got ", request.method.substr(0, 32), ", want ", method));
    response.headers.emplace_back("Allow", method);
    return respond(std::move(response));
  }
  Response go_on;
  go_on.status = 100;
  if (page != nullptr) return respond(request.waits ? std::move(go_on) : (*page)(request));
  const auto encoding = request.headers.find("content-encoding");
  if (encoding != request.headers.end() && !encoding->second.empty() &&
      !absl::EqualsIgnoreCase(encoding->second, "identity")) {
    return respond(ErrorResponse(
        415,
        absl::StrCat("Content-Encoding: got '", encoding->second.substr(0, 32), "', want none")));
  }
  const auto begin = [&] { return std::make_shared<Call>(metrics_, target.name, respond); };
  const absl::string_view name = target.name;
  const bool health = name == "ServerLive" || name == "ServerReady" || name == "ModelReady";
  std::string caller;
  if (authorize_ && !health) {
    const auto header = request.headers.find("authorization");
    absl::StatusOr<std::string> allowed =
        authorize_(absl::StrCat("/inference.GRPCInferenceService/", name),
                   header == request.headers.end() ? nullptr : &header->second);
    if (!allowed.ok()) return begin()->Finish(allowed.status());
    caller = *std::move(allowed);
  }
  if (request.waits) return respond(std::move(go_on));
  const std::shared_ptr<Call> call = begin();
  if (name == "ModelInfer") {
    if (caller.empty()) caller = ClientOf(request);
    return Infer(*inference_, target, std::move(request), std::move(caller), call);
  }
  if (name == "ServerLive") return call->Finish(JsonResponse(json({{"live", true}}).dump()));
  if (name == "ServerReady")
    return call->Finish(Readiness(inference_->ServerReady(), "the server"));
  if (name == "ServerMetadata")
    return call->Finish(JsonResponse(MessageToJson(inference_->ServerMetadata())));
  if (name == "ModelMetadata")
    return call->Finish(inference_->ModelMetadata(target.model, target.version));
  if (name == "ModelConfig")
    return call->Finish(inference_->ModelConfig(target.model, target.version));
  if (name == "ModelStatistics")
    return call->Finish(inference_->ModelStatistics(target.model, target.version));
  if (name == "RepositoryIndex") {
    const absl::StatusOr<bool> only_ready = ParseIndexBody(request.body);
    if (!only_ready.ok()) return call->Finish(only_ready.status());
    return call->Finish(JsonResponse(IndexToJson(inference_->RepositoryIndex(*only_ready))));
  }
  const absl::StatusOr<bool> ready = inference_->ModelReady(target.model, target.version);
  if (!ready.ok()) return call->Finish(ready.status());
  if (!*ready) {
    const absl::Status found = inference_->ModelMetadata(target.model, target.version).status();
    // Its message names the models there are, which nobody may know who asks for health only.
    if (absl::IsNotFound(found)) {
      return call->Finish(absl::NotFoundError(
          absl::StrCat("there is no model '", target.model, "'",
                       target.version.empty() ? "" : " of version ", target.version)));
    }
  }
  call->Finish(Readiness(*ready, "the model", {{"name", target.model}}));
}

}  // namespace tern::http
