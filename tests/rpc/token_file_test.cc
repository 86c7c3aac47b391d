#include "server/rpc/token_file.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <filesystem>
#include <fstream>

#include "server/base/log.h"

namespace tern::rpc {
namespace {

using ::testing::HasSubstr;
using ::testing::Not;
using ::testing::Optional;

constexpr absl::Duration kCheckEvery = WatchedFiles<int>::kCheckEvery;
constexpr char kFirst[] = "0123456789abcdef-._~+/==";
constexpr char kSecond[] = "fedcba9876543210";

class TokenFileTest : public ::testing::Test {
 protected:
  TokenFileTest() {
    char folder[] = "/tmp/tern-tokens-XXXXXX";
    folder_ = ::mkdtemp(folder);
    path_ = folder_ + "/tokens";
  }
  ~TokenFileTest() override { std::filesystem::remove_all(folder_); }

  // By rename, as an orchestrator's secret mounts do it: the file is never half written.
  void Put(const std::string& text) {
    std::ofstream(path_ + ".new") << text;
    std::filesystem::rename(path_ + ".new", path_);
  }
  absl::StatusOr<std::unique_ptr<TokenFile>> Open(const std::string& text) {
    Put(text);
    return TokenFile::Open(
        path_, [this] { ++failures_; }, &clock_);
  }

  std::string folder_, path_;
  FakeClock clock_;
  int failures_ = 0;
};

TEST_F(TokenFileTest, FindsTokensByNameAndRefusesOthers) {
  const auto file = Open(absl::StrCat("# operators\n\nops.1:", kFirst, "\r\n  ", kSecond, "  \n"));
  ASSERT_TRUE(file.ok()) << file.status();
  EXPECT_THAT((*file)->Find(kFirst), Optional(std::string("ops.1")));
  EXPECT_THAT((*file)->Find(kSecond), Optional(std::string("line-4")));
  for (const char* wrong :
       {"", "0123456789abcdef", "fedcba987654321", "fedcba98765432100", "ops.1"}) {
    EXPECT_EQ((*file)->Find(wrong), std::nullopt) << wrong;
  }
}

TEST_F(TokenFileTest, BadFilesAreRefusedByLineAndNeverQuoted) {
  const struct {
    std::string text, message;
  } cases[] = {
      {"", "holds no token"},
      {"# only a comment\n", "holds no token"},
      {"a:SECRETSECRET\n", "line 1: want a token of 16"},
      {absl::StrCat(kFirst, "\nSECRET SECRET SECRET\n"), "line 2: want a token"},
      {"a:" + std::string(4097, 'x'), "line 1: want a token"},
      {absl::StrCat(":", kFirst), "line 1: want a name"},
      {absl::StrCat("a b:", kFirst), "line 1: want a name"},
      {absl::StrCat("../a:", kFirst), "line 1: want a name"},
      {absl::StrCat("a:", kFirst, "\na:", kSecond), "line 2: name or token is that of \"a\""},
      {absl::StrCat("a:", kFirst, "\nb:", kFirst), "line 2: name or token is that of \"a\""},
  };
  for (const auto& test : cases) {
    const absl::Status status = Open(test.text).status();
    EXPECT_TRUE(absl::IsInvalidArgument(status)) << status;
    EXPECT_THAT(status.ToString(), HasSubstr(test.message));
    EXPECT_THAT(status.ToString(), HasSubstr(path_));
    EXPECT_THAT(status.ToString(), Not(HasSubstr("SECRET")));
    EXPECT_THAT(status.ToString(), Not(HasSubstr(kFirst)));
  }
  EXPECT_TRUE(absl::IsNotFound(TokenFile::Open(folder_ + "/absent").status()));
  EXPECT_TRUE(absl::IsInvalidArgument(TokenFile::Open(folder_).status()));
}

TEST_F(TokenFileTest, AtMost1024Tokens) {
  std::string text;
  for (int i = 0; i < 1024; ++i)
    absl::StrAppend(&text, "n", i, ":", 1'000'000'000'000'000 + i, "\n");
  EXPECT_TRUE(Open(text).ok());
  EXPECT_TRUE(absl::IsInvalidArgument(Open(absl::StrCat(text, kFirst, "\n")).status()));
}

TEST_F(TokenFileTest, AChangedFileIsReadAgainWithinASecond) {
  const auto file = Open(absl::StrCat("a:", kFirst));
  ASSERT_TRUE(file.ok()) << file.status();
  Put(absl::StrCat("b:", kSecond));
  EXPECT_TRUE((*file)->Find(kFirst).has_value());  // not looked at yet
  clock_.Advance(kCheckEvery);
  EXPECT_EQ((*file)->Find(kFirst), std::nullopt);
  EXPECT_THAT((*file)->Find(kSecond), Optional(std::string("b")));
  EXPECT_EQ(failures_, 0);
}

TEST_F(TokenFileTest, ABrokenChangeKeepsTheOldTokensAndCountsOnce) {
  const auto file = Open(absl::StrCat("a:", kFirst));
  ASSERT_TRUE(file.ok()) << file.status();
  Put("too short");
  for (int i = 0; i < 3; ++i) {
    clock_.Advance(kCheckEvery);
    EXPECT_TRUE((*file)->Find(kFirst).has_value());
  }
  EXPECT_EQ(failures_, 1);
  std::filesystem::remove(path_);
  clock_.Advance(kCheckEvery);
  EXPECT_TRUE((*file)->Find(kFirst).has_value());
  EXPECT_EQ(failures_, 2);
  Put(absl::StrCat("b:", kSecond));
  clock_.Advance(kCheckEvery);
  EXPECT_TRUE((*file)->Find(kSecond).has_value());
}

TEST(BearerTokenTest, TakesTheTokenOfOneBearerScheme) {
  EXPECT_EQ(*BearerToken("Bearer abc"), "abc");
  EXPECT_EQ(*BearerToken("bEARER  abc "), "abc");
  for (const std::string& bad :
       {std::string(), std::string("Bearer"), std::string("Bearer "), std::string("abc"),
        std::string("Basic abc"), "Bearer " + std::string(4097, 'x')}) {
    EXPECT_TRUE(absl::IsInvalidArgument(BearerToken(bad).status())) << bad;
  }
}

}  // namespace
}  // namespace tern::rpc
