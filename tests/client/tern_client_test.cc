#include "client/tern_client.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <future>
#include <sstream>

#include "tests/client/fake_server.h"

namespace tern::client {
namespace {

class TernClientTest : public testing::Test {
 protected:
  TernClientTest() : client_(*Client::Connect(fake_.server(), fake_.admin())) {}

  static v1::ClassifyRequest Request(const std::string& image) {
    v1::ClassifyRequest request;
    request.set_model("demo");
    request.set_image(image);
    return request;
  }

  // Declared first: a call in flight needs it to the end.
  FakeServer fake_;
  std::unique_ptr<Client> client_;
};

TEST_F(TernClientTest, RejectsEmptyAddresses) {
  EXPECT_TRUE(absl::IsInvalidArgument(Client::Connect("", "a:1").status()));
  EXPECT_TRUE(absl::IsInvalidArgument(Client::Connect("a:1", "").status()));
}

TEST_F(TernClientTest, AnUnreachableServerIsUnavailableAndNamed) {
  const auto client = Client::Connect("127.0.0.1:1", "127.0.0.1:1");
  const absl::Status status = (*client)->Classify(Request("1")).status();
  EXPECT_TRUE(absl::IsUnavailable(status));
  EXPECT_THAT(status.ToString(), testing::HasSubstr("127.0.0.1:1"));
}

TEST_F(TernClientTest, StatusesKeepCodeAndMessage) {
  const absl::Status status = client_->Classify(Request("x")).status();
  EXPECT_EQ(status, absl::InvalidArgumentError("image: unknown format"));
}

TEST_F(TernClientTest, ImagesBeyondFourMebibytesPass) {
  const auto answer = client_->Classify(Request(std::string(20 << 20, '7')));
  ASSERT_TRUE(answer.ok()) << answer.status();
  EXPECT_EQ(answer->classes(0).index(), 7u);
}

TEST_F(TernClientTest, AsynchronousAnswersArriveOnce) {
  std::promise<absl::StatusOr<v1::ClassifyResponse>> promise;
  client_->ClassifyAsync(Request("4"), [&](absl::StatusOr<v1::ClassifyResponse> answer) {
    promise.set_value(std::move(answer));
  });
  const auto answer = promise.get_future().get();
  ASSERT_TRUE(answer.ok()) << answer.status();
  EXPECT_EQ(answer->classes(0).index(), 4u);
}

TEST_F(TernClientTest, StreamKeepsOrderAndBoundsWhatIsInFlight) {
  constexpr int kImages = 300;
  constexpr int kWindow = 8;
  int sent = 0;
  std::atomic<int> answered{0};
  int most = 0;
  std::vector<uint32_t> classes;
  const absl::Status status = client_->ClassifyStream(
      [&]() -> absl::StatusOr<std::optional<v1::ClassifyRequest>> {
        if (sent == kImages) return std::nullopt;
        most = std::max(most, sent + 1 - answered);
        return Request(std::to_string(sent++ % 10));
      },
      [&](const v1::ClassifyStreamResponse& response) {
        classes.push_back(response.response().classes(0).index());
        ++answered;
        return absl::OkStatus();
      },
      kWindow);
  ASSERT_TRUE(status.ok()) << status;
  ASSERT_EQ(classes.size(), static_cast<size_t>(kImages));
  for (int i = 0; i < kImages; ++i) EXPECT_EQ(classes[i], static_cast<uint32_t>(i % 10));
  // `answered` is raised after the window moves, by one call of the sink at most.
  EXPECT_LE(most, kWindow + 1);
}

TEST_F(TernClientTest, ErrorsOfSourceAndSinkEndTheStream) {
  int sent = 0;
  const auto source = [&]() -> absl::StatusOr<std::optional<v1::ClassifyRequest>> {
    if (++sent > 20) return absl::DataLossError("disk");
    return Request("1");
  };
  const auto accept = [](const v1::ClassifyStreamResponse&) { return absl::OkStatus(); };
  EXPECT_EQ(client_->ClassifyStream(source, accept), absl::DataLossError("disk"));

  const auto endless = [&]() -> absl::StatusOr<std::optional<v1::ClassifyRequest>> {
    return Request("1");
  };
  const auto refuse = [](const v1::ClassifyStreamResponse&) { return absl::AbortedError("full"); };
  EXPECT_EQ(client_->ClassifyStream(endless, refuse), absl::AbortedError("full"));
}

TEST_F(TernClientTest, ImportSendsTheFileInChunks) {
  std::string bytes;
  for (int i = 0; i < 2'500'000; ++i) bytes.push_back(static_cast<char>(i % 253));
  std::istringstream onnx(bytes);
  v1::ImportStart start;
  start.set_name("demo");
  const auto version = client_->Import(start, onnx);
  ASSERT_TRUE(version.ok()) << version.status();
  EXPECT_TRUE(fake_.seen().imported_bytes == bytes);
  EXPECT_EQ(fake_.seen().import.name(), "demo");
}

TEST_F(TernClientTest, ExportGivesNameAndBytes) {
  std::ostringstream out;
  const auto name = client_->Export("demo", 2, v1::ExportRequest::STORED, out);
  ASSERT_TRUE(name.ok()) << name.status();
  EXPECT_EQ(*name, "model.tern");
  EXPECT_TRUE(out.str() == FakeServer::ExportedBytes());
}

TEST_F(TernClientTest, AGateThatWasNotMetIsAnAnswer) {
  v1::QuantizeStart start;
  start.set_model("demo");
  start.mutable_recipe()->set_max_top1_drop(0.05);
  int left = 3;
  const SampleSource images = [&]() -> absl::StatusOr<std::optional<v1::SampleImage>> {
    if (left-- == 0) return std::nullopt;
    v1::SampleImage image;
    image.set_image("1");
    image.set_calibration(true);
    return image;
  };
  std::vector<std::string> phases;
  const auto outcome = client_->Quantize(
      start, images, [&](const v1::JobProgress& progress) { phases.push_back(progress.phase()); });
  ASSERT_TRUE(outcome.ok()) << outcome.status();
  EXPECT_FALSE(outcome->result.published());
  EXPECT_TRUE(absl::IsFailedPrecondition(outcome->gate));
  EXPECT_EQ(outcome->result.report().calibration_images(), 3u);
  EXPECT_THAT(phases, testing::ElementsAre("calibrating"));
}

TEST_F(TernClientTest, AServerThatRefusesAJobIsNotSentAllImages) {
  v1::QuantizeStart start;
  start.set_model("demo");
  start.set_source_version(2);
  // Never ends by itself.
  const SampleSource images = [&]() -> absl::StatusOr<std::optional<v1::SampleImage>> {
    v1::SampleImage image;
    image.set_image(std::string(100'000, '1'));
    return image;
  };
  EXPECT_EQ(client_->Quantize(start, images).status(),
            absl::FailedPreconditionError("version 2 is not float"));
}

TEST_F(TernClientTest, HealthIsPerServerAndPerName) {
  EXPECT_TRUE(*client_->Healthy(""));
  EXPECT_FALSE(*client_->Healthy("loading"));
  EXPECT_TRUE(absl::IsNotFound(client_->Healthy("unknown").status()));
}

}  // namespace
}  // namespace tern::client
