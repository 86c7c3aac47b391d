// The Open Inference Protocol over HTTP. The model answers 10 x mean red, green and blue of an 8x8
// image (tiny_model.h); what the calls mean is tested in tests/oip.
#include "server/http/routes.h"

#include <cstring>
#include <future>
#include <memory>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/strings/escaping.h"
#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "gmock/gmock.h"
#include "nlohmann/json.hpp"
#include "server/base/retry_after.h"
#include "tests/serving/server_fixture.h"

namespace tern::http {
namespace {

using nlohmann::json;
using ::testing::HasSubstr;

constexpr char kInfer[] = "/v2/models/tiny/infer";

class RoutesTest : public tern::testing::PipelineTest {
 protected:
  void SetUp() override {
    PipelineTest::SetUp();
    inference_ = std::make_unique<oip::Inference>(repository_.get(), classifier_.get(), "1.2.3");
    routes_ = std::make_unique<Routes>(inference_.get(), &metrics_);
  }
  Response Ask(const std::string& method, const std::string& path, const std::string& body = "",
               std::map<std::string, std::string> headers = {}) {
    std::promise<Response> promise;
    routes_->Handle({method, path, std::move(headers), body},
                    [&](Response response) { promise.set_value(std::move(response)); });
    return promise.get_future().get();
  }
  json Get(const std::string& path) {
    const Response response = Ask("GET", path);
    EXPECT_EQ(response.status, 200) << path << ": " << response.body;
    return json::parse(response.body, nullptr, false);
  }
  // The answer to an inference; fails the test if it is not one.
  json Infer(const json& body) {
    const Response response = Ask("POST", kInfer, body.dump());
    EXPECT_EQ(response.status, 200) << response.body;
    return json::parse(response.body, nullptr, false);
  }
  void ExpectRefused(const std::string& body, const std::string& words,
                     std::map<std::string, std::string> headers = {}) {
    const Response response = Ask("POST", kInfer, body, std::move(headers));
    EXPECT_EQ(response.status, 400) << response.body;
    const json answer = json::parse(response.body, nullptr, false);
    ASSERT_TRUE(answer.is_object()) << response.body;
    EXPECT_THAT(answer["error"].get<std::string>(), HasSubstr(words));
  }
  static json Input(const std::string& datatype, std::vector<int> shape, json data) {
    return {{"name", "image"}, {"datatype", datatype}, {"shape", shape}, {"data", std::move(data)}};
  }
  static void ExpectLogits(const json& answer, std::vector<double> want) {
    const json& output = answer["outputs"][0];
    EXPECT_EQ(output["name"], "logits");
    EXPECT_EQ(output["datatype"], "FP32");
    ASSERT_EQ(output["data"].size(), want.size()) << answer;
    for (size_t i = 0; i < want.size(); ++i)
      EXPECT_NEAR(output["data"][i].get<double>(), want[i], 1e-4);
  }

