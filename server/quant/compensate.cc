#include "server/quant/compensate.h"

#include <algorithm>
#include <cmath>
#include <numeric>

#include "server/base/status_macros.h"
#include "server/engine/ops.h"
#include "server/quant/cholesky.h"

namespace tern::quant {
namespace {

// Rows that one thread takes at a time: fixed, so that results do not depend on the thread count.
constexpr int kRowBlock = 32;
// Updates within this many columns are applied at once, beyond them by one matrix product.
constexpr int kPanelColumns = 64;
// Scales of a cluster, as multiples of the one that descent has come to, from which it descends
// again.
constexpr float kOtherScales[] = {0.7f, 0.8f, 0.85f, 0.9f, 0.95f, 0.98f, 1.02f, 1.05f, 1.1f, 1.2f};
// Damping, that is what is added to the diagonal of H as a share of its mean, of the target's
// regression and of the search; and more of it per column and position.
constexpr double kTargetDamping = 0.05, kTargetScarcity = 1.0;
constexpr double kSearchDamping = 0.01, kSearchScarcity = 0.1;
constexpr int kSweeps = 3;  // of coordinate descent before scales are rounded; one more follows
// Inputs whose variance is less than this share of their mean square are constant: f32's rounding
// leaves about 1e-14, one code of 255 that once in 10,000 positions is another one 1e-9.
constexpr double kLeastVariance = 1e-10;

// Clusters first_cluster .. last_cluster - 1, columns begin .. end - 1.
struct Panel {
  int first_cluster, last_cluster, begin, end;
};

std::vector<Panel> MakePanels(const ClusterLayout& layout) {
  std::vector<Panel> panels;
  int g = 0;
  while (g < layout.clusters()) {
    Panel panel{g, g + 1, layout.begin[g], layout.begin[g + 1]};
    while (panel.last_cluster < layout.clusters() && panel.end - panel.begin < kPanelColumns) {
      panel.end = layout.begin[++panel.last_cluster];
    }
    g = panel.last_cluster;
    panels.push_back(panel);
  }
  return panels;
}

// target [j] -= factor * source [j]
inline void SubtractScaled(float factor, const float* source, int64_t count, float* target) {
  for (int64_t i = 0; i < count; ++i) target[i] -= factor * source[i];
}

// The state of one layer's search. R = (target - Q) H is kept up to date by every step of descent.
class Search {
 public:
  Search(const ClusterLayout& layout, int outputs, std::vector<float> target, std::vector<float> h,
         const CompensateOptions& options)
      : layout_(layout),
        panels_(MakePanels(layout)),
        outputs_(outputs),
        columns_(layout.columns()),
        clusters_(layout.clusters()),
        options_(options),
        target_(std::move(target)),
        h_(std::move(h)),
        residual_(target_.size()),
        alpha_(static_cast<size_t>(outputs) * clusters_) {
    weights_.outputs = outputs;
    weights_.codes.resize(target_.size());
    double trace = 0;
    for (int j = 0; j < columns_; ++j) trace += h_[At(j, j)];
    smallest_curvature_ = static_cast<float>(1e-12 * trace / columns_);
  }

  // First assignment; u from InverseCholeskyUpper of H.
  absl::Status Assign(const std::vector<float>& u) {
    return ForRowBlocks([&](int row, int rows) { AssignRows(u, row, rows); });
  }

  // R from scratch.
  absl::Status ComputeResidual() {
    return ForRowBlocks([&](int row, int rows) {
      std::vector<float> difference(static_cast<size_t>(rows) * columns_);
      for (int r = 0; r < rows; ++r) {
        for (int g = 0; g < clusters_; ++g) {
          const float alpha = alpha_[static_cast<size_t>(row + r) * clusters_ + g];
          for (int j = layout_.begin[g]; j < layout_.begin[g + 1]; ++j) {
            difference[At(r, j)] = target_[At(row + r, j)] - alpha * weights_.codes[At(row + r, j)];
          }
        }
      }
      engine::Sgemm(false, false, rows, columns_, columns_, 1.0f, difference.data(), columns_,
                    h_.data(), columns_, 0.0f, &residual_[At(row, 0)], columns_);
    });
  }

