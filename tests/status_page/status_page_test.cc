// The status page's paths: what they answer, and what they must not say. The page in a browser is
// browser_test.py's.
#include "server/status_page/status_page.h"

#include <fstream>
#include <future>
#include <regex>
#include <set>

#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/strip.h"
#include "gmock/gmock.h"
#include "nlohmann/json.hpp"
#include "server/oip/inference.h"
#include "server/status_page/files.h"
#include "tests/http/client.h"
#include "tests/repository/tiny_models.h"
#include "tests/serving/server_fixture.h"

namespace tern::status_page {
namespace {

using http::Response;
using nlohmann::json;
using ::testing::HasSubstr;
using ::testing::Not;

// Of the files together; the page should open at once on a phone far away.
constexpr size_t kMostBytes = 60'000;

class StatusPageTest : public tern::testing::PipelineTest {
 protected:
  void SetUp() override {
    PipelineTest::SetUp();
    inference_ = std::make_unique<oip::Inference>(repository_.get(), classifier_.get(), "1.2.3");
    routes_ = std::make_unique<http::Routes>(
        inference_.get(), &metrics_, [](absl::string_view, const std::string*) -> absl::Status {
          return absl::UnauthenticatedError("no token");
        });
    Options options;
    options.server_version = "1.2.3";
    options.start_time = absl::FromUnixMillis(1500);
    options.max_image_bytes = 100000;
    options.max_pixels = 10000;
    AddStatusPage(repository_.get(), &metrics_, options, routes_.get());
  }
  Response Ask(const std::string& path, std::map<std::string, std::string> headers = {},
               const std::string& method = "GET") {
    std::promise<Response> promise;
    routes_->Handle({method, path, std::move(headers), ""},
                    [&](Response response) { promise.set_value(std::move(response)); });
    return promise.get_future().get();
  }
  json Get(const std::string& path) {
    const Response response = Ask(path);
    EXPECT_EQ(response.status, 200) << path << ": " << response.body;
    EXPECT_EQ(response.content_type, "application/json") << path;
    return json::parse(response.body, nullptr, false);
  }
  static std::string Header(const Response& response, absl::string_view name) {
    for (const auto& [header, value] : response.headers)
      if (header == name) return value;
    return "";
  }
  // As tiny version 2, with a report.
  void PublishQuantized() {
    artifact::Artifact artifact =
        repository::testing::TinyArtifact(7, WeightScheme::kTernaryCluster, /*classes=*/3);
    artifact.graph.nodes[0].name = kHostile;
    v1::QuantizationReport& report = artifact.report;
    report.mutable_recipe()->set_weights(v1::TERNARY_CLUSTER);
    report.mutable_recipe()->set_cluster_size(4);
    report.set_source_model("tiny");
    report.set_source_version(1);
    report.set_evaluation_images(200);
    report.set_bits_per_weight(2.5);
    report.add_warnings("few images");
    report.mutable_top1()->set_value(0.75);
    report.mutable_top1()->set_low(0.7);
    report.mutable_top1()->set_high(0.8);
    report.mutable_top1()->set_total(200);
    v1::LayerReport* layer = report.add_layers();
    layer->set_name(kHostile);
    layer->set_cluster_size(4);
    layer->set_bits_per_weight(2.2);
    layer->set_weights(216);
    layer->set_output_sqnr_db(std::numeric_limits<double>::infinity());
    const auto info = repository_->Publish("tiny", artifact, false);
    ASSERT_TRUE(info.ok()) << info.status();
  }

