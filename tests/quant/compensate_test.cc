#include "server/quant/compensate.h"

#include <cmath>

#include "gtest/gtest.h"
#include "tests/quant/networks.h"

namespace tern::quant {
namespace {

// A layer whose inputs share a few common causes, as feature maps do: x = A s + noise, z = W
// x_float.
struct Problem {
  int channels, taps, n, outputs;
  ClusterLayout layout;
  std::vector<float> rows;  // [O, J]
  std::vector<float> x, z;  // [J, M], [O, M]
  int64_t positions = 3000;
  Moments moments;

  Problem(int channels, int taps, int n, int outputs, uint64_t seed, float input_noise = 0.0f)
      : channels(channels),
        taps(taps),
        n(n),
        outputs(outputs),
        layout(MakeClusterLayout(channels, taps, n)),
        moments(channels * taps, outputs) {
    Normal normal(seed);
    const int columns = layout.columns();
    const int causes = 1 + columns / 4;
    rows.resize(static_cast<size_t>(outputs) * columns);
    for (float& v : rows) v = normal() / std::sqrt(static_cast<float>(columns));
    std::vector<float> mix(static_cast<size_t>(columns) * causes), cause(causes * positions);
    for (float& v : mix) v = normal() / std::sqrt(static_cast<float>(causes));
    for (float& v : cause) v = normal();
    std::vector<float> exact(static_cast<size_t>(columns) * positions);
    for (int j = 0; j < columns; ++j) {
      for (int64_t p = 0; p < positions; ++p) {
        float v = 0.5f + 0.3f * normal();
        for (int k = 0; k < causes; ++k) v += mix[j * causes + k] * cause[k * positions + p];
        exact[j * positions + p] = v;
      }
    }
    x = exact;
    for (float& v : x) v += input_noise * normal();
    z.assign(static_cast<size_t>(outputs) * positions, 0.0f);
    for (int o = 0; o < outputs; ++o) {
      for (int j = 0; j < columns; ++j) {
        for (int64_t p = 0; p < positions; ++p)
          z[o * positions + p] += rows[o * columns + j] * exact[j * positions + p];
      }
    }
    // In two unequal pieces, as batches come.
    Add(0, 1100);
    Add(1100, positions - 1100);
  }

  void Add(int64_t first, int64_t count) {
    std::vector<float> xs, zs;
    for (int j = 0; j < layout.columns(); ++j)
      xs.insert(xs.end(), &x[j * positions + first], &x[j * positions + first] + count);
    for (int o = 0; o < outputs; ++o)
      zs.insert(zs.end(), &z[o * positions + first], &z[o * positions + first] + count);
    moments.Add(count, xs.data(), zs.data());
  }