  // Best code of each weight in turn, then the best scale of each cluster; on_grid: among the
  // grid's scales.
  absl::Status Sweep(bool on_grid) {
    return ForRowBlocks([&](int row, int rows) { SweepRows(on_grid, row, rows); });
  }

  void RoundScalesToGrid() {
    RoundScales(options_.grid, clusters_, alpha_, weights_);
    for (int o = 0; o < outputs_; ++o) {
      for (int g = 0; g < clusters_; ++g)
        alpha_[static_cast<size_t>(o) * clusters_ + g] = weights_.alpha(layout_, o, g);
    }
  }

  double Objective() const {
    double sum = 0;
    std::vector<double> error(columns_);
    for (int o = 0; o < outputs_; ++o) {
      for (int g = 0; g < clusters_; ++g) {
        const float alpha = alpha_[static_cast<size_t>(o) * clusters_ + g];
        for (int j = layout_.begin[g]; j < layout_.begin[g + 1]; ++j) {
          error[j] = static_cast<double>(target_[At(o, j)]) -
                     static_cast<double>(alpha) * weights_.codes[At(o, j)];
        }
      }
      for (int i = 0; i < columns_; ++i) {
        double product = 0;
        for (int j = 0; j < columns_; ++j) product += h_[At(i, j)] * error[j];
        sum += error[i] * product;
      }
    }
    return sum;
  }

  CodedWeights TakeWeights() { return std::move(weights_); }

 private:
  size_t At(int64_t row, int64_t column) const {
    return static_cast<size_t>(row) * columns_ + column;
  }

  bool Cancelled() const {
    return options_.cancelled != nullptr && options_.cancelled->load(std::memory_order_relaxed);
  }

  template <typename F>
  absl::Status ForRowBlocks(const F& work) {
    const int blocks = (outputs_ + kRowBlock - 1) / kRowBlock;
#pragma omp parallel for num_threads(options_.threads) schedule(dynamic)
    for (int block = 0; block < blocks; ++block) {
      const int row = block * kRowBlock;
      if (!Cancelled()) work(row, std::min(kRowBlock, outputs_ - row));
    }
    if (Cancelled()) return absl::CancelledError("quantisation cancelled");
    return absl::OkStatus();
  }

  void AssignRows(const std::vector<float>& u, int row, int rows) {
    const int max_code = options_.max_code;
    std::vector<float> v(&target_[At(row, 0)],
                         &target_[At(row, 0)] + static_cast<size_t>(rows) * columns_);
    std::vector<float> error;
    for (const Panel& panel : panels_) {
      if (Cancelled()) return;
      const int width = panel.end - panel.begin;
      error.assign(static_cast<size_t>(rows) * width, 0.0f);
      for (int g = panel.first_cluster; g < panel.last_cluster; ++g) {
        const int begin = layout_.begin[g], end = layout_.begin[g + 1];
        for (int r = 0; r < rows; ++r) {
          alpha_[static_cast<size_t>(row + r) * clusters_ + g] =
              InitialScale(absl::MakeConstSpan(&v[At(r, begin)], end - begin), max_code);
        }
        for (int j = begin; j < end; ++j) {
          const float* u_row = &u[At(j, 0)];
          const float inverse_pivot = 1.0f / u_row[j];
          for (int r = 0; r < rows; ++r) {
            const float alpha = alpha_[static_cast<size_t>(row + r) * clusters_ + g];
            float* v_row = &v[At(r, 0)];
            const int code = NearestCode(v_row[j], alpha, max_code);
            weights_.codes[At(row + r, j)] = static_cast<int8_t>(code);
            const float e = (v_row[j] - alpha * static_cast<float>(code)) * inverse_pivot;
            error[static_cast<size_t>(r) * width + j - panel.begin] = e;
            SubtractScaled(e, u_row + j + 1, panel.end - j - 1, v_row + j + 1);
          }
        }
      }
      if (panel.end < columns_) {
        engine::Sgemm(false, false, rows, columns_ - panel.end, width, -1.0f, error.data(), width,
                      &u[At(panel.begin, panel.end)], columns_, 1.0f, &v[panel.end], columns_);
      }
    }
  }

