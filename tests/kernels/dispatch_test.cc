#include "server/kernels/dispatch.h"

#include <cstdlib>
#include <string>

#include "gmock/gmock.h"
#include "gtest/gtest.h"

namespace tern::kernels {
namespace {

using ::testing::Contains;
using ::testing::HasSubstr;

TEST(DispatchTest, NativeAndEmptyCapsDoNotLowerTheChoice) {
  EXPECT_EQ(SelectIsa("").value(), DetectIsa());
  EXPECT_EQ(SelectIsa("native").value(), DetectIsa());
}

TEST(DispatchTest, ACapLowersButNeverRaisesTheChoice) {
  for (Isa cap : {Isa::kScalar, Isa::kAvx2, Isa::kAvx512Vnni}) {
    const Isa selected = SelectIsa(IsaName(cap)).value();
    EXPECT_LE(selected, cap);
    EXPECT_LE(selected, DetectIsa());
    EXPECT_TRUE(selected == cap || selected == DetectIsa());
  }
  EXPECT_EQ(SelectIsa("scalar").value(), Isa::kScalar);
}

TEST(DispatchTest, AnUnknownCapIsRefusedWithTheKnownNames) {
  const auto selected = SelectIsa("avx9000");
  ASSERT_EQ(selected.status().code(), absl::StatusCode::kInvalidArgument);
  const std::string message(selected.status().message());
  for (const char* part : {"avx9000", "native", "scalar", "avx2", "avx512vnni"}) {
    EXPECT_THAT(message, HasSubstr(part));
  }
}

TEST(DispatchTest, RunnableIsasRiseFromScalarToTheDetectedOne) {
  const std::vector<Isa> isas = RunnableIsas();
  EXPECT_EQ(isas.front(), Isa::kScalar);
  EXPECT_EQ(isas.back(), DetectIsa());
  for (size_t i = 1; i < isas.size(); ++i) EXPECT_LT(isas[i - 1], isas[i]);
}

TEST(DispatchTest, TheIsaThatTheEnvironmentExpectsRunsHere) {
  const char* expected = std::getenv("TERN_EXPECT_ISA");
  if (expected == nullptr) GTEST_SKIP() << "TERN_EXPECT_ISA is not set";
  std::vector<std::string> names;
  for (Isa isa : RunnableIsas()) names.push_back(IsaName(isa));
  EXPECT_THAT(names, Contains(expected));
}

}  // namespace
}  // namespace tern::kernels
