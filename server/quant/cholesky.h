// Factorisations of large symmetric positive definite matrices that can be cancelled midway.
#ifndef TERN_SERVER_QUANT_CHOLESKY_H_
#define TERN_SERVER_QUANT_CHOLESKY_H_

#include <atomic>
#include <vector>

#include "absl/status/status.h"

namespace tern::quant {

// `a` [n, n] row-major, symmetric positive definite (the lower triangle is read) becomes its lower
// Cholesky factor L, a = L L^T; the upper triangle is set to 0.
// FAILED_PRECONDITION if a pivot is not positive; CANCELLED within about a second of *cancelled
// (may be null).
absl::Status CholeskyInPlace(int n, std::vector<double>& a, int threads,
                             const std::atomic<bool>* cancelled);

// Solves L L^T X = B in place; `b` holds the columns of B as its rows: [m, n] row-major.
absl::Status CholeskySolveRows(int n, const std::vector<double>& l, int m, std::vector<double>& b,
                               int threads, const std::atomic<bool>* cancelled);

// The upper triangular U [n, n], float, with inverse(a) = U^T U.
absl::Status InverseCholeskyUpper(int n, const std::vector<double>& a, int threads,
                                  const std::atomic<bool>* cancelled, std::vector<float>& u);

}  // namespace tern::quant

#endif  // TERN_SERVER_QUANT_CHOLESKY_H_