  void SweepRows(bool on_grid, int row, int rows) {
    std::vector<float> delta, product;
    Restart restart;
    for (const Panel& panel : panels_) {
      if (Cancelled()) return;
      const int width = panel.end - panel.begin;
      delta.resize(static_cast<size_t>(rows) * width);
      product.resize(width);
      for (int r = 0; r < rows; ++r) {
        float* change = &delta[static_cast<size_t>(r) * width];
        AddPanelWeights(panel, row + r, -1.0f, true, change);
        for (int g = panel.first_cluster; g < panel.last_cluster; ++g) {
          SweepCodes(panel, row + r, g);
          RefitScale(panel, row + r, g, on_grid, product);
          if (!on_grid && options_.other_scales)
            TryOtherScales(panel, row + r, g, product, restart);
        }
        AddPanelWeights(panel, row + r, 1.0f, false, change);
      }
      if (panel.begin > 0) {
        engine::Sgemm(false, false, rows, panel.begin, width, -1.0f, delta.data(), width,
                      &h_[At(panel.begin, 0)], columns_, 1.0f, &residual_[At(row, 0)], columns_);
      }
      if (panel.end < columns_) {
        engine::Sgemm(false, false, rows, columns_ - panel.end, width, -1.0f, delta.data(), width,
                      &h_[At(panel.begin, panel.end)], columns_, 1.0f,
                      &residual_[At(row, panel.end)], columns_);
      }
    }
  }

  // sum (or `assign`) sign * Q over the panel's columns of row o.
  void AddPanelWeights(const Panel& panel, int o, float sign, bool assign, float* out) const {
    for (int g = panel.first_cluster; g < panel.last_cluster; ++g) {
      const float alpha = sign * alpha_[static_cast<size_t>(o) * clusters_ + g];
      for (int j = layout_.begin[g]; j < layout_.begin[g + 1]; ++j) {
        const float value = alpha * weights_.codes[At(o, j)];
        float& target = out[j - panel.begin];
        target = assign ? value : target + value;
      }
    }
  }

  // With the others fixed the best real value of weight j is q_j + R_j / H_jj.
  void SweepCodes(const Panel& panel, int o, int g) {
    const float alpha = alpha_[static_cast<size_t>(o) * clusters_ + g];
    const float limit = static_cast<float>(options_.max_code);
    float* residual = &residual_[At(o, 0)];
    int8_t* codes = &weights_.codes[At(o, 0)];
    for (int j = layout_.begin[g]; j < layout_.begin[g + 1]; ++j) {
      const float code = codes[j];
      const float best = RoundInto(code + residual[j] / (h_[At(j, j)] * alpha), -limit, limit);
      if (best == code) continue;
      codes[j] = static_cast<int8_t>(best);
      SubtractScaled((best - code) * alpha, &h_[At(j, panel.begin)], panel.end - panel.begin,
                     residual + panel.begin);
    }
  }

  void RefitScale(const Panel& panel, int o, int g, bool on_grid, std::vector<float>& product) {
    const int8_t* codes = &weights_.codes[At(o, 0)];
    float* residual = &residual_[At(o, 0)];
    std::fill(product.begin(), product.end(), 0.0f);
    float slope = 0;
    for (int j = layout_.begin[g]; j < layout_.begin[g + 1]; ++j) {
      if (codes[j] == 0) continue;
      slope += codes[j] * residual[j];
      SubtractScaled(-static_cast<float>(codes[j]), &h_[At(j, panel.begin)],
                     panel.end - panel.begin, product.data());
    }
    float curvature = 0;
    for (int j = layout_.begin[g]; j < layout_.begin[g + 1]; ++j)
      curvature += codes[j] * product[j - panel.begin];
    if (!(curvature > smallest_curvature_)) return;
    float& alpha = alpha_[static_cast<size_t>(o) * clusters_ + g];
    float refitted = alpha + slope / curvature;
    if (on_grid) {
      const float step = weights_.steps[o];
      const float scale =
          RoundInto(refitted / step, 1.0f, static_cast<float>(options_.grid.max_scale));
      weights_.scales[static_cast<size_t>(o) * clusters_ + g] = static_cast<uint8_t>(scale);
      refitted = scale * step;
    } else if (!(refitted > 0.1f * alpha)) {
      return;  // a scale never changes sign, and never collapses in one step
    }
    SubtractScaled(refitted - alpha, product.data(), panel.end - panel.begin,
                   residual + panel.begin);
    alpha = refitted;
  }

