// Loops over strided tensors: one implementation for every memory layout.
#ifndef TERN_SERVER_ENGINE_STRIDED_H_
#define TERN_SERVER_ENGINE_STRIDED_H_

#include <algorithm>
#include <array>
#include <cstdint>
#include <utility>

#include "server/engine/parallel.h"
#include "server/tensor/shape.h"

namespace tern::engine {

using Strides = Extents;

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
void ForEachRow(absl::Span<const int64_t> dims, const std::array<Strides, K>& strides, Fn fn) {
  // By falling stride; std::stable_sort would allocate.
  Extents order(dims.size());
  for (size_t i = 0; i < order.size(); ++i) {
    size_t at = i;
    for (; at > 0 && strides[0][order[at - 1]] < strides[0][i]; --at) order[at] = order[at - 1];
    order[at] = static_cast<int64_t>(i);
  }
  // Neighbouring dimensions that every tensor walks without a gap become one; extents of 1 vanish.
  Extents extent;
  std::array<Strides, K> step;
  for (int64_t d : order) {
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
  InRanges(rows, rows > 1 && rows * count > 16384, [&](int64_t begin_row, int64_t end_row) {
    for (int64_t row = begin_row; row < end_row; ++row) {
      std::array<int64_t, K> offset{};
      int64_t rest = row;
      if (outer_rank == 1) {  // no division, which would cost as much as a short row
        for (size_t k = 0; k < K; ++k) offset[k] = row * step[k][0];
      }
      for (int i = outer_rank - 1; i >= 0 && outer_rank > 1; --i) {
        const int64_t index = rest % extent[i];
        rest /= extent[i];
        for (size_t k = 0; k < K; ++k) offset[k] += index * step[k][i];
      }
      fn(offset.data(), count, inner.data());
    }
  });
}

// dst[i...] = map(src[i...])
template <typename D, typename S, typename Map>
void StridedMap(absl::Span<const int64_t> dims, D* dst, const Strides& dst_strides, const S* src,
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
