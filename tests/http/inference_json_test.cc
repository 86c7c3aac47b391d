// Bodies of the Open Inference Protocol over HTTP, without a model: what they cost and what is
// read.
#include "server/http/inference_json.h"

#include <limits>
#include <string>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "gmock/gmock.h"
#include "nlohmann/json.hpp"

namespace tern::http {
namespace {

using inference::InferTensorContents;
using nlohmann::json;
using ::testing::ElementsAre;
using ::testing::HasSubstr;
using ::testing::Not;

constexpr int kMaxJsonValues = 4096;

// "[piece,piece,...]"
std::string Array(int count, const std::string& piece) {
  std::string text = "[";
  for (int i = 0; i < count; ++i) absl::StrAppend(&text, i > 0 ? "," : "", piece);
  return text + "]";
}

// A body with one input.
std::string Body(const std::string& datatype, const std::string& data) {
  return absl::StrCat("{\"inputs\":[{\"name\":\"image\",\"shape\":[1],\"data\":", data,
                      ",\"datatype\":\"", datatype, "\"}]}");
}

// What is read of the first input; fails the test if the body is refused.
InferTensorContents Contents(const std::string& body) {
  const auto parsed = ParseInferBody(body, std::nullopt);
  EXPECT_TRUE(parsed.ok()) << parsed.status();
  if (!parsed.ok() || parsed->request.inputs().empty()) return {};
  return parsed->request.inputs(0).contents();
}

void ExpectRefused(const std::string& body, const std::string& words) {
  const absl::Status status = ParseInferBody(body, std::nullopt).status();
  EXPECT_EQ(status.code(), absl::StatusCode::kInvalidArgument) << body.substr(0, 100);
  EXPECT_THAT(std::string(status.message()), HasSubstr(words)) << body.substr(0, 100);
  EXPECT_LT(status.message().size(), 300u);
}

TEST(InferBodyTest, TheLargestBatchIsTakenFlatOrNestedInAFewBytesPerNumber) {
  constexpr int kImages = 64, kSide = 224, kNumbers = kImages * 3 * kSide * kSide;
  const std::string nested = Array(kImages, Array(3, Array(kSide, Array(kSide, "7"))));
  const InferTensorContents floats = Contents(Body("FP32", nested));
  ASSERT_EQ(floats.fp32_contents_size(), kNumbers);
  EXPECT_EQ(floats.fp32_contents(kNumbers - 1), 7);
  // Twice: memory grows by doubling.
  EXPECT_LE(floats.SpaceUsedLong(), 2 * sizeof(float) * kNumbers + 1000);
  const InferTensorContents pixels = Contents(Body("UINT8", Array(kNumbers, "7")));
  ASSERT_EQ(pixels.uint_contents_size(), kNumbers);
  EXPECT_EQ(pixels.uint_contents(kNumbers - 1), 7u);
}

TEST(InferBodyTest, EverythingButNumbersInDataIsBoundedByItsCount) {
  constexpr int kMany = 700'000;
  for (const char* piece : {"{}", "[]", "1", "-1", "1.5", "null", "true", "\"\"", "{\"data\":1}"}) {
    const std::string many = Array(kMany, piece);
    for (const char* member : {"inputs", "outputs", "parameters", "id", "data", "unknown"})
      ExpectRefused(absl::StrCat("{\"", member, "\":", many, "}"), "more than 4096 values");
    for (const char* member : {"name", "shape", "parameters", "unknown"}) {
      ExpectRefused(absl::StrCat("{\"inputs\":[{\"", member, "\":", many, "}]}"),
                    "more than 4096 values");
    }
    ExpectRefused(absl::StrCat("{\"inputs\":[", many, "]}"), "more than 4096 values");
    ExpectRefused(absl::StrCat("{\"inputs\":{\"a\":{\"data\":", many, "}}}"),
                  "more than 4096 values");
    ExpectRefused(absl::StrCat("{\"inputs\":[{\"data\":1},[", many, "]]}"),
                  "more than 4096 values");
    ExpectRefused(absl::StrCat("{\"outputs\":[{\"data\":", many, "}]}"), "more than 4096 values");
  }
  for (const char* piece : {"{}", "null", "true", "\"\"", "{\"b64\":\"\"}", "[\"\"]"})
    ExpectRefused(Body("BYTES", Array(kMany, piece)), "more than 4096 values");
  // Of equal names one is kept, but all are built.
  std::string equal = "{\"id\":\"\"";
  for (int i = 0; i < kMany; ++i) equal += ",\"a\":[]";
  ExpectRefused(equal + "}", "more than 4096 values");
}

TEST(InferBodyTest, TheBoundIsExact) {
  // The body, "inputs", the input, its four members and one dimension.
  EXPECT_EQ(Contents(Body("BYTES", Array(kMaxJsonValues - 8, "\"\""))).bytes_contents_size(),
            kMaxJsonValues - 8);
  ExpectRefused(Body("BYTES", Array(kMaxJsonValues - 7, "\"\"")), "more than 4096 values");
}

TEST(InferBodyTest, ArraysInDataAreOnlyAnOrder) {
  EXPECT_EQ(Contents(Body("FP32", Array(500'000, "[[],[]]"))).ByteSizeLong(), 0u);
  EXPECT_THAT(Contents(Body("FP32", "[1,[2,[[3.5],-4]],[],5]")).fp32_contents(),
              ElementsAre(1, 2, 3.5, -4, 5));
  EXPECT_THAT(Contents(Body("BYTES", "[[\"YQ==\"],[{\"b64\":\"Yg==\"}]]")).bytes_contents(),
              ElementsAre("a", "b"));
  EXPECT_THAT(Contents(Body("UINT8", "[[[[255]]]]")).uint_contents(), ElementsAre(255));
  ExpectRefused(Body("UINT8", "[0,[[[[255]]]]]"), "data: arrays in more than 4 levels");
  const std::string deep = std::string(1 << 20, '[') + std::string(1 << 20, ']');
  ExpectRefused(Body("FP32", deep), "data: arrays in more than 4 levels");
  ExpectRefused(Body("BYTES", "[{\"b64\":" + deep + "}]"), "more than 16 levels of JSON");
}

TEST(InferBodyTest, ElementsThatDoNotFitTheDatatypeAreNamed) {
  ExpectRefused(Body("FP32", "[1,null]"), "inputs[0]: data: got null, want a number");
  ExpectRefused(Body("FP32", "[{\"a\":1}]"), "data: got {\"a\":1}, want a number");
  ExpectRefused(Body("UINT8", "[1,256,300]"), "data: got 256, want an integer of 0 to 255");
  ExpectRefused(Body("UINT8", "[-1]"), "data: got -1, want an integer");
  ExpectRefused(Body("UINT8", "[1.0]"), "data: got 1.0, want an integer");
  ExpectRefused(Body("UINT8", "[\"1\"]"), "data: got \"1\", want an integer");
  ExpectRefused(Body("BYTES", "[2.5]"), "data: got 2.5, want base64");
  ExpectRefused(Body("BYTES", "[\"*\"]"), "data: got \"*\", want base64");
  ExpectRefused(Body("BYTES", "[{\"b64\":1}]"), "data: got {\"b64\":1}, want base64");
  ExpectRefused(Body("BYTES", "[{\"b64\":\"\",\"a\":1}]"), "want base64");
  ExpectRefused(Body("FP64", "[1]"), "datatype: got 'FP64'");
  for (const char* data : {"3", "\"x\"", "{\"b64\":\"\"}", "null"})
    ExpectRefused(Body("FP32", data), absl::StrCat("data: got ", data, ", want an array"));
}

TEST(InferBodyTest, OfEqualNamesTheLastOneHolds) {
  EXPECT_THAT(Contents(Body("FP32", "[1,2],\"data\":[3]")).fp32_contents(), ElementsAre(3));
  EXPECT_THAT(Contents(Body("FP32", "3,\"data\":[4]")).fp32_contents(), ElementsAre(4));
  ExpectRefused(Body("FP32", "[1],\"data\":3"), "data: got 3, want an array");
  const std::string input = "{\"datatype\":\"FP32\",\"shape\":[1],\"data\":[1]}";
  const auto parsed = ParseInferBody(absl::StrCat("{\"inputs\":[", input, ",", input,
                                                  "],\"inputs\":[{\"datatype\":\"UINT8\","
                                                  "\"shape\":[1],\"data\":[2]}]}"),
                                     std::nullopt);
  ASSERT_TRUE(parsed.ok()) << parsed.status();
  ASSERT_EQ(parsed->request.inputs_size(), 1);
  EXPECT_EQ(parsed->request.inputs(0).contents().fp32_contents_size(), 0);
  EXPECT_THAT(parsed->request.inputs(0).contents().uint_contents(), ElementsAre(2));
}

TEST(InferBodyTest, EachInputGetsItsOwnElements) {
  const auto parsed = ParseInferBody(
      "{\"inputs\":[{\"datatype\":\"FP32\",\"shape\":[1],\"data\":[1]},"
      "{\"datatype\":\"UINT8\",\"shape\":[2],\"data\":[]},"
      "{\"datatype\":\"FP32\",\"shape\":[1],\"data\":[2,3]}]}",
      std::nullopt);
  ASSERT_TRUE(parsed.ok()) << parsed.status();
  ASSERT_EQ(parsed->request.inputs_size(), 3);
  EXPECT_THAT(parsed->request.inputs(0).contents().fp32_contents(), ElementsAre(1));
  EXPECT_THAT(parsed->request.inputs(1).contents().uint_contents(), ElementsAre());
  EXPECT_THAT(parsed->request.inputs(2).contents().fp32_contents(), ElementsAre(2, 3));
}

TEST(InferBodyTest, MembersThatAreNullAreAbsent) {
  const auto parsed = ParseInferBody(
      "{\"id\":null,\"parameters\":null,\"outputs\":null,\"inputs\":[{\"datatype\":\"FP32\","
      "\"shape\":[1],\"parameters\":null,\"data\":[1]}]}",
      std::nullopt);
  ASSERT_TRUE(parsed.ok()) << parsed.status();
  EXPECT_EQ(parsed->request.id(), "");
  EXPECT_TRUE(parsed->request.parameters().empty());
  EXPECT_EQ(parsed->request.outputs_size(), 0);
  EXPECT_THAT(parsed->binary, ElementsAre(false));
  ExpectRefused("{\"parameters\":{\"timeout\":null}}", "parameters.timeout: got null");
}

TEST(InferBodyTest, AWholeNumberIsAnInteger) {
  const auto parsed = ParseInferBody(
      "{\"parameters\":{\"timeout\":5000000.0,\"priority\":-0.0,\"large\":1e18,\"half\":2.5,"
      "\"beyond\":1e19,\"least\":-9223372036854775808.0},"
      "\"outputs\":[{\"parameters\":{\"classification\":3.0}}]}",
      std::nullopt);
  ASSERT_TRUE(parsed.ok()) << parsed.status();
  const auto& parameters = parsed->request.parameters();
  EXPECT_EQ(parameters.at("timeout").int64_param(), 5'000'000);
  EXPECT_EQ(parameters.at("priority").parameter_choice_case(),
            inference::InferParameter::kInt64Param);
  EXPECT_EQ(parameters.at("priority").int64_param(), 0);
  EXPECT_EQ(parameters.at("large").int64_param(), 1'000'000'000'000'000'000);
  EXPECT_EQ(parameters.at("half").double_param(), 2.5);
  EXPECT_EQ(parameters.at("beyond").double_param(), 1e19);
  EXPECT_EQ(parameters.at("least").int64_param(), std::numeric_limits<int64_t>::min());
  EXPECT_EQ(parsed->request.outputs(0).parameters().at("classification").int64_param(), 3);
}

TEST(InferBodyTest, WhatIsQuotedIsCut) {
  const std::string text(1 << 20, 'x');
  ExpectRefused(Body(text, "[1]"), "want FP32, UINT8 or BYTES");
  ExpectRefused(Body("BYTES", absl::StrCat("[\"", text, "*\"]")), "want base64");
  ExpectRefused(absl::StrCat("{\"parameters\":{\"", text, "\":[]}}"), "want a boolean");
  ExpectRefused(absl::StrCat("{\"id\":[\"", text, "\"]}"), "want a string");
  ExpectRefused(absl::StrCat("{\"inputs\":[{\"shape\":[1],\"parameters\":{\"binary_data_size\":\"",
                             text, "\"}}]}"),
                "bytes follow the JSON");
}

TEST(InferBodyTest, TextThatIsNotOneObjectIsRefused) {
  for (const char* text :
       {"", " ", "[]", "3", "{", "{}{}", "{\"a\"}", "{\"inputs\":[{\"data\":[1,2", "{\"a\":1e999}",
        "{\"inputs\":[{\"data\":[1,]}]}", "{\"inputs\":[{\"data\":[1}]}", "{\"id\":\"\xff\"}"}) {
    ExpectRefused(text, "body: is not a JSON object");
  }
}

inference::ModelInferResponse OneOutput(const std::vector<float>& values) {
  inference::ModelInferResponse response;
  auto* output = response.add_outputs();
  output->set_name("logits");
  output->set_datatype("FP32");
  output->add_shape(static_cast<int64_t>(values.size()));
  response.add_raw_output_contents(
      std::string(reinterpret_cast<const char*>(values.data()), values.size() * sizeof(float)));
  return response;
}

TEST(InferAnswerTest, NumbersThatJsonHasNotAreAnErrorAndNoNull) {
  for (const auto& [value, words] : std::vector<std::pair<float, std::string>>{
           {std::numeric_limits<float>::quiet_NaN(), "outputs.logits: element 1 is nan"},
           {std::numeric_limits<float>::infinity(), "outputs.logits: element 1 is inf"},
           {-std::numeric_limits<float>::infinity(), "outputs.logits: element 1 is -inf"}}) {
    const auto answer = FormatInferAnswer(OneOutput({1, value}), {false});
    EXPECT_EQ(answer.status().code(), absl::StatusCode::kInternal);
    EXPECT_THAT(std::string(answer.status().message()), HasSubstr(words));
    EXPECT_TRUE(FormatInferAnswer(OneOutput({1, value}), {true}).ok());  // raw bytes are
  }
  const float largest = std::numeric_limits<float>::max();
  const auto answer = FormatInferAnswer(OneOutput({largest, -0.0f}), {false});
  ASSERT_TRUE(answer.ok()) << answer.status();
  EXPECT_THAT(answer->body, Not(HasSubstr("null")));
  EXPECT_EQ(json::parse(answer->body)["outputs"][0]["data"][0].get<float>(), largest);
}

}  // namespace
}  // namespace tern::http
