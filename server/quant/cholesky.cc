#include "server/quant/cholesky.h"

#include <algorithm>

#include "Eigen/Core"
#include "absl/strings/str_cat.h"
#include "server/base/status_macros.h"

namespace tern::quant {
namespace {

using Matrix = Eigen::Matrix<double, Eigen::Dynamic, Eigen::Dynamic, Eigen::RowMajor>;
using Map = Eigen::Map<Matrix>;
using ConstMap = Eigen::Map<const Matrix>;

// Columns eliminated at a time. The largest step, n * n * kPanel multiplications, stays below a
// second.
constexpr int kPanel = 64;
constexpr int kRowBlock = 128;

bool Cancelled(const std::atomic<bool>* cancelled) {
  return cancelled != nullptr && cancelled->load(std::memory_order_relaxed);
}

}  // namespace

absl::Status CholeskyInPlace(int n, std::vector<double>& a, int threads,
                             const std::atomic<bool>* cancelled) {
  Map m(a.data(), n, n);
  for (int k = 0; k < n; k += kPanel) {
    if (Cancelled(cancelled)) return absl::CancelledError("quantisation cancelled");
    const int width = std::min(kPanel, n - k);
    for (int j = k; j < k + width; ++j) {
      double pivot = m(j, j) - m.row(j).segment(k, j - k).squaredNorm();
      if (!(pivot > 0)) {
        return absl::FailedPreconditionError(
            absl::StrCat("covariance is not positive definite at column ", j));
      }
      pivot = std::sqrt(pivot);
      m(j, j) = pivot;
      for (int i = j + 1; i < k + width; ++i) {
        m(i, j) = (m(i, j) - m.row(i).segment(k, j - k).dot(m.row(j).segment(k, j - k))) / pivot;
      }
    }
    const int next = k + width;
    const int blocks = (n - next + kRowBlock - 1) / kRowBlock;
    const Matrix diagonal = m.block(k, k, width, width);
#pragma omp parallel for num_threads(threads) schedule(dynamic)
    for (int block = 0; block < blocks; ++block) {
      const int row = next + block * kRowBlock;
      const int rows = std::min(kRowBlock, n - row);
      // X D^T = B, that is D X^T = B^T.
      Matrix transposed = m.block(row, k, rows, width).transpose();
      diagonal.triangularView<Eigen::Lower>().solveInPlace(transposed);
      m.block(row, k, rows, width) = transposed.transpose();
    }
#pragma omp parallel for num_threads(threads) schedule(dynamic)
    for (int block = 0; block < blocks; ++block) {
      const int row = next + block * kRowBlock;
      const int rows = std::min(kRowBlock, n - row);
      const int columns = row + rows - next;
      m.block(row, next, rows, columns).noalias() -=
          m.block(row, k, rows, width) * m.block(next, k, columns, width).transpose();
    }
  }
  m.triangularView<Eigen::StrictlyUpper>().setZero();
  return absl::OkStatus();
}

absl::Status CholeskySolveRows(int n, const std::vector<double>& l, int m, std::vector<double>& b,
                               int threads, const std::atomic<bool>* cancelled) {
  const ConstMap lower(l.data(), n, n);
  Map rhs(b.data(), m, n);
  constexpr int kRows = 16;
  const int blocks = (m + kRows - 1) / kRows;
#pragma omp parallel for num_threads(threads) schedule(dynamic)
  for (int block = 0; block < blocks; ++block) {
    if (Cancelled(cancelled)) continue;
    const int row = block * kRows;
    const int rows = std::min(kRows, m - row);
    Matrix x = rhs.middleRows(row, rows).transpose();
    lower.triangularView<Eigen::Lower>().solveInPlace(x);
    lower.transpose().triangularView<Eigen::Upper>().solveInPlace(x);
    rhs.middleRows(row, rows) = x.transpose();
  }
  if (Cancelled(cancelled)) return absl::CancelledError("quantisation cancelled");
  return absl::OkStatus();
}

absl::Status InverseCholeskyUpper(int n, const std::vector<double>& a, int threads,
                                  const std::atomic<bool>* cancelled, std::vector<float>& u) {
  // With P the reversal of order and P a P = L L^T: a = (P L P)(P L P)^T with P L P upper
  // triangular, so U = P L^-1 P.
  std::vector<double> reversed(static_cast<size_t>(n) * n);
  const ConstMap source(a.data(), n, n);
  Map l(reversed.data(), n, n);
  // The lower triangle of P a P is the reversed upper triangle of a.
  for (int i = 0; i < n; ++i) {
    for (int j = 0; j <= i; ++j) l(i, j) = source(n - 1 - i, n - 1 - j);
  }
  TERN_RETURN_IF_ERROR(CholeskyInPlace(n, reversed, threads, cancelled));
  u.assign(static_cast<size_t>(n) * n, 0.0f);
  constexpr int kColumns = 32;
  const int blocks = (n + kColumns - 1) / kColumns;
#pragma omp parallel for num_threads(threads) schedule(dynamic)
  for (int block = 0; block < blocks; ++block) {
    if (Cancelled(cancelled)) continue;
    const int column = block * kColumns;
    const int columns = std::min(kColumns, n - column);
    const int rows = n - column;  // above, L^-1 is zero
    Matrix x = Matrix::Zero(rows, columns);
    x.topRows(columns).setIdentity();
    l.bottomRightCorner(rows, rows).triangularView<Eigen::Lower>().solveInPlace(x);
    for (int i = 0; i < rows; ++i) {
      for (int j = 0; j < columns; ++j) {
        if (j > i) break;
        u[static_cast<size_t>(rows - 1 - i) * n + (n - 1 - column - j)] =
            static_cast<float>(x(i, j));
      }
    }
  }
  if (Cancelled(cancelled)) return absl::CancelledError("quantisation cancelled");
  return absl::OkStatus();
}

}  // namespace tern::quant
