#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cmath>
#include <limits>
#include <sstream>

#include "client/json.h"
#include "client/table.h"

namespace tern::client {
namespace {

std::vector<std::string> Keys(const Json& json) {
  std::vector<std::string> keys;
  for (const auto& [key, value] : json.items()) keys.push_back(key);
  return keys;
}

v1::Proportion Share(double value, double low, double high, uint64_t total) {
  v1::Proportion p;
  p.set_value(value);
  p.set_low(low);
  p.set_high(high);
  p.set_total(total);
  return p;
}

TEST(JsonTest, EvaluateHasItsDocumentedKeys) {
  v1::EvaluateResult result;
  result.set_images(1000);
  *result.mutable_top1() = Share(0.875, 0.853, 0.894, 1000);
  const Json json = ToJson(result);
  EXPECT_THAT(Keys(json), testing::IsSupersetOf({"images", "top1", "top5", "top1_ci95", "agreement",
                                                 "agreement_ci95"}));
  EXPECT_EQ(json["images"], 1000);
  EXPECT_EQ(json["top1"], 0.875);
  EXPECT_EQ(json["top1_ci95"], Json::array({0.853, 0.894}));
  EXPECT_TRUE(json["agreement"].is_null());  // not measured is not zero
  EXPECT_TRUE(json["agreement_ci95"].is_null());
}

TEST(JsonTest, QuantizeHasItsDocumentedKeys) {
  v1::QuantizeResult result;
  result.set_model("demo");
  result.set_version(3);
  result.set_published(true);
  v1::QuantizationReport& report = *result.mutable_report();
  report.set_bits_per_weight(2.5);
  report.set_bytes(1234);
  report.set_sqnr_db(std::numeric_limits<double>::infinity());
  *report.mutable_float_top1() = Share(0.9, 0.88, 0.92, 1000);
  report.add_layers()->set_name("conv1");
  const Json json = ToJson(result);
  EXPECT_THAT(Keys(json),
              testing::UnorderedElementsAre("model", "version", "published", "bits_per_weight",
                                            "bytes", "multiplications_removed", "float_top1",
                                            "top1", "agreement", "sqnr_db", "layers", "report"));
  EXPECT_EQ(json["bits_per_weight"], 2.5);
  EXPECT_EQ(json["float_top1"], 0.9);
  EXPECT_EQ(json["layers"][0]["name"], "conv1");
  EXPECT_TRUE(json["sqnr_db"].is_null());  // JSON has no infinity
  EXPECT_EQ(json["report"]["float_top1_ci95"], Json::array({0.88, 0.92}));
  EXPECT_TRUE(Json::accept(Dump(json)));
}

TEST(JsonTest, BenchmarksHaveTheirDocumentedKeys) {
  for (const Json& json : {ToJson(v1::BenchmarkResponse()), ToJson(LoadResult())}) {
    EXPECT_THAT(Keys(json), testing::IsSupersetOf({"images_per_second", "ms_per_image", "p50_ms",
                                                   "p90_ms", "p99_ms", "errors"}));
  }
}

TEST(JsonTest, TextThatIsNotUtf8IsStillWritten) {
  Json json;
  json["file"] = "caf\xe9.jpg";
  EXPECT_TRUE(Json::accept(Dump(json)));
}

TEST(TableTest, ColumnsAreAligned) {
  Table table({{"NAME"}, {"SIZE", Table::kRight}, {"NOTE"}});
  table.Add({"a", "1", ""});
  table.Add({"größer", "1234567", "x"});
  table.Add({"b\n\x1b[2J"});
  std::ostringstream out;
  table.Print(out);
  EXPECT_EQ(out.str(),
            "NAME       SIZE  NOTE\n"
            "a             1\n"
            "größer  1234567  x\n"
            "b??[2J\n");
}

TEST(TableTest, NumbersForPeople) {
  EXPECT_EQ(Bytes(1023), "1023 B");
  EXPECT_EQ(Bytes(1089536), "1.0 MiB");
  EXPECT_EQ(Count(9999), "9999");
  EXPECT_EQ(Count(41'200'000), "41.2 M");
  EXPECT_EQ(Percent(0.8642), "86.42 %");
  EXPECT_EQ(Fixed(std::nan(""), 2), "-");
  EXPECT_EQ(Interval(Share(0.5, 0.4, 0.6, 10)), "50.00 % (40.00..60.00)");
  EXPECT_EQ(Interval(v1::Proportion()), "-");
}

}  // namespace
}  // namespace tern::client
