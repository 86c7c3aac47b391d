// Base of the tests that run once per instruction set.
#ifndef TERN_TESTS_KERNELS_ISA_TEST_H_
#define TERN_TESTS_KERNELS_ISA_TEST_H_

#include <algorithm>
#include <cstdlib>
#include <ostream>
#include <string>

#include "gtest/gtest.h"
#include "server/kernels/dispatch.h"

namespace tern::kernels {

// Skips an instruction set that this machine lacks, unless the environment variable
// TERN_EXPECT_ISA names it (or a higher one): then that is a failure, so that a continuous
// build cannot mistake a skip for a pass.
class IsaTest : public ::testing::TestWithParam<Isa> {
 protected:
  void SetUp() override {
    if (GetParam() <= DetectIsa()) return;
    const char* expected = std::getenv("TERN_EXPECT_ISA");
    if (expected != nullptr) {
      for (Isa isa : {Isa::kScalar, Isa::kAvx2, Isa::kAvx512Vnni}) {
        if (IsaName(isa) == std::string(expected) && GetParam() <= isa) {
          FAIL() << "TERN_EXPECT_ISA=" << expected << ", but this machine or build only has "
                 << IsaName(DetectIsa());
        }
      }
    }
    GTEST_SKIP() << IsaName(GetParam()) << " is not available here";
  }
};

// Whether to try the next problem of a series: always, or every n-th with the environment variable
// TERN_TEST_EVERY=n, for machines on which all take too long.
inline bool IsTurn() {
  static const char* const every = std::getenv("TERN_TEST_EVERY");
  static int count = 0;
  return every == nullptr || count++ % std::max(1, std::atoi(every)) == 0;
}

inline void PrintTo(Isa isa, std::ostream* out) { *out << IsaName(isa); }

inline const auto kAllIsas = ::testing::Values(Isa::kScalar, Isa::kAvx2, Isa::kAvx512Vnni);
inline std::string IsaSuffix(const ::testing::TestParamInfo<Isa>& info) {
  return IsaName(info.param);
}

}  // namespace tern::kernels

#endif  // TERN_TESTS_KERNELS_ISA_TEST_H_
