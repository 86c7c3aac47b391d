#include "server/quant/cholesky.h"

#include <cmath>

#include "gtest/gtest.h"
#include "tests/quant/networks.h"

namespace tern::quant {
namespace {

std::vector<double> RandomCovariance(int n, uint64_t seed) {
  Normal normal(seed);
  std::vector<double> factor(static_cast<size_t>(n) * n), a(factor.size());
  for (double& v : factor) v = normal();
  for (int i = 0; i < n; ++i) {
    for (int j = 0; j < n; ++j) {
      for (int k = 0; k < n; ++k) a[i * n + j] += factor[i * n + k] * factor[j * n + k] / n;
    }
    a[i * n + i] += 0.1;
  }
  return a;
}

class CholeskyTest : public ::testing::TestWithParam<int> {};

TEST_P(CholeskyTest, FactorTimesItsTransposeIsTheMatrix) {
  const int n = GetParam();
  const std::vector<double> a = RandomCovariance(n, 1);
  std::vector<double> l = a;
  ASSERT_TRUE(CholeskyInPlace(n, l, 1, nullptr).ok());
  for (int i = 0; i < n; ++i) {
    for (int j = 0; j < n; ++j) {
      double sum = 0;
      for (int k = 0; k < n; ++k) sum += l[i * n + k] * l[j * n + k];
      ASSERT_NEAR(sum, a[i * n + j], 1e-10);
      ASSERT_TRUE(j <= i || l[i * n + j] == 0);
    }
  }
}

TEST_P(CholeskyTest, SolutionsSatisfyTheEquations) {
  const int n = GetParam();
  const std::vector<double> a = RandomCovariance(n, 2);
  std::vector<double> l = a;
  ASSERT_TRUE(CholeskyInPlace(n, l, 1, nullptr).ok());
  constexpr int kRows = 19;
  Normal normal(3);
  std::vector<double> b(kRows * n);
  for (double& v : b) v = normal();
  std::vector<double> x = b;
  ASSERT_TRUE(CholeskySolveRows(n, l, kRows, x, 1, nullptr).ok());
  for (int row = 0; row < kRows; ++row) {
    for (int i = 0; i < n; ++i) {
      double sum = 0;
      for (int j = 0; j < n; ++j) sum += a[i * n + j] * x[row * n + j];
      ASSERT_NEAR(sum, b[row * n + i], 1e-8);
    }
  }
}

TEST_P(CholeskyTest, UpperFactorOfTheInverseInvertsTheMatrix) {
  const int n = GetParam();
  const std::vector<double> a = RandomCovariance(n, 4);
  std::vector<float> u;
  ASSERT_TRUE(InverseCholeskyUpper(n, a, 1, nullptr, u).ok());
  // (U^T U) a = 1
  std::vector<double> inverse(a.size());
  for (int k = 0; k < n; ++k) {
    for (int i = 0; i < n; ++i) {
      ASSERT_TRUE(i >= k || u[k * n + i] == 0);
      for (int j = 0; j < n; ++j)
        inverse[i * n + j] += static_cast<double>(u[k * n + i]) * u[k * n + j];
    }
  }
  for (int i = 0; i < n; ++i) {
    for (int j = 0; j < n; ++j) {
      double sum = 0;
      for (int k = 0; k < n; ++k) sum += inverse[i * n + k] * a[k * n + j];
      ASSERT_NEAR(sum, i == j ? 1.0 : 0.0, 1e-4);
    }
  }
}

INSTANTIATE_TEST_SUITE_P(Sizes, CholeskyTest, ::testing::Values(1, 5, 64, 65, 200));

TEST(CholeskyTest, RefusesAnIndefiniteMatrix) {
  std::vector<double> a = {1, 2, 2, 1};
  EXPECT_EQ(CholeskyInPlace(2, a, 1, nullptr).code(), absl::StatusCode::kFailedPrecondition);
}

TEST(CholeskyTest, StopsWhenCancelled) {
  std::atomic<bool> cancelled = true;
  std::vector<double> a = RandomCovariance(70, 5);
  std::vector<float> u;
  EXPECT_EQ(InverseCholeskyUpper(70, a, 1, &cancelled, u).code(), absl::StatusCode::kCancelled);
  EXPECT_EQ(CholeskyInPlace(70, a, 1, &cancelled).code(), absl::StatusCode::kCancelled);
}

}  // namespace
}  // namespace tern::quant
