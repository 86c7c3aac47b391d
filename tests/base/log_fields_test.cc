#include "server/base/log_fields.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <functional>
#include <nlohmann/json.hpp>
#include <sstream>
#include <vector>

#include "absl/time/time.h"

namespace tern {
namespace {

std::string Logged(LogFormat format, const std::function<void()>& write) {
  ::testing::internal::CaptureStderr();
  EXPECT_TRUE(InitLog("warn", format).ok());
  write();
  std::string text = ::testing::internal::GetCapturedStderr();
  EXPECT_TRUE(InitLog("warn").ok());
  return text;
}

TEST(LogTest, KnowsItsFormats) {
  EXPECT_EQ(*ParseLogFormat("text"), LogFormat::kText);
  EXPECT_EQ(*ParseLogFormat("json"), LogFormat::kJson);
  EXPECT_EQ(ParseLogFormat("xml").status().code(), absl::StatusCode::kInvalidArgument);
}

TEST(LogTest, JsonLinesParseWhateverTheyHold) {
  const std::string nasty = "a\"b\\c\nd\x01\xff{}";
  const std::string text = Logged(LogFormat::kJson, [&] {
    TERN_LOG_WARN("got {}", nasty);
    TERN_LOG_INFO("below the level");
    Log(spdlog::level::err, nasty, {{"request_id", nasty}, {"trace_id", "1"}});
    TERN_LOG_WARN("no fields are left over");
  });
  std::istringstream lines(text);
  std::vector<nlohmann::json> parsed;
  for (std::string line; std::getline(lines, line);) parsed.push_back(nlohmann::json::parse(line));
  ASSERT_EQ(parsed.size(), 3u) << text;
  const std::string replaced = "a\"b\\c\nd\x01\xEF\xBF\xBD{}";  // U+FFFD for the stray byte
  EXPECT_EQ(parsed[0]["message"], "got " + replaced);
  EXPECT_EQ(parsed[0]["level"], "warning");
  EXPECT_EQ(parsed[0]["logger"], "tern");
  absl::Time time;
  EXPECT_TRUE(
      absl::ParseTime(absl::RFC3339_full, parsed[0]["time"].get<std::string>(), &time, nullptr));
  EXPECT_EQ(parsed[1]["message"], replaced);
  EXPECT_EQ(parsed[1]["request_id"], replaced);
  EXPECT_EQ(parsed[1]["trace_id"], "1");
  EXPECT_FALSE(parsed[2].contains("request_id"));
}

TEST(LogTest, ATextLineIsOneLine) {
  const std::string text = Logged(LogFormat::kText, [] {
    TERN_LOG_WARN("forged\n2026-01-01T00:00:00.000 I 1 line");
    Log(spdlog::level::warn, "m", {{"name", "x\ny z"}});
  });
  EXPECT_EQ(std::count(text.begin(), text.end(), '\n'), 2) << text;
  EXPECT_NE(text.find("forged\\x0a2026"), std::string::npos) << text;
  EXPECT_NE(text.find(" m name=\"x\\ny z\"\n"), std::string::npos) << text;
}

TEST(LogTest, TheAuditLogIsWrittenAtEveryLevelButOff) {
  EXPECT_NE(Logged(LogFormat::kText, [] { AuditLog("call", {}); }).find("[audit] call"),
            std::string::npos);
  ::testing::internal::CaptureStderr();
  EXPECT_TRUE(InitLog("off").ok());
  AuditLog("call", {});
  EXPECT_EQ(::testing::internal::GetCapturedStderr(), "");
  EXPECT_TRUE(InitLog("warn").ok());
}

}  // namespace
}  // namespace tern