  // The state of one row's cluster.
  struct ClusterState {
    float alpha = 0;
    std::vector<int8_t> codes;    // of the cluster
    std::vector<float> residual;  // of the panel
  };
  struct Restart {
    ClusterState start, best;
  };

  void Save(const Panel& panel, int o, int g, ClusterState& state) const {
    const int8_t* codes = &weights_.codes[At(o, 0)];
    const float* residual = &residual_[At(o, 0)];
    state.alpha = alpha_[static_cast<size_t>(o) * clusters_ + g];
    state.codes.assign(codes + layout_.begin[g], codes + layout_.begin[g + 1]);
    state.residual.assign(residual + panel.begin, residual + panel.end);
  }

  void Load(const Panel& panel, int o, int g, const ClusterState& state) {
    alpha_[static_cast<size_t>(o) * clusters_ + g] = state.alpha;
    std::copy(state.codes.begin(), state.codes.end(), &weights_.codes[At(o, layout_.begin[g])]);
    std::copy(state.residual.begin(), state.residual.end(), &residual_[At(o, panel.begin)]);
  }

  // Steps of one code or one scale at a time end in one of many local minima. Descends from other
  // scales of the cluster as well, and keeps the best end.
  void TryOtherScales(const Panel& panel, int o, int g, std::vector<float>& product,
                      Restart& restart) {
    const int begin = layout_.begin[g], size = layout_.begin[g + 1] - begin;
    int8_t* codes = &weights_.codes[At(o, begin)];
    float* residual = &residual_[At(o, 0)];
    float& alpha = alpha_[static_cast<size_t>(o) * clusters_ + g];
    Save(panel, o, g, restart.start);
    const ClusterState& start = restart.start;
    double least = 0;
    for (float factor : kOtherScales) {
      // The same codes times another scale, then descent.
      std::fill(product.begin(), product.end(), 0.0f);
      for (int j = 0; j < size; ++j) {
        if (codes[j] != 0) {
          SubtractScaled(-static_cast<float>(codes[j]), &h_[At(begin + j, panel.begin)],
                         panel.end - panel.begin, product.data());
        }
      }
      alpha = factor * start.alpha;
      SubtractScaled(alpha - start.alpha, product.data(), panel.end - panel.begin,
                     residual + panel.begin);
      SweepCodes(panel, o, g);
      RefitScale(panel, o, g, false, product);
      SweepCodes(panel, o, g);
      // With d the change of the cluster's weights the objective changes by d H d - 2 d R, which
      // is -d (R + R') for R' = R - d H.
      double change = 0;
      for (int j = 0; j < size; ++j) {
        const float d = alpha * codes[j] - start.alpha * start.codes[j];
        change -= static_cast<double>(d) *
                  (start.residual[begin + j - panel.begin] + residual[begin + j]);
      }
      if (change < least) {
        least = change;
        Save(panel, o, g, restart.best);
      }
      Load(panel, o, g, start);
    }
    if (least < 0) Load(panel, o, g, restart.best);
  }

