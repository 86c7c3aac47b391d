#include "server/serving/admission.h"

#include <gtest/gtest.h>

#include <tuple>
#include <vector>

#include "server/base/retry_after.h"

namespace tern::serving {
namespace {

TEST(AdmissionTest, BytesAreBoundedAndComeBackWithTheTicket) {
  metrics::Metrics metrics;
  Admission admission({.max_bytes = 100}, &metrics);
  auto first = admission.Admit("a", 60);
  ASSERT_TRUE(first.ok());
  const auto refused = admission.Admit("b", 41);
  EXPECT_EQ(refused.status().code(), absl::StatusCode::kResourceExhausted);
  EXPECT_TRUE(RetryAfterOf(refused.status()).has_value());
  EXPECT_NE(refused.status().message().find("60 bytes, this one would add 41, the limit is 100"),
            absl::string_view::npos);
  ASSERT_TRUE(admission.Admit("b", 40).ok());
  first->reset();
  EXPECT_TRUE(admission.Admit("b", 100).ok());
  EXPECT_EQ(admission.Admit("b", 101).status().code(), absl::StatusCode::kResourceExhausted);
  EXPECT_EQ(admission.Admit("b", INT64_MAX).status().code(), absl::StatusCode::kResourceExhausted);
}

TEST(AdmissionTest, EachClientHasItsOwnLimit) {
  metrics::Metrics metrics;
  Admission admission({.max_client_images = 2}, &metrics);
  std::vector<std::shared_ptr<Admission::Ticket>> tickets;
  for (int i = 0; i < 2; ++i) tickets.push_back(*admission.Admit("greedy", 1));
  const auto refused = admission.Admit("greedy", 1);
  EXPECT_EQ(refused.status().code(), absl::StatusCode::kResourceExhausted);
  EXPECT_TRUE(RetryAfterOf(refused.status()).has_value());
  EXPECT_TRUE(admission.Admit("modest", 1).ok());
  tickets.pop_back();
  EXPECT_TRUE(admission.Admit("greedy", 1).ok());
}

TEST(AdmissionTest, WhatNeverFitsIsToldApartFromWhatDoesNotFitNow) {
  metrics::Metrics metrics;
  Admission admission({.max_bytes = 100, .max_client_images = 2}, &metrics);
  const auto here = *admission.Admit("a", 100);
  EXPECT_TRUE(admission.CheckFits(2, 100).ok());
  for (const auto& [images, bytes, flag] :
       {std::tuple(3, 100, "3 in one request, a client may have 2 here (--max_client_images)"),
        std::tuple(2, 101, "101 bytes, all may hold 100 (--max_waiting_bytes)")}) {
    const absl::Status status = admission.CheckFits(images, bytes);
    EXPECT_EQ(status.code(), absl::StatusCode::kResourceExhausted);
    EXPECT_FALSE(RetryAfterOf(status).has_value());
    EXPECT_NE(status.message().find(flag), absl::string_view::npos) << status;
  }
  EXPECT_TRUE(Admission({.max_bytes = 100}, &metrics).CheckFits(1000, 100).ok());
}

TEST(AdmissionTest, OnlyClientsWithImagesHereAreRemembered) {
  metrics::Metrics metrics;
  Admission admission({}, &metrics);
  const auto kept = *admission.Admit("stays", 5);
  for (int i = 0; i < 1000; ++i) ASSERT_TRUE(admission.Admit(std::to_string(i), 7).ok());
  const std::string text = metrics.Render();
  EXPECT_NE(text.find("\ntern_clients 1\n"), std::string::npos);
  EXPECT_NE(text.find("\ntern_waiting_images 1\n"), std::string::npos);
  EXPECT_NE(text.find("\ntern_waiting_bytes 5\n"), std::string::npos);
}

}  // namespace
}  // namespace tern::serving