  std::unique_ptr<oip::Inference> inference_;
  std::unique_ptr<Routes> routes_;
};

TEST_F(RoutesTest, JsonTensorsAndImagesGetTheScores) {
  const json logits = json::array({{{"name", "logits"}}});
  json flat = json::array(), nested = json::array();
  for (double colour : {1.0, 0.2, 0.0}) {
    json plane = json::array();
    for (int y = 0; y < 8; ++y) {
      json row = json::array();
      for (int x = 0; x < 8; ++x) row.push_back(colour), flat.push_back(colour);
      plane.push_back(row);
    }
    nested.push_back(plane);
  }
  json pixels = json::array();
  for (int i = 0; i < 64; ++i)
    for (int colour : {255, 51, 0}) pixels.push_back(colour);
  const std::string base64 = absl::Base64Escape(tern::testing::SolidBmp(8, 8, 255, 51, 0));
  for (const json& input :
       {Input("FP32", {3, 8, 8}, flat), Input("FP32", {1, 3, 8, 8}, json::array({nested})),
        Input("UINT8", {8, 8, 3}, pixels), Input("BYTES", {1}, json::array({base64})),
        Input("BYTES", {1, 1}, json::array({{{"b64", base64}}}))}) {
    ExpectLogits(Infer({{"inputs", json::array({input})}, {"outputs", logits}}), {10, 2, 0});
  }
  const json answer =
      Infer({{"id", "mine"}, {"inputs", json::array({Input("FP32", {3, 8, 8}, flat)})}});
  EXPECT_EQ(answer["id"], "mine");
  EXPECT_EQ(answer["model_name"], "tiny");
  EXPECT_EQ(answer["model_version"], "1");
  EXPECT_EQ(answer["parameters"]["scheme"], "fp32");
  EXPECT_EQ(answer["outputs"][0]["name"], "probabilities");
  EXPECT_EQ(answer["outputs"][0]["shape"], json({3}));
}

TEST_F(RoutesTest, BinaryTensorsGoBothWays) {
  std::string raw;
  for (float colour : {0.5f, 0.1f, 0.3f}) {
    for (int i = 0; i < 64; ++i) raw.append(reinterpret_cast<const char*>(&colour), 4);
  }
  json body = {
      {"inputs", json::array({{{"name", "image"},
                               {"datatype", "FP32"},
                               {"shape", {1, 3, 8, 8}},
                               {"parameters", {{"binary_data_size", raw.size()}}}}})},
      {"outputs",
       json::array({{{"name", "logits"}, {"parameters", {{"binary_data", true}}}},
                    {{"name", "probabilities"}, {"parameters", {{"classification", 2}}}}})}};
  const std::string head = body.dump();
  const std::string length = absl::StrCat(head.size());
  const Response response =
      Ask("POST", kInfer, head + raw, {{"inference-header-content-length", length}});
  ASSERT_EQ(response.status, 200) << response.body;
  EXPECT_EQ(response.content_type, "application/octet-stream");
  ASSERT_EQ(response.headers.size(), 1u);
  EXPECT_EQ(response.headers[0].first, "Inference-Header-Content-Length");
  const size_t json_bytes = std::stoul(response.headers[0].second);
  const json answer = json::parse(response.body.substr(0, json_bytes));
  EXPECT_EQ(answer["outputs"][0]["parameters"]["binary_data_size"], 12);
  ASSERT_EQ(response.body.size(), json_bytes + 12);
  float logits[3];
  std::memcpy(logits, response.body.data() + json_bytes, 12);
  EXPECT_NEAR(logits[0], 5, 1e-4);
  EXPECT_NEAR(logits[1], 1, 1e-4);
  EXPECT_NEAR(logits[2], 3, 1e-4);
  EXPECT_EQ(answer["outputs"][1]["shape"], json({1, 2}));
  EXPECT_THAT(answer["outputs"][1]["data"][0].get<std::string>(), HasSubstr(":0:red"));
  EXPECT_THAT(answer["outputs"][1]["data"][1].get<std::string>(), HasSubstr(":2:blue"));

  for (const auto& [what, words] : std::vector<std::pair<std::string, std::string>>{
           {raw + "x", "1 bytes are left"}, {raw.substr(1), "767 bytes follow"}}) {
    ExpectRefused(head + what, words, {{"inference-header-content-length", length}});
  }
  ExpectRefused("{}", "the body has 2 bytes", {{"inference-header-content-length", "3"}});
  ExpectRefused("{}", "want a number", {{"inference-header-content-length", "x"}});
}

TEST_F(RoutesTest, AsksWhetherACallMayGoOnButForHealth) {
  const Routes guarded(inference_.get(), &metrics_,
                       [](absl::string_view method,
                          const std::string* authorization) -> absl::StatusOr<std::string> {
                         EXPECT_TRUE(absl::StartsWith(method, "/inference.GRPCInferenceService/"))
                             << method;
                         if (authorization == nullptr)
                           return absl::UnauthenticatedError("no token");
                         if (*authorization != "Bearer good")
                           return absl::PermissionDeniedError("another token");
                         return "token:good";
                       });
  const auto ask = [&](const std::string& method, const std::string& path,
                       std::map<std::string, std::string> headers) {
    std::promise<Response> promise;
    guarded.Handle({method, path, std::move(headers), "{}"},
                   [&](Response response) { promise.set_value(std::move(response)); });
    return promise.get_future().get();
  };
  for (const auto& [method, path] :
       std::vector<std::pair<std::string, std::string>>{{"POST", kInfer},
                                                        {"GET", "/v2"},
                                                        {"GET", "/v2/models/tiny"},
                                                        {"GET", "/v2/models/tiny/config"},
                                                        {"GET", "/v2/models/stats"},
                                                        {"POST", "/v2/repository/index"}}) {
    const Response refused = ask(method, path, {});
    EXPECT_EQ(refused.status, 401) << path;
    EXPECT_THAT(refused.headers,
                ::testing::Contains(::testing::Pair("WWW-Authenticate", "Bearer")));
    EXPECT_EQ(ask(method, path, {{"authorization", "Bearer other"}}).status, 403) << path;
    const int status = ask(method, path, {{"authorization", "Bearer good"}}).status;
    EXPECT_EQ(status, path == kInfer ? 400 : 200) << path;
  }
  for (const char* path : {"/v2/health/live", "/v2/models/tiny/ready", "/metrics"})
    EXPECT_EQ(ask("GET", path, {}).status, 200) << path;
}

TEST_F(RoutesTest, ABodyMayBeOneImage) {
  const Response response = Ask("POST", kInfer, tern::testing::SolidBmp(8, 8, 0, 255, 0),
                                {{"inference-header-content-length", "0"}});
  ASSERT_EQ(response.status, 200) << response.body;
  const json data = json::parse(response.body)["outputs"][0]["data"];
  EXPECT_GT(data[1].get<double>(), 0.99);
}

TEST_F(RoutesTest, RefusesBodiesSayingWhatIsWrong) {
  for (const auto& [body, words] : std::vector<std::pair<std::string, std::string>>{
           {"", "not a JSON object"},
           {"[1]", "not a JSON object"},
           {"{\"inputs\":3}", "inputs: got 3, want an array"},
           {"{\"inputs\":[3]}", "inputs[0]: got 3, want an object"},
           {"{\"id\":3}", "id: got 3, want a string"},
           {"{\"parameters\":[]}", "parameters: got []"},
           {"{\"parameters\":{\"a\":{}}}", "parameters.a"},
           {"{}", "inputs: got []"},
           {"{\"inputs\":[{\"name\":\"image\",\"datatype\":\"FP32\",\"data\":[]}]}",
            "shape: got nothing"},
           {"{\"inputs\":[{\"name\":\"image\",\"datatype\":\"FP32\",\"shape\":[1.5]}]}",
            "want integers"},
           {"{\"inputs\":[{\"name\":\"image\",\"datatype\":\"FP32\",\"shape\":[3,8,8]}]}",
            "neither"},
           {"{\"inputs\":[{\"name\":\"image\",\"datatype\":\"FP32\",\"shape\":[3,8,8],\"data\":[1]}"
            "]}",
            "got 1 values, want 192"},
           {"{\"inputs\":[{\"name\":\"image\",\"datatype\":\"FP32\",\"shape\":[1],\"data\":[\"x\"]}"
            "]}",
            "want a number"},
           {"{\"inputs\":[{\"name\":\"image\",\"datatype\":\"UINT8\",\"shape\":[1],\"data\":[256]}]"
            "}",
            "0 to 255"},
           {"{\"inputs\":[{\"name\":\"image\",\"datatype\":\"BYTES\",\"shape\":[1],\"data\":[\"*\"]"
            "}]}",
            "want base64"},
           {"{\"inputs\":[{\"name\":\"image\",\"datatype\":\"FP32\",\"shape\":[1],\"data\":[[[[[1]]"
            "]]]}]}",
            "more than 4 levels"},
           {"{\"inputs\":[{\"name\":\"image\",\"datatype\":\"FP32\",\"shape\":[1],\"parameters\":"
            "{\"binary_data_size\":-4}}]}",
            "binary_data_size"},
           {"{\"outputs\":[3]}", "outputs: got 3"}}) {
    ExpectRefused(body, words);
  }
  ExpectRefused("{\"id\":\"" + std::string(1, '\xff') + "\"}", "not a JSON object");
  // Deep nesting costs no stack.
  ExpectRefused(std::string(1 << 20, '['), "levels of JSON");
  const std::string deep = std::string(1 << 20, '[') + std::string(1 << 20, ']');
  for (const char* field : {"id", "inputs", "outputs", "parameters"})
    ExpectRefused(absl::StrCat("{\"", field, "\":", deep, "}"), "levels of JSON");
}

TEST_F(RoutesTest, InputsAndOutputsInSharedMemoryAreNotImplemented) {
  const char* const input =
      R"({"inputs":[{"name":"image","datatype":"FP32","shape":[3,8,8],"parameters":{"shared_memory_region":"r","shared_memory_byte_size":768}}]})";
  const char* const output =
      R"({"inputs":[{"name":"image","datatype":"BYTES","shape":[1],"data":["aGVsbG8="]}],"outputs":[{"name":"logits","parameters":{"shared_memory_region":"r"}}]})";
  for (const char* body : {input, output}) {
    const Response answer = Ask("POST", kInfer, body);
    EXPECT_EQ(answer.status, 501) << answer.body;
    EXPECT_THAT(answer.body, HasSubstr("shared memory is not supported"));
  }
}

TEST_F(RoutesTest, PathsAnswerWithTheirStatus) {
  EXPECT_EQ(Get("/v2")["version"], "1.2.3");
  EXPECT_EQ(Get("/v2/models/tiny")["inputs"][0]["shape"], json({-1, 3, 8, 8}));
  EXPECT_EQ(Get("/v2/models/tiny/versions/1")["versions"], json({"1"}));
  EXPECT_EQ(Get("/v2/models/tiny/config")["input"][0]["format"], "FORMAT_NCHW");
  EXPECT_EQ(Get("/v2/models/tiny/stats")["model_stats"][0]["inference_stats"]["fail"]["count"], 0);
  EXPECT_EQ(Get("/v2/models/stats")["model_stats"][0]["name"], "tiny");
  const Response index = Ask("POST", "/v2/repository/index", "{\"ready\":true}");
  EXPECT_EQ(json::parse(index.body)[0]["state"], "READY");
  EXPECT_EQ(Ask("POST", "/v2/repository/index").status, 200);
  EXPECT_EQ(Ask("POST", "/v2/repository/index", "{\"ready\":1}").status, 400);

  for (const char* path :
       {"/", "/v3", "/v2x", "/v2/models", "/v2/models/tiny/what", "/v2/models/tiny/versions",
        "/v2/models/tiny/infer/more", "/v2/repository/models/tiny/load"}) {
    EXPECT_EQ(Ask("GET", path).status, 404) << path;
  }
  EXPECT_EQ(Ask("GET", "/v2/models/none").status, 404);
  EXPECT_EQ(Ask("GET", "/v2/models/tiny/versions/2/config").status, 404);
  EXPECT_EQ(Ask("GET", "/v2/models/tiny/versions/x").status, 400);
  EXPECT_EQ(Ask("GET", "/v2/models/none/ready").status, 404);
  EXPECT_EQ(Ask("GET", "/v2/models/tiny/versions/2/ready").status, 404);
  EXPECT_EQ(Ask("POST", "/v2/models/none/infer", "{}").status, 404);
  EXPECT_EQ(Ask("GET", kInfer).status, 405);
  EXPECT_EQ(Ask("POST", "/metrics").status, 405);
  EXPECT_EQ(Ask("POST", kInfer, "{}", {{"content-encoding", "gzip"}}).status, 415);
  for (const char* encoding : {"", "identity", "Identity"})
    EXPECT_EQ(Ask("POST", kInfer, "{}", {{"content-encoding", encoding}}).status, 400);
  ASSERT_TRUE(repository_->UnloadAll("tiny").ok());
  EXPECT_EQ(Ask("POST", kInfer, "{}").status, 503);
  EXPECT_EQ(Ask("GET", "/v2/models/tiny/ready").status, 503);
}

TEST_F(RoutesTest, NamesOfModelsMayBeEncodedButNoPathComesOfIt) {
  EXPECT_EQ(Get("/v2/models/%74%69ny")["name"], "tiny");
  EXPECT_EQ(Get("/v2/models/t%69ny/versions/%31/ready")["name"], "tiny");
  for (const char* name : {"%2574iny", "tiny%00", "tiny%2Fready", "tiny%2fready", "%2e%2e", ".%2E",
                           "%2e", "tiny%", "tiny%7", "tiny%7g", "..", "%2e%2e%2ftiny"}) {
    const std::string path = absl::StrCat("/v2/models/", name);
    EXPECT_EQ(Ask("GET", path).status, 404) << path;
    EXPECT_EQ(Ask("GET", path + "/ready").status, 404) << path;
  }
}

TEST_F(RoutesTest, ABodyIsAskedForUnlessItIsRefused) {
  const auto ask = [&](const std::string& method, const std::string& path,
                       std::map<std::string, std::string> headers) {
    Request request{method, path, std::move(headers)};
    request.waits = true;
    std::promise<Response> promise;
    routes_->Handle(std::move(request),
                    [&](Response response) { promise.set_value(std::move(response)); });
    return promise.get_future().get().status;
  };
  EXPECT_EQ(ask("POST", kInfer, {}), 100);
  EXPECT_EQ(ask("GET", "/metrics", {}), 100);
  EXPECT_EQ(ask("POST", "/v3", {}), 404);
  EXPECT_EQ(ask("PUT", kInfer, {}), 405);
  EXPECT_EQ(ask("POST", kInfer, {{"content-encoding", "gzip"}}), 415);
  routes_ = std::make_unique<Routes>(
      inference_.get(), &metrics_,
      [](absl::string_view, const std::string* authorization) -> absl::StatusOr<std::string> {
        if (authorization == nullptr) return absl::UnauthenticatedError("no token");
        return *authorization;
      });
  EXPECT_EQ(ask("POST", kInfer, {}), 401);
  EXPECT_EQ(ask("POST", kInfer, {{"authorization", "Bearer t"}}), 100);
}

TEST_F(RoutesTest, HealthIsInTheStatusAndInTheBody) {
  EXPECT_EQ(Get("/v2/health/live"), json({{"live", true}}));
  EXPECT_EQ(Get("/v2/health/ready"), json({{"ready", true}}));
  const json ready = {{"name", "tiny"}, {"ready", true}};
  EXPECT_EQ(Get("/v2/models/tiny/ready"), ready);
  EXPECT_EQ(Get("/v2/models/tiny/versions/1/ready"), ready);

  inference_->SetDraining();
  for (const auto& [path, want] : std::vector<std::pair<std::string, json>>{
           {"/v2/health/ready", {{"ready", false}, {"error", "the server is not ready"}}},
           {"/v2/models/tiny/ready",
            {{"name", "tiny"}, {"ready", false}, {"error", "the model is not ready"}}}}) {
    const Response response = Ask("GET", path);
    EXPECT_EQ(response.status, 503) << path;
    EXPECT_EQ(json::parse(response.body), want) << path;
  }
  EXPECT_EQ(Ask("GET", "/v2/models/none/versions/7/ready").status, 404);
  const Response unknown = Ask("GET", "/v2/models/\xff/ready");
  EXPECT_EQ(unknown.status, 404);
  // Without a token: the models that there are stay untold.
  EXPECT_EQ(json::parse(unknown.body)["error"], "there is no model '\xef\xbf\xbd'");
  EXPECT_EQ(Get("/v2/health/live"), json({{"live", true}}));
}

TEST_F(RoutesTest, OnlyWhatHelpsToTryAgainIsToldToTryAgain) {
  const std::map<std::string, std::string> one_image = {{"inference-header-content-length", "0"}};
  for (const std::string& image :
       {std::string(100001, 'x'), tern::testing::SolidBmp(101, 100, 0, 0, 0)}) {
    const Response too_large = Ask("POST", kInfer, image, one_image);
    EXPECT_EQ(too_large.status, 413) << too_large.body;
    EXPECT_THAT(too_large.headers, ::testing::IsEmpty());
  }
  ExpectRefused(json({{"inputs", json::array({Input("BYTES", {65}, json::array())})}}).dump(),
                "65 images, the limit is 64");
  const Routes full(inference_.get(), &metrics_, [](absl::string_view, const std::string*) {
    return RetryAfter(absl::ResourceExhaustedError("full"), absl::Milliseconds(1500));
  });
  std::promise<Response> promise;
  full.Handle({"POST", kInfer}, [&](Response response) { promise.set_value(std::move(response)); });
  const Response wait = promise.get_future().get();
  EXPECT_EQ(wait.status, 429);
  EXPECT_THAT(wait.headers, ::testing::ElementsAre(::testing::Pair("Retry-After", "2")));
}

TEST_F(RoutesTest, MessagesAreCut) {
  const Routes routes(inference_.get(), &metrics_, [](absl::string_view, const std::string*) {
    return absl::PermissionDeniedError(std::string(1 << 20, 'x'));
  });
  std::promise<Response> promise;
  routes.Handle({"GET", "/v2"}, [&](Response response) { promise.set_value(std::move(response)); });
  const Response response = promise.get_future().get();
  EXPECT_EQ(response.status, 403);
  EXPECT_LT(response.body.size(), 1100u);
}

TEST_F(RoutesTest, AnAnswerIsMadeWhereItIsPosted) {
  std::promise<std::function<void()>> posted;
  std::promise<Response> promise;
  std::future<Response> answer = promise.get_future();
  Request request{"POST",
                  kInfer,
                  {{"inference-header-content-length", "0"}},
                  tern::testing::SolidBmp(8, 8, 0, 255, 0)};
  request.post = [&](std::function<void()> work) { posted.set_value(std::move(work)); };
  routes_->Handle(std::move(request),
                  [&](Response response) { promise.set_value(std::move(response)); });
  const std::function<void()> work = posted.get_future().get();
  EXPECT_EQ(answer.wait_for(std::chrono::seconds(0)), std::future_status::timeout);
  work();
  EXPECT_EQ(answer.get().status, 200);
}

TEST_F(RoutesTest, MetricsAreServedAndCountTheCalls) {
  Get("/v2/health/live");
  Ask("POST", kInfer, "{}");
  routes_->Refused(413);
  const Response metrics = Ask("GET", "/metrics");
  EXPECT_THAT(metrics.content_type, HasSubstr("text/plain; version=0.0.4"));
  EXPECT_THAT(metrics.body,
              HasSubstr("tern_requests_total{code=\"OK\",method=\"http.ServerLive\"} 1"));
  EXPECT_THAT(
      metrics.body,
      HasSubstr("tern_requests_total{code=\"INVALID_ARGUMENT\",method=\"http.ModelInfer\"} 1"));
  EXPECT_THAT(metrics.body,
              HasSubstr("tern_requests_total{code=\"RESOURCE_EXHAUSTED\",method=\"http\"} 1"));
  EXPECT_THAT(metrics.body, HasSubstr("tern_inflight_requests{method=\"http.ModelInfer\"} 0"));
}

TEST_F(RoutesTest, PagesCanBeAdded) {
  const auto page_of = [](std::string text) {
    return [text](const Request& request) {
      Response response;
      response.content_type = "text/plain";
      response.body = text + " " + request.path;
      return response;
    };
  };
  routes_->AddPage("/help/*", page_of("all below"));
  routes_->AddPage("/help/me", page_of("one"));
  const Response page = Ask("GET", "/help/me");
  EXPECT_EQ(page.status, 200);
  EXPECT_EQ(page.content_type, "text/plain");
  EXPECT_EQ(page.body, "one /help/me");
  EXPECT_EQ(Ask("GET", "/help/").body, "all below /help/");
  EXPECT_EQ(Ask("GET", "/help/me/now").body, "all below /help/me/now");
  EXPECT_EQ(Ask("GET", "/help").status, 404);
  EXPECT_EQ(Ask("POST", "/help/me").status, 405);
}

}  // namespace
}  // namespace tern::http