  static constexpr char kHostile[] = "</script><img src=x onerror=alert(1)>\"'&";
  std::unique_ptr<oip::Inference> inference_;
  std::unique_ptr<http::Routes> routes_;
};

TEST_F(StatusPageTest, FilesHaveTheirTypesAndAStrictPolicy) {
  size_t bytes = 0;
  for (const File& file : Files()) {
    const std::string path = absl::StrCat("/status/", file.name);
    const Response response = Ask(path);
    EXPECT_EQ(response.status, 200) << path;
    EXPECT_EQ(response.body, file.content) << path;
    bytes += response.body.size();
    const std::string& type = response.content_type;
    const std::string want = file.name.empty()                   ? "text/html; charset=utf-8"
                             : absl::EndsWith(file.name, ".js")  ? "text/javascript; charset=utf-8"
                             : absl::EndsWith(file.name, ".css") ? "text/css; charset=utf-8"
                                                                 : "image/svg+xml";
    EXPECT_EQ(type, want) << path;
    const std::string policy = Header(response, "Content-Security-Policy");
    EXPECT_THAT(policy, HasSubstr("default-src 'none'; script-src 'self'; style-src 'self'"));
    EXPECT_THAT(policy, HasSubstr("frame-ancestors 'none'"));
    EXPECT_THAT(policy, Not(HasSubstr("unsafe")));
    EXPECT_EQ(Header(response, "X-Content-Type-Options"), "nosniff");
    EXPECT_EQ(Header(response, "Cache-Control"), "no-cache");
    EXPECT_THAT(Header(response, "ETag"), ::testing::MatchesRegex("\"[0-9a-f]{32}\""));
  }
  EXPECT_LT(bytes, kMostBytes);
}

TEST_F(StatusPageTest, FilesLoadNothingFromOutsideAndMakeNoMarkupOfText) {
  for (const File& file : Files()) {
    const std::string text(file.content);
    for (const char* way : {"innerHTML", "outerHTML", "insertAdjacentHTML", "document.write",
                            "eval(", "new Function", "javascript:", " style=", "<style",
                            "localStorage", "sessionStorage", "document.cookie", "@import"}) {
      EXPECT_THAT(text, Not(HasSubstr(way))) << file.name;
    }
    // Handlers in attributes, and scripts between tags.
    EXPECT_FALSE(std::regex_search(text, std::regex("<[^>]* on[a-z]+="))) << file.name;
    EXPECT_FALSE(std::regex_search(text, std::regex("<script[^>]*>[^<]"))) << file.name;
    // The one address is the name of SVG's elements.
    std::string rest = text;
    const std::string svg = "http://www.w3.org/2000/svg";
    for (size_t at; (at = rest.find(svg)) != std::string::npos;) rest.erase(at, svg.size());
    EXPECT_FALSE(std::regex_search(rest, std::regex("(https?:)?//[a-z]"))) << file.name;
  }
}

TEST_F(StatusPageTest, LeadsToThePage) {
  for (const char* path : {"/", "/status"}) {
    const Response response = Ask(path);
    EXPECT_EQ(response.status, 307) << path;
    EXPECT_EQ(Header(response, "Location"), "status/") << path;
  }
}

TEST_F(StatusPageTest, OtherPathsAndMethodsAreRefused) {
  for (const char* path :
       {"/status/index.html", "/status/app.js/", "/status/../metrics", "/status/models/",
        "/status/models/tiny", "/status/models/tiny/versions", "/status/models/tiny/versions/",
        "/status/models/tiny/versions/9", "/status/models/tiny/versions/0",
        "/status/models/tiny/versions/1/x", "/status/models/tiny/versions/one",
        "/status/models/none/versions/1", "/status/models/tiny/labels/1", "/statusx"}) {
    EXPECT_EQ(Ask(path).status, 404) << path;
  }
  for (const char* path : {"/status/", "/status/app.js", "/status/models", "/status/metrics"}) {
    EXPECT_EQ(Ask(path, {}, "POST").status, 405) << path;
  }
}

TEST_F(StatusPageTest, WhatTheBrowserKnowsIsNotSentAgain) {
  for (const char* path : {"/status/", "/status/style.css", "/status/server", "/status/models",
                           "/status/models/tiny/versions/1"}) {
    const std::string tag = Header(Ask(path), "ETag");
    for (const std::string& known : {tag, "W/" + tag, "\"other\", " + tag, std::string("*")}) {
      const Response again = Ask(path, {{"if-none-match", known}});
      EXPECT_EQ(again.status, 304) << path;
      EXPECT_EQ(again.body, "") << path;
      EXPECT_EQ(Header(again, "ETag"), tag) << path;
    }
    EXPECT_EQ(Ask(path, {{"if-none-match", "\"other\""}}).status, 200) << path;
  }
  const std::string before = Header(Ask("/status/models"), "ETag");
  PublishQuantized();
  EXPECT_EQ(Ask("/status/models", {{"if-none-match", before}}).status, 200);
}

TEST_F(StatusPageTest, AnswersWithoutABodyKeepTheConnection) {
  auto server = http::Server::Start({.host = "127.0.0.1", .port = 0},
                                    [this](http::Request request, http::Respond respond) {
                                      routes_->Handle(std::move(request), std::move(respond));
                                    });
  ASSERT_TRUE(server.ok()) << server.status();
  tern::testing::Connection connection((*server)->port());
  const auto ask = [&](const std::string& head) {
    EXPECT_TRUE(connection.Send(head + "Host: x\r\n\r\n"));
  };
  ask("GET /status/app.js HTTP/1.1\r\n");
  const tern::testing::Answer whole(connection.ReadOne());
  EXPECT_EQ(whole.status, 200);
  EXPECT_EQ(whole.Header("Content-Length"), absl::StrCat(whole.body.size()));
  ask("GET /status/app.js HTTP/1.1\r\nIf-None-Match: " + whole.Header("ETag") + "\r\n");
  const tern::testing::Answer unchanged(connection.ReadOne());
  EXPECT_EQ(unchanged.status, 304);
  EXPECT_EQ(unchanged.Header("Content-Length"), "");
  EXPECT_EQ(unchanged.Header("ETag"), whole.Header("ETag"));
  ask("HEAD /status/app.js HTTP/1.1\r\nConnection: close\r\n");
  const tern::testing::Answer head(connection.ReadAll());
  EXPECT_EQ(head.status, 200);
  EXPECT_EQ(head.Header("Content-Length"), absl::StrCat(whole.body.size()));
  EXPECT_EQ(head.body, "");
}

TEST_F(StatusPageTest, SaysWhatTheServerIs) {
  EXPECT_EQ(Get("/status/server"), json({{"version", "1.2.3"},
                                         {"start_time", 1.5},
                                         {"max_image_bytes", 100000},
                                         {"max_pixels", 10000}}));
}

TEST_F(StatusPageTest, ListsVersionsAndTheirReports) {
  PublishQuantized();
  const json versions = Get("/status/models")["versions"];
  ASSERT_EQ(versions.size(), 2u);
  EXPECT_EQ(versions[0]["model"], "tiny");
  EXPECT_EQ(versions[0]["version"], 1);
  EXPECT_EQ(versions[0]["default"], true);
  EXPECT_EQ(versions[0]["state"], "ready");
  EXPECT_EQ(versions[0]["scheme"], "fp32");
  EXPECT_EQ(versions[0]["classes"], 3);
  EXPECT_EQ(versions[0]["input_shape"], json({3, 8, 8}));
  EXPECT_EQ(versions[0]["bits_per_weight"], 32);
  EXPECT_GT(versions[0]["bytes"], 100);
  EXPECT_FALSE(versions[0].contains("report"));
  EXPECT_EQ(versions[1]["version"], 2);
  EXPECT_EQ(versions[1]["default"], false);
  EXPECT_EQ(versions[1]["scheme"], "ternary-cluster");
  EXPECT_EQ(versions[1]["cluster_size"], 4);
  const json& report = versions[1]["report"];
  EXPECT_EQ(report["source_model"], "tiny");
  EXPECT_EQ(report["top1"], json({{"value", 0.75}, {"low", 0.7}, {"high", 0.8}, {"images", 200}}));
  EXPECT_FALSE(report.contains("agreement")) << "not measured";
  EXPECT_EQ(report["warnings"], json({"few images"}));

  ASSERT_TRUE(repository_->Unload("tiny", 2).ok());
  const json unloaded = Get("/status/models")["versions"][1];
  EXPECT_EQ(unloaded["state"], "unloaded");
  EXPECT_FALSE(unloaded.contains("report"));
  EXPECT_EQ(Ask("/status/models/tiny/versions/2").status, 404);
}

TEST_F(StatusPageTest, ListsTheLayersThatRun) {
  PublishQuantized();
  const json layers = Get("/status/models/tiny/versions/2");
  EXPECT_EQ(layers["model"], "tiny");
  EXPECT_EQ(layers["version"], 2);
  ASSERT_EQ(layers["layers"].size(), 4u);
  const json& conv = layers["layers"][0];
  EXPECT_EQ(conv["name"], kHostile) << "a name is text, and JSON keeps it";
  EXPECT_EQ(conv["kind"], "Conv");
  EXPECT_EQ(conv["cluster_size"], 4);
  EXPECT_EQ(conv["bits_per_weight"], 2.2);
  EXPECT_EQ(conv["weights"], 216);
  EXPECT_EQ(conv["macs"], 8 * 8 * 8 * 3 * 9);
  EXPECT_EQ(conv["sqnr_db"], nullptr) << "JSON has no infinity";
  EXPECT_FALSE(conv["implementation"].get<std::string>().empty());
  const json& last = layers["layers"][3];
  EXPECT_EQ(last["name"], "last");
  EXPECT_EQ(last["scheme"], "int8");
  EXPECT_FALSE(last.contains("bits_per_weight")) << "the report has no such layer";
  EXPECT_FALSE(Get("/status/models/tiny/versions/1")["layers"].empty());
}

TEST_F(StatusPageTest, NoModelsAreAnEmptyList) {
  ASSERT_TRUE(repository_->Delete("tiny", 0).ok());
  EXPECT_EQ(Get("/status/models"), json({{"versions", json::array()}}));
}

TEST_F(StatusPageTest, TellsNoPathsReasonsOrLabels) {
  PublishQuantized();
  ASSERT_TRUE(repository_->Unload("tiny", 2).ok());
  std::ofstream(root_ + "/tiny/2/model.tern") << "damaged";
  ASSERT_FALSE(repository_->Load("tiny", 2).ok());
  const auto info = repository_->Info("tiny", 2);
  ASSERT_TRUE(info.ok());
  ASSERT_THAT(info->reason, HasSubstr(root_)) << "else there is nothing to keep back";
  EXPECT_EQ(Get("/status/models")["versions"][1]["state"], "unavailable");
  for (const char* path : {"/status/", "/status/server", "/status/metrics", "/status/models",
                           "/status/models/tiny/versions/1", "/status/models/tiny/versions/2"}) {
    const Response response = Ask(path);
    for (const std::string& word : {root_, info->reason, std::string("green")})
      EXPECT_THAT(response.body, Not(HasSubstr(word))) << path;
  }
}

TEST_F(StatusPageTest, InferenceStillAsksForTheToken) {
  EXPECT_EQ(Ask("/v2/models/tiny/versions/1/infer", {}, "POST").status, 401);
}

TEST_F(StatusPageTest, ServesEveryMetricThatThePageReadsAndFewOthers) {
  std::set<std::string> known;
  for (const auto& [name, help] : metrics::Metrics::Catalogue()) known.insert(name);
  const metrics::ModelLabels tiny{"tiny", 1, "fp32"};
  metrics_.Request("Classify", "OK", absl::Milliseconds(3));
  metrics_.InFlight("Classify", 1);
  metrics_.Batch(tiny, 2);
  metrics_.QueueDepth(tiny, 1);
  metrics_.DecodeQueueDepth(1);
  metrics_.LayerTime(tiny, "conv", absl::Milliseconds(1));
  metrics_.Machine(2, "1.2.3", "avx2", "2.6.3");
  const Response live = Ask("/status/metrics");
  EXPECT_EQ(live.content_type, Ask("/metrics").content_type);
  EXPECT_EQ(Header(live, "Cache-Control"), "no-store");
  for (const File& file : Files()) {
    if (file.name != "app.js" && file.name != "models.js") continue;
    const std::string text(file.content);
    static const std::regex* const kName = new std::regex("'((tern|process)_[a-z0-9_]+)'");
    for (auto at = std::sregex_iterator(text.begin(), text.end(), *kName);
         at != std::sregex_iterator(); ++at) {
      absl::string_view name = absl::string_view(text).substr(at->position(1), at->length(1));
      absl::ConsumeSuffix(&name, "_sum");
      EXPECT_TRUE(known.contains(std::string(name))) << file.name << " reads " << name;
      // models.js reads /metrics, for what /status/metrics leaves out.
      const std::string line = absl::StrCat("# TYPE ", name, " ");
      if (file.name == "app.js") {
        EXPECT_THAT(live.body, HasSubstr(line));
      }
    }
  }
  EXPECT_THAT(live.body, Not(HasSubstr("tern_layer_duration_seconds")));
  EXPECT_LT(live.body.size(), Ask("/metrics").body.size());
}

}  // namespace
}  // namespace tern::status_page
