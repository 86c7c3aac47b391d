#include "server/base/limit_message.h"

#include <gtest/gtest.h>

#include "absl/strings/str_cat.h"

namespace tern {
namespace {

TEST(LimitMessageTest, WhatFitsStaysAsItIs) {
  EXPECT_EQ(LimitMessage(""), "");
  const std::string fits(kMaxMessageBytes, 'x');
  EXPECT_EQ(LimitMessage(fits), fits);
  EXPECT_EQ(LimitMessage("abcdef", 6), "abcdef");
}

TEST(LimitMessageTest, WhatIsLongerIsCutToTheLimitAndSaysSo) {
  EXPECT_EQ(LimitMessage("abcdefg", 6), "abc...");
  EXPECT_EQ(LimitMessage("abcdefg", 3), "...");
  const std::string cut = LimitMessage(std::string(kMaxMessageBytes + 1, 'x'));
  EXPECT_EQ(cut, absl::StrCat(std::string(kMaxMessageBytes - 3, 'x'), "..."));
}

TEST(LimitMessageTest, NoCharacterIsCutInTwo) {
  for (const std::string character : {"\xc3\xa4", "\xe2\x82\xac", "\xf0\x9f\x90\xa6"}) {
    for (size_t before = 0; before < 5; ++before) {
      std::string message(before, 'x');
      while (message.size() < 30) message += character;
      const std::string cut = LimitMessage(message, 20);
      EXPECT_EQ((cut.size() - before - 3) % character.size(), 0u) << cut;
      EXPECT_LE(cut.size(), 20u);
      EXPECT_GT(cut.size(), 20u - character.size());
    }
  }
}

TEST(LimitMessageTest, BytesThatAreNoUtf8AreCutNearTheLimit) {
  EXPECT_EQ(LimitMessage(std::string(30, '\x80'), 20),
            absl::StrCat(std::string(14, '\x80'), "..."));
}

}  // namespace
}  // namespace tern