  // Mean over outputs of the variance of z - Q x, relative to that of z: the error after bias
  // correction.
  double OutputError(const CodedWeights& weights, bool match_variance = false) const {
    double error = 0, energy = 0;
    const int columns = layout.columns();
    for (int o = 0; o < outputs; ++o) {
      std::vector<double> y(positions);
      for (int g = 0; g < layout.clusters(); ++g) {
        for (int j = layout.begin[g]; j < layout.begin[g + 1]; ++j) {
          const double q = weights.alpha(layout, o, g) * weights.codes[o * columns + j];
          for (int64_t p = 0; p < positions; ++p) y[p] += q * x[j * positions + p];
        }
      }
      double y_mean = 0, z_mean = 0, y_var = 0, z_var = 0;
      for (int64_t p = 0; p < positions; ++p)
        y_mean += y[p] / positions, z_mean += z[o * positions + p] / positions;
      for (int64_t p = 0; p < positions; ++p) {
        y_var += (y[p] - y_mean) * (y[p] - y_mean);
        z_var += (z[o * positions + p] - z_mean) * (z[o * positions + p] - z_mean);
      }
      const double factor = match_variance && y_var > 0 ? std::sqrt(z_var / y_var) : 1.0;
      for (int64_t p = 0; p < positions; ++p) {
        const double e = factor * (y[p] - y_mean) - (z[o * positions + p] - z_mean);
        error += e * e;
      }
      energy += z_var;
    }
    return error / energy;
  }
};

CodedWeights MustCompensate(const Problem& problem, const CompensateOptions& options) {
  auto weights = Compensate(problem.layout, problem.rows, problem.moments, options);
  EXPECT_TRUE(weights.ok()) << weights.status();
  return *std::move(weights);
}

struct Case {
  int channels, taps, n, max_code;
};

class CompensateTest : public ::testing::TestWithParam<Case> {};

TEST_P(CompensateTest, NoStepRaisesTheObjectiveAndTheFinalSweepRepairsRounding) {
  const auto [channels, taps, n, max_code] = GetParam();
  const Problem problem(channels, taps, n, 40, 11);
  for (bool other_scales : {false, true}) {
    CompensateOptions options;
    options.max_code = max_code;
    options.other_scales = other_scales;
    std::vector<double> objective;
    options.objective = &objective;
    MustCompensate(problem, options);
    ASSERT_EQ(objective.size(), 6u);
    const double slack = 1e-5 * objective[0];
    for (int i = 1; i <= 3; ++i) EXPECT_LE(objective[i], objective[i - 1] + slack) << "sweep " << i;
    EXPECT_LE(objective[5], objective[4] + slack);
    EXPECT_LT(objective[3], 0.99 * objective[0]);
  }
}

TEST_P(CompensateTest, OtherScalesEndInDeeperMinima) {
  const auto [channels, taps, n, max_code] = GetParam();
  const Problem problem(channels, taps, n, 40, 11);
  std::vector<double> one, several;
  CompensateOptions options;
  options.max_code = max_code;
  options.objective = &one;
  MustCompensate(problem, options);
  options.other_scales = true;
  options.objective = &several;
  MustCompensate(problem, options);
  EXPECT_LT(several.back(), one.back());
}

TEST_P(CompensateTest, CodesAndScalesStayOnTheGrid) {
  const auto [channels, taps, n, max_code] = GetParam();
  const Problem problem(channels, taps, n, 33, 12);
  CompensateOptions options;
  options.max_code = max_code;
  options.grid.max_scale = MaxScaleWithoutOverflow(channels * taps, max_code);
  const CodedWeights weights = MustCompensate(problem, options);
  ASSERT_EQ(weights.scales.size(), 33u * problem.layout.clusters());
  for (int8_t code : weights.codes) ASSERT_LE(std::abs(code), max_code);
  for (uint8_t scale : weights.scales) {
    ASSERT_GE(scale, 1);
    ASSERT_LE(scale, options.grid.max_scale);
  }
  for (float step : weights.steps) ASSERT_GT(step, 0);
}

TEST_P(CompensateTest, BeatsVarianceMatchingWhichBeatsNearestCodes) {
  const auto [channels, taps, n, max_code] = GetParam();
  const Problem problem(channels, taps, n, 24, 13);
  CompensateOptions options;
  options.max_code = max_code;
  const double compensated = problem.OutputError(MustCompensate(problem, options));
  const CodedWeights nearest =
      NearestWeights(problem.layout, 24, problem.rows, max_code, ScaleGrid{});
  const double direct = problem.OutputError(nearest);
  EXPECT_LT(compensated, 0.6 * direct);
  EXPECT_LT(compensated, 0.6 * problem.OutputError(nearest, true));
}

INSTANTIATE_TEST_SUITE_P(Shapes, CompensateTest,
                         ::testing::Values(Case{16, 9, 4, 1}, Case{24, 9, 16, 1}, Case{20, 9, 0, 1},
                                           Case{48, 1, 4, 1}, Case{17, 4, 5, 1}, Case{16, 9, 4, 7},
                                           Case{9, 9, 64, 7}, Case{130, 1, 64, 7}));

TEST(CompensateTest, AsymmetricTargetUndoesWhatTheInputLost) {
  const Problem problem(16, 4, 4, 24, 14, /*input_noise=*/0.5f);
  CompensateOptions options;
  options.max_code = 7;
  const double with = problem.OutputError(MustCompensate(problem, options));
  // The float weights are the best for what they themselves make of the damaged input.
  Moments plain(problem.layout.columns(), problem.outputs);
  std::vector<float> z(problem.outputs * problem.positions);
  for (int o = 0; o < problem.outputs; ++o) {
    for (int j = 0; j < problem.layout.columns(); ++j) {
      const float w = problem.rows[o * problem.layout.columns() + j];
      for (int64_t p = 0; p < problem.positions; ++p)
        z[o * problem.positions + p] += w * problem.x[j * problem.positions + p];
    }
  }
  std::vector<float> x = problem.x;
  plain.Add(problem.positions, x.data(), z.data());
  const auto weights = Compensate(problem.layout, problem.rows, plain, options);
  ASSERT_TRUE(weights.ok()) << weights.status();
  const double without = problem.OutputError(*weights);
  EXPECT_LT(with, 0.9 * without);
}

TEST(CompensateTest, ThreadsDoNotChangeTheResult) {
  const Problem problem(16, 9, 4, 100, 15);
  CompensateOptions options;
  const CodedWeights one = MustCompensate(problem, options);
  options.threads = 3;
  const CodedWeights three = MustCompensate(problem, options);
  EXPECT_EQ(one.codes, three.codes);
  EXPECT_EQ(one.scales, three.scales);
  EXPECT_EQ(one.steps, three.steps);
}

TEST(CompensateTest, ConstantInputsGiveWeightsClosestToTheFloatOnes) {
  const ClusterLayout layout = MakeClusterLayout(4, 1, 2);
  Moments moments(4, 1);
  std::vector<float> x(4 * 10, 0.0f), z(10, 1.0f);
  moments.Add(10, x.data(), z.data());
  const std::vector<float> rows = {0.5f, -0.25f, -0.5f, 0.25f};
  auto weights = Compensate(layout, rows, moments, CompensateOptions{});
  ASSERT_TRUE(weights.ok()) << weights.status();
  EXPECT_EQ(weights->codes, (std::vector<int8_t>{1, -1, -1, 1}));
}

// Whatever is left of their variance is rounding, however large they are.
TEST(CompensateTest, InputsThatHardlyChangeAreConstant) {
  constexpr int kColumns = 144, kOutputs = 8, kPositions = 5000;
  const ClusterLayout layout = MakeClusterLayout(16, 9, 4);
  for (const float size : {1e-6f, 0.1f, 1.0f, 300.0f}) {
    for (const float change : {0.0f, 1e-6f, 1e-5f, 1e-4f, 1e-3f, 2e-3f, 1e-2f}) {
      Normal normal(3);
      std::vector<float> rows(kOutputs * kColumns), mean(kColumns);
      for (float& v : rows) v = normal();
      for (float& v : mean) v = size * (1 + std::fabs(normal()));
      std::vector<float> x(kColumns * kPositions), z(kOutputs * kPositions);
      Moments moments(kColumns, kOutputs);
      for (int part = 0; part < 2; ++part) {
        for (size_t i = 0; i < x.size(); ++i) x[i] = mean[i / kPositions] * (1 + change * normal());
        for (float& v : z) v = size * normal();
        moments.Add(kPositions, x.data(), z.data());
      }
      CompensateOptions options;
      options.max_code = 7;
      const auto weights = Compensate(layout, rows, moments, options);
      ASSERT_TRUE(weights.ok()) << size << ", " << change << ": " << weights.status();
      if (change > 1e-6f) continue;
      double error = 0, energy = 0;
      for (int o = 0; o < kOutputs; ++o) {
        for (int g = 0; g < layout.clusters(); ++g) {
          for (int j = layout.begin[g]; j < layout.begin[g + 1]; ++j) {
            const double w = rows[o * kColumns + j];
            const double d = w - weights->alpha(layout, o, g) * weights->codes[o * kColumns + j];
            error += d * d;
            energy += w * w;
          }
        }
      }
      EXPECT_LT(error, 0.01 * energy) << size << ", " << change;
    }
  }
}

TEST(CompensateTest, CancelsBeforeTheWorkIsDone) {
  const Problem problem(16, 9, 4, 8, 16);
  std::atomic<bool> cancelled = true;
  CompensateOptions options;
  options.cancelled = &cancelled;
  EXPECT_EQ(Compensate(problem.layout, problem.rows, problem.moments, options).status().code(),
            absl::StatusCode::kCancelled);
}

TEST(MomentsTest, AreCovariancesOfTheColumns) {
  const Problem problem(5, 3, 2, 4, 17);
  const std::vector<double> h = problem.moments.InputCovariance();
  const std::vector<double> c = problem.moments.CrossCovariance();
  const int columns = 15;
  const auto mean = [&](const std::vector<float>& v, int row) {
    double sum = 0;
    for (int64_t p = 0; p < problem.positions; ++p) sum += v[row * problem.positions + p];
    return sum / problem.positions;
  };
  const auto covariance = [&](const std::vector<float>& a, int i, const std::vector<float>& b,
                              int j) {
    const double ma = mean(a, i), mb = mean(b, j);
    double sum = 0;
    for (int64_t p = 0; p < problem.positions; ++p) {
      sum += (a[i * problem.positions + p] - ma) * (b[j * problem.positions + p] - mb);
    }
    return sum / problem.positions;
  };
  for (int i = 0; i < columns; ++i) {
    for (int j = 0; j < columns; ++j)
      ASSERT_NEAR(h[i * columns + j], covariance(problem.x, i, problem.x, j), 1e-4);
    for (int o = 0; o < 4; ++o)
      ASSERT_NEAR(c[o * columns + i], covariance(problem.z, o, problem.x, i), 1e-4);
  }
  EXPECT_EQ(problem.moments.count(), problem.positions);
}

}  // namespace
}  // namespace tern::quant