  const ClusterLayout& layout_;
  const std::vector<Panel> panels_;
  const int outputs_, columns_, clusters_;
  const CompensateOptions& options_;
  const std::vector<float> target_, h_;
  std::vector<float> residual_, alpha_;
  float smallest_curvature_ = 0;
  CodedWeights weights_;
};

}  // namespace

Moments::Moments(int columns, int outputs)
    : columns_(columns),
      outputs_(outputs),
      x_shift_(columns),
      z_shift_(outputs),
      xx_(static_cast<size_t>(columns) * columns),
      zx_(static_cast<size_t>(outputs) * columns),
      x_(columns),
      z_(outputs) {}

void Moments::Add(int64_t count, float* x, float* z) {
  const bool first = count_ == 0;
  const auto centre = [&](float* values, std::vector<float>& shift, std::vector<double>& sums) {
    for (size_t j = 0; j < shift.size(); ++j) {
      float* row = values + j * count;
      if (first) shift[j] = static_cast<float>(std::accumulate(row, row + count, 0.0) / count);
      double sum = 0;
      for (int64_t i = 0; i < count; ++i) {
        row[i] -= shift[j];
        sum += row[i];
      }
      sums[j] += sum;
    }
  };
  centre(x, x_shift_, x_);
  centre(z, z_shift_, z_);
  constexpr int kRows = 256;
  product_.resize(static_cast<size_t>(std::max(outputs_, kRows)) * columns_);
  for (int row = 0; row < columns_; row += kRows) {
    const int rows = std::min(kRows, columns_ - row);
    const int width = row + rows;
    engine::Sgemm(false, true, rows, width, count, 1.0f, x + row * count, count, x, count, 0.0f,
                  product_.data(), width);
    for (int r = 0; r < rows; ++r) {
      double* sums = &xx_[static_cast<size_t>(row + r) * columns_];
      const float* products = &product_[static_cast<size_t>(r) * width];
      for (int j = 0; j <= row + r; ++j) sums[j] += products[j];
    }
  }
  engine::Sgemm(false, true, outputs_, columns_, count, 1.0f, z, count, x, count, 0.0f,
                product_.data(), columns_);
  for (size_t i = 0; i < zx_.size(); ++i) zx_[i] += product_[i];
  count_ += count;
}

Moments Moments::Permuted(absl::Span<const int> order) const {
  Moments result(columns_, outputs_);
  result.count_ = count_;
  result.z_ = z_;
  result.z_shift_ = z_shift_;
  for (int i = 0; i < columns_; ++i) {
    result.x_[i] = x_[order[i]];
    result.x_shift_[i] = x_shift_[order[i]];
    for (int j = 0; j <= i; ++j) {
      const auto [low, high] = std::minmax(order[i], order[j]);
      result.xx_[static_cast<size_t>(i) * columns_ + j] =
          xx_[static_cast<size_t>(high) * columns_ + low];
    }
    for (int o = 0; o < outputs_; ++o) {
      result.zx_[static_cast<size_t>(o) * columns_ + i] =
          zx_[static_cast<size_t>(o) * columns_ + order[i]];
    }
  }
  return result;
}

std::vector<double> Moments::Means(const std::vector<double>& sums,
                                   const std::vector<float>& shift) const {
  std::vector<double> mean(shift.begin(), shift.end());
  for (size_t j = 0; j < mean.size(); ++j)
    mean[j] += sums[j] / static_cast<double>(std::max<int64_t>(count_, 1));
  return mean;
}

std::vector<double> Moments::InputMean() const { return Means(x_, x_shift_); }

std::vector<double> Moments::OutputMean() const { return Means(z_, z_shift_); }

double Moments::InputPower() const {
  const double n = static_cast<double>(std::max<int64_t>(count_, 1));
  double sum = 0;
  for (int j = 0; j < columns_; ++j) {
    const double shift = x_shift_[j];
    sum += xx_[static_cast<size_t>(j) * columns_ + j] / n + shift * (2 * x_[j] / n + shift);
  }
  return sum / columns_;
}

std::vector<double> Moments::InputCovariance() const {
  const double n = static_cast<double>(std::max<int64_t>(count_, 1));
  std::vector<double> h(xx_.size());
  for (int i = 0; i < columns_; ++i) {
    for (int j = 0; j <= i; ++j) {
      const double value =
          xx_[static_cast<size_t>(i) * columns_ + j] / n - (x_[i] / n) * (x_[j] / n);
      h[static_cast<size_t>(i) * columns_ + j] = value;
      h[static_cast<size_t>(j) * columns_ + i] = value;
    }
  }
  return h;
}

std::vector<double> Moments::CrossCovariance() const {
  const double n = static_cast<double>(std::max<int64_t>(count_, 1));
  std::vector<double> c(zx_.size());
  for (int o = 0; o < outputs_; ++o) {
    for (int j = 0; j < columns_; ++j) {
      c[static_cast<size_t>(o) * columns_ + j] =
          zx_[static_cast<size_t>(o) * columns_ + j] / n - (z_[o] / n) * (x_[j] / n);
    }
  }
  return c;
}

absl::StatusOr<CodedWeights> Compensate(const ClusterLayout& layout, absl::Span<const float> rows,
                                        const Moments& moments, const CompensateOptions& options) {
  const int columns = layout.columns();
  const int outputs = moments.outputs();
  std::vector<double> h = moments.InputCovariance();
  double mean_diagonal = 0;
  for (int j = 0; j < columns; ++j) mean_diagonal += h[static_cast<size_t>(j) * columns + j];
  mean_diagonal /= columns;
  const double power = moments.InputPower();
  if (!(mean_diagonal > kLeastVariance * power)) {
    // Constant inputs say nothing about which weights matter: all alike.
    std::fill(h.begin(), h.end(), 0.0);
    mean_diagonal = power > 0 ? power : 1.0;
  }

  // With fewer positions than columns H has directions without any variance, in which the target
  // would fit noise and codes would be free: what looks perfect on the calibration images is not on
  // others.
  const double scarcity =
      static_cast<double>(columns) / static_cast<double>(std::max<int64_t>(moments.count(), 1));
  const double target_damping = kTargetDamping + kTargetScarcity * scarcity;
  const double damping = kSearchDamping + kSearchScarcity * scarcity;

  std::vector<float> target(rows.begin(), rows.end());
  {
    std::vector<float> product(target.size());
    {
      const std::vector<float> h_float(h.begin(), h.end());
      engine::Sgemm(false, false, outputs, columns, columns, 1.0f, rows.data(), columns,
                    h_float.data(), columns, 0.0f, product.data(), columns);
    }
    std::vector<double> correction = moments.CrossCovariance();
    for (size_t i = 0; i < correction.size(); ++i) correction[i] -= product[i];
    std::vector<double> factor = h;
    for (int j = 0; j < columns; ++j)
      factor[static_cast<size_t>(j) * columns + j] += target_damping * mean_diagonal;
    TERN_RETURN_IF_ERROR(CholeskyInPlace(columns, factor, options.threads, options.cancelled));
    TERN_RETURN_IF_ERROR(CholeskySolveRows(columns, factor, outputs, correction, options.threads,
                                           options.cancelled));
    for (size_t i = 0; i < target.size(); ++i) target[i] += static_cast<float>(correction[i]);
  }

  for (int j = 0; j < columns; ++j)
    h[static_cast<size_t>(j) * columns + j] += damping * mean_diagonal;
  std::vector<float> u;
  TERN_RETURN_IF_ERROR(InverseCholeskyUpper(columns, h, options.threads, options.cancelled, u));
  Search search(layout, outputs, std::move(target), std::vector<float>(h.begin(), h.end()),
                options);
  h = std::vector<double>();
  const auto trace = [&] {
    if (options.objective != nullptr) options.objective->push_back(search.Objective());
  };
  TERN_RETURN_IF_ERROR(search.Assign(u));
  u = std::vector<float>();
  TERN_RETURN_IF_ERROR(search.ComputeResidual());
  trace();
  for (int i = 0; i < kSweeps; ++i) {
    TERN_RETURN_IF_ERROR(search.Sweep(/*on_grid=*/false));
    trace();
  }
  search.RoundScalesToGrid();
  TERN_RETURN_IF_ERROR(search.ComputeResidual());
  trace();
  TERN_RETURN_IF_ERROR(search.Sweep(/*on_grid=*/true));
  trace();
  return search.TakeWeights();
}

}  // namespace tern::quant
