// Layer-wise error compensation: codes and scales that keep a layer's output, not its weights,
// close to the float network's, given the second moments of its quantised inputs.
//
// Follows GPTQ (Frantar et al. 2023) for the first assignment, with the scale of each cluster
// chosen from the weights as compensated so far, then coordinate descent over codes and scales.
// Everything is independent per output channel.
#ifndef TERN_SERVER_QUANT_COMPENSATE_H_
#define TERN_SERVER_QUANT_COMPENSATE_H_

#include <atomic>
#include <cstdint>
#include <vector>

#include "absl/status/statusor.h"
#include "absl/types/span.h"
#include "server/quant/weights.h"

namespace tern::quant {

// Second moments of a layer's input columns x [J] (im2col of the quantised input, in the order of a
// ClusterLayout) and of its wanted output z [O], over sampled positions. Centred, because biases
// are refitted.
class Moments {
 public:
  Moments(int columns, int outputs);

  // Adds `count` positions: x is [J, count], z [O, count], row-major; they are left less a constant
  // per row. Uses engine::Sgemm.
  void Add(int64_t count, float* x, float* z);

  // The same moments of the columns order[0], order[1], ..., a permutation.
  Moments Permuted(absl::Span<const int> order) const;

  // Means of x [J] and z [O].
  std::vector<double> InputMean() const;
  std::vector<double> OutputMean() const;

  // Mean square of an element of x.
  double InputPower() const;

  // H = cov(x, x), [J, J] symmetric.
  std::vector<double> InputCovariance() const;
  // cov(z, x), [O, J].
  std::vector<double> CrossCovariance() const;

  int columns() const { return columns_; }
  int outputs() const { return outputs_; }
  int64_t count() const { return count_; }

 private:
  std::vector<double> Means(const std::vector<double>& sums, const std::vector<float>& shift) const;

  int columns_, outputs_;
  int64_t count_ = 0;
  // The means of the first positions, which are taken from all: f32 sums of the squares of what
  // hardly changes would hold no variance.
  std::vector<float> x_shift_, z_shift_;
  std::vector<double> xx_, zx_, x_, z_;  // sums; the lower triangle of xx
  std::vector<float> product_;
};

struct CompensateOptions {
  int max_code = 1;
  ScaleGrid grid;
  // The sweeps before scales are rounded also descend from other scales of each cluster.
  bool other_scales = false;
  int threads = 1;
  const std::atomic<bool>* cancelled = nullptr;  // may be null
  // May be null. Receives tr((W - Q) H (W - Q)^T), with the damped H and the target W, after the
  // first assignment, after every sweep, after rounding of scales and after the last sweep. Slow;
  // for tests.
  std::vector<double>* objective = nullptr;
};

// `rows` [O, J] in the layout's order are the float weights. Chooses
//   target = W + (cov(z, x) - W H) (H + damping)^-1: what float weights would best turn the
//     quantised input into the wanted output (asymmetric target);
//   codes and scales that minimise tr((target - Q) H (target - Q)^T).
// Deterministic whatever the number of threads, as far as engine::Sgemm is. CANCELLED.
absl::StatusOr<CodedWeights> Compensate(const ClusterLayout& layout, absl::Span<const float> rows,
                                        const Moments& moments, const CompensateOptions& options);

}  // namespace tern::quant

#endif  // TERN_SERVER_QUANT_COMPENSATE_H_
