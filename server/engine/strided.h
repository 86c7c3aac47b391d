// Loops over strided tensors: one implementation for every memory layout.
#ifndef TERN_SERVER_ENGINE_STRIDED_H_
#define TERN_SERVER_ENGINE_STRIDED_H_

#include <algorithm>
#include <array>
#include <cstdint>
#include <numeric>
#include <vector>

#include "server/tensor/shape.h"

namespace tern::engine {

using Strides = std::vector<int64_t>;

// Strides in elements of a dense tensor of `shape`, last dimension fastest.
inline Strides RowMajorStrides(const Shape& shape) {
  Strides strides(shape.rank());
  int64_t step = 1;
  for (int i = shape.rank() - 1; i >= 0; --i) {
    strides[i] = step;
    step *= shape[i];
  }
  return strides;
}

// Strides of a sample as the engine lays it out: [c,h,w] in NHWC order, other ranks row-major.
inline Strides NhwcStrides(const Shape& shape) {
  if (shape.rank() != 3) return RowMajorStrides(shape);
  return {1, shape[2] * shape[0], shape[0]};
}

// Calls fn(offsets, count, steps) for each row of an index space: K tensors of common extents
// `dims`, the i-th with strides[i]; a row runs along the dimension in which tensor 0 moves least.
// offsets and steps are int64_t[K]. Rows are spread over the OpenMP team of the caller.
template <size_t K, typename Fn>
void ForEachRow(const std::vector<int64_t>& dims, const std::array<Strides, K>& strides, Fn fn) {
  std::vector<int> order(dims.size());
  std::iota(order.begin(), order.end(), 0);
  std::stable_sort(order.begin(), order.end(),
                   [&](int a, int b) { return strides[0][a] > strides[0][b]; });
  // Neighbouring dimensions that every tensor walks without a gap become one; extents of 1 vanish.
  std::vector<int64_t> extent;
  std::array<Strides, K> step;
  for (int d : order) {
    if (dims[d] == 0) return;
    if (dims[d] == 1) continue;
    bool merge = !extent.empty();
    for (size_t k = 0; k < K && merge; ++k) merge = step[k].back() == strides[k][d] * dims[d];
    if (merge) {
      extent.back() *= dims[d];
      for (size_t k = 0; k < K; ++k) step[k].back() = strides[k][d];
    } else {
      extent.push_back(dims[d]);
      for (size_t k = 0; k < K; ++k) step[k].push_back(strides[k][d]);
    }
  }
  if (extent.empty()) {
    extent.push_back(1);
    for (size_t k = 0; k < K; ++k) step[k].push_back(0);
  }
  const int outer_rank = static_cast<int>(extent.size()) - 1;
  int64_t rows = 1;
  for (int i = 0; i < outer_rank; ++i) rows *= extent[i];
  const int64_t count = extent.back();
  std::array<int64_t, K> inner;
  for (size_t k = 0; k < K; ++k) inner[k] = step[k].back();
#pragma omp parallel for schedule(static) if (rows > 1 && rows * count > 16384)
  for (int64_t row = 0; row < rows; ++row) {
    std::array<int64_t, K> offset{};
    int64_t rest = row;
    for (int i = outer_rank - 1; i >= 0; --i) {
      const int64_t index = rest % extent[i];
      rest /= extent[i];
      for (size_t k = 0; k < K; ++k) offset[k] += index * step[k][i];
    }
    fn(offset.data(), count, inner.data());
  }
}

// dst[i...] = map(src[i...])
template <typename D, typename S, typename Map>
void StridedMap(const std::vector<int64_t>& dims, D* dst, const Strides& dst_strides, const S* src,
                const Strides& src_strides, Map map) {
  ForEachRow<2>(dims, {dst_strides, src_strides},
                [&](const int64_t* offset, int64_t count, const int64_t* step) {
                  D* d = dst + offset[0];
                  const S* s = src + offset[1];
                  if (step[0] == 1 && step[1] == 1) {
                    for (int64_t i = 0; i < count; ++i) d[i] = map(s[i]);
                  } else {
                    for (int64_t i = 0; i < count; ++i) d[i * step[0]] = map(s[i * step[1]]);
                  }
                });
}

}  // namespace tern::engine

#endif  // TERN_SERVER_ENGINE_STRIDED_H_
