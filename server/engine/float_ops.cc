#include "server/engine/float_ops.h"

#include <cstring>
#include <limits>

#include "absl/strings/str_cat.h"

namespace tern::engine {
namespace {

using graph::Node;
using graph::OpType;
using Input = Operand<const float>;
using Output = Operand<float>;

Extents BatchDims(int64_t batch, const Shape& shape) { return shape.extents().Behind(batch); }

float Clamp(const Node& node, float v) {
  return node.clip ? std::min(std::max(v, node.clip->lo), node.clip->hi) : v;
}

template <typename Map>
void Unary(const Input& x, const Output& y, int64_t batch, Map map) {
  StridedMap(BatchDims(batch, y.shape), y.data, WithBatch(y.batch_stride, y.strides), x.data,
             WithBatch(x.batch_stride, x.strides), map);
}

// Strides of `x` for an output of `shape`, aligned at the last dimension; 0 along broadcast
// dimensions.
Strides BroadcastStrides(const Input& x, const Shape& shape) {
  Strides strides(shape.rank(), 0);
  const int shift = shape.rank() - x.shape.rank();
  for (int i = std::max(0, -shift); i < x.shape.rank(); ++i) {
    if (x.shape[i] != 1) strides[i + shift] = x.strides[i];
  }
  return strides;
}

template <typename Map>
void Binary(const Input& a, const Input& b, const Output& y, int64_t batch, Map map) {
  ForEachRow<3>(BatchDims(batch, y.shape),
                {WithBatch(y.batch_stride, y.strides),
                 WithBatch(a.batch_stride, BroadcastStrides(a, y.shape)),
                 WithBatch(b.batch_stride, BroadcastStrides(b, y.shape))},
                [&](const int64_t* offset, int64_t count, const int64_t* step) {
                  float* d = y.data + offset[0];
                  const float* p = a.data + offset[1];
                  const float* q = b.data + offset[2];
                  if (step[0] == 1 && step[1] == 1 && step[2] == 1) {
                    for (int64_t i = 0; i < count; ++i) d[i] = map(p[i], q[i]);
                  } else if (step[0] == 1 && step[1] == 1 && step[2] == 0) {
                    const float v = q[0];
                    for (int64_t i = 0; i < count; ++i) d[i] = map(p[i], v);
                  } else {
                    for (int64_t i = 0; i < count; ++i)
                      d[i * step[0]] = map(p[i * step[1]], q[i * step[2]]);
                  }
                });
}

void BatchNorm(const Node& node, const Input& x, const Output& y, int64_t batch) {
  const float* scale = node.weight.data<float>().data();
  const float* shift = node.bias.data<float>().data();
  Strides channel(y.shape.rank(), 0);
  channel[0] = 1;
  ForEachRow<3>(BatchDims(batch, y.shape),
                {WithBatch(y.batch_stride, y.strides), WithBatch(x.batch_stride, x.strides),
                 WithBatch(0, channel)},
                [&](const int64_t* offset, int64_t count, const int64_t* step) {
                  for (int64_t i = 0; i < count; ++i) {
                    const int64_t c = offset[2] + i * step[2];
                    y.data[offset[0] + i * step[0]] =
                        Clamp(node, x.data[offset[1] + i * step[1]] * scale[c] + shift[c]);
                  }
                });
}

void Copy(const Input& x, const Output& y, int64_t batch) {
  Unary(x, y, batch, [](float v) { return v; });
}

void Reshape(const Input& x, const Output& y, int64_t batch) {
  Extents dims;
  Strides src, dst;
  if (ReshapeAsCopy(x.shape, x.strides, y.shape, y.strides, &dims, &src, &dst)) {
    StridedMap(dims.Behind(batch), y.data, WithBatch(y.batch_stride, dst), x.data,
               WithBatch(x.batch_stride, src), [](float v) { return v; });
    return;
  }
  const int64_t elements = x.shape.elements();
  const auto offset = [](const Shape& shape, const Strides& strides, int64_t index) {
    int64_t result = 0;
    for (int i = shape.rank() - 1; i >= 0; --i) {
      result += index % shape[i] * strides[i];
      index /= shape[i];
    }
    return result;
  };
  InRanges(batch, true, [&](int64_t begin_n, int64_t end_n) {
    for (int64_t n = begin_n; n < end_n; ++n) {
      for (int64_t i = 0; i < elements; ++i) {
        y.data[n * y.batch_stride + offset(y.shape, y.strides, i)] =
            x.data[n * x.batch_stride + offset(x.shape, x.strides, i)];
      }
    }
  });
}

void Mean(absl::Span<const int> axes, const Input& x, const Output& y, int64_t batch) {
  int64_t summands = 1;
  for (int axis : axes) summands *= x.shape[axis];
  const double inverse = 1.0 / static_cast<double>(summands);
  // The kept dimensions of x beside those of y, whether y keeps the reduced ones as 1 or drops
  // them.
  Extents dims{batch};
  Strides from{x.batch_stride}, to{y.batch_stride};
  const bool keeps = y.shape.rank() == x.shape.rank();
  int out = 0;
  for (int i = 0; i < x.shape.rank(); ++i) {
    const bool reduced = std::find(axes.begin(), axes.end(), i) != axes.end();
    if (!reduced) {
      dims.push_back(x.shape[i]);
      from.push_back(x.strides[i]);
      to.push_back(y.strides[out]);
    }
    if (!reduced || keeps) ++out;
  }
  ForEachRow<2>(dims, {to, from}, [&](const int64_t* offset, int64_t count, const int64_t* step) {
    for (int64_t i = 0; i < count; ++i) {
      const float* p = x.data + offset[1] + i * step[1];
      double sum = 0;
      Extents index(axes.size(), 0);
      for (int64_t k = 0; k < summands; ++k) {
        sum += *p;
        for (size_t a = axes.size(); a-- > 0;) {
          p += x.strides[axes[a]];
          if (++index[a] < x.shape[axes[a]]) break;
          p -= x.shape[axes[a]] * x.strides[axes[a]];
          index[a] = 0;
        }
      }
      y.data[offset[0] + i * step[0]] = static_cast<float>(sum * inverse);
    }
  });
}

void GlobalAverage(const Input& x, const Output& y, int64_t batch) {
  const int64_t channels = x.shape[0], pixels = x.shape[1] * x.shape[2];
  if (x.strides[0] != 1 || y.strides[0] != 1) {
    Mean({1, 2}, x, y, batch);
    return;
  }
  InRanges(batch, true, [&](int64_t begin_n, int64_t end_n) {
    for (int64_t n = begin_n; n < end_n; ++n) {
      const float* p = x.data + n * x.batch_stride;
      float* d = y.data + n * y.batch_stride;
      std::memset(d, 0, channels * sizeof(float));
      for (int64_t i = 0; i < pixels; ++i, p += channels) {
        for (int64_t c = 0; c < channels; ++c) d[c] += p[c];
      }
      const float inverse = 1.0f / static_cast<float>(pixels);
      for (int64_t c = 0; c < channels; ++c) d[c] *= inverse;
    }
  });
}

void Softmax(int axis, const Input& x, const Output& y, int64_t batch) {
  Extents dims{batch};
  Strides from{x.batch_stride}, to{y.batch_stride};
  for (int i = 0; i < x.shape.rank(); ++i) {
    if (i == axis) continue;
    dims.push_back(x.shape[i]);
    from.push_back(x.strides[i]);
    to.push_back(y.strides[i]);
  }
  const int64_t n = x.shape[axis], in = x.strides[axis], out = y.strides[axis];
  ForEachRow<2>(dims, {to, from}, [&](const int64_t* offset, int64_t count, const int64_t* step) {
    for (int64_t i = 0; i < count; ++i) {
      const float* p = x.data + offset[1] + i * step[1];
      float* d = y.data + offset[0] + i * step[0];
      float largest = -std::numeric_limits<float>::infinity();
      for (int64_t k = 0; k < n; ++k) largest = std::max(largest, p[k * in]);
      double sum = 0;
      for (int64_t k = 0; k < n; ++k) {
        const float e = std::exp(p[k * in] - largest);
        d[k * out] = e;
        sum += e;
      }
      const float inverse = static_cast<float>(1.0 / sum);
      for (int64_t k = 0; k < n; ++k) d[k * out] *= inverse;
    }
  });
}

void Pool(const Node& node, const Input& x, const Output& y, int64_t batch) {
  const auto& pool = node.pool;
  const bool max = node.op == OpType::kMaxPool;
  const int64_t h = x.shape[1], w = x.shape[2];
  ForEachRow<2>({batch, y.shape[1], y.shape[2]},
                {Strides{y.batch_stride, y.strides[1], y.strides[2]},
                 Strides{batch > 0 ? y.shape[1] * y.shape[2] : 1, y.shape[2], 1}},
                [&](const int64_t* offset, int64_t count, const int64_t* step) {
                  for (int64_t i = 0; i < count; ++i) {
                    const int64_t pixel = offset[1] + i * step[1];
                    const int64_t n = pixel / (y.shape[1] * y.shape[2]),
                                  oy = pixel / y.shape[2] % y.shape[1], ox = pixel % y.shape[2];
                    const int64_t y0 = oy * pool.stride_h - pool.pad_top,
                                  x0 = ox * pool.stride_w - pool.pad_left;
                    // Padding counts as far as the declared padding reaches, not where ceil mode
                    // looks beyond it.
                    const int64_t y1 = std::min<int64_t>(y0 + pool.kernel_h, h + pool.pad_bottom);
                    const int64_t x1 = std::min<int64_t>(x0 + pool.kernel_w, w + pool.pad_right);
                    const int64_t ya = std::max<int64_t>(y0, 0), yb = std::min(y1, h);
                    const int64_t xa = std::max<int64_t>(x0, 0), xb = std::min(x1, w);
                    const double size = pool.count_include_pad ? (y1 - y0) * (x1 - x0)
                                                               : std::max<int64_t>(0, yb - ya) *
                                                                     std::max<int64_t>(0, xb - xa);
                    for (int64_t c = 0; c < x.shape[0]; ++c) {
                      const float* p = x.data + n * x.batch_stride + c * x.strides[0];
                      double sum = 0;
                      float largest = -std::numeric_limits<float>::infinity();
                      for (int64_t r = ya; r < yb; ++r) {
                        for (int64_t s = xa; s < xb; ++s) {
                          const float v = p[r * x.strides[1] + s * x.strides[2]];
                          sum += v;
                          largest = std::max(largest, v);
                        }
                      }
                      y.data[offset[0] + i * step[0] + c * y.strides[0]] =
                          max ? largest : (size > 0 ? static_cast<float>(sum / size) : 0.0f);
                    }
                  }
                });
}

}  // namespace

bool IsUnary(OpType op) {
  return op == OpType::kRelu || op == OpType::kClip || op == OpType::kSigmoid ||
         op == OpType::kHardSigmoid || op == OpType::kHardSwish || op == OpType::kSilu;
}

double EvaluateUnary(const Node& node, double x) {
  switch (node.op) {
    case OpType::kRelu:
      return std::max(x, 0.0);
    case OpType::kClip:
      return std::min(std::max(x, static_cast<double>(node.clip->lo)),
                      static_cast<double>(node.clip->hi));
    case OpType::kSigmoid:
      return 1.0 / (1.0 + std::exp(-x));
    case OpType::kHardSigmoid:
      return std::max(
          0.0, std::min(1.0, static_cast<double>(node.alpha) * x + static_cast<double>(node.beta)));
    case OpType::kHardSwish:
      return x * std::max(0.0, std::min(1.0, x / 6.0 + 0.5));
    case OpType::kSilu:
      return x / (1.0 + std::exp(-x));
    default:
      return x;
  }
}

bool ReshapeAsCopy(const Shape& in, const Strides& in_strides, const Shape& out,
                   const Strides& out_strides, Extents* dims, Strides* src, Strides* dst) {
  // A stride along an extent of 1 means nothing.
  const auto row_major = [](const Shape& shape, const Strides& strides) {
    const Strides wanted = RowMajorStrides(shape);
    for (int i = 0; i < shape.rank(); ++i) {
      if (shape[i] != 1 && strides[i] != wanted[i]) return false;
    }
    return true;
  };
  if (row_major(in, in_strides)) {
    *dims = out.extents();
    *src = RowMajorStrides(out);
    *dst = out_strides;
    return true;
  }
  if (row_major(out, out_strides)) {
    *dims = in.extents();
    *src = in_strides;
    *dst = RowMajorStrides(in);
    return true;
  }
  if (in == out) {
    *dims = in.extents();
    *src = in_strides;
    *dst = out_strides;
    return true;
  }
  return false;
}

absl::Status RunPlainFloat(const Node& node, absl::Span<const Input> inputs, const Output& y,
                           int64_t batch) {
  const Input& x = inputs[0];
  switch (node.op) {
    case OpType::kBatchNorm:
      BatchNorm(node, x, y, batch);
      return absl::OkStatus();
    case OpType::kRelu:
      Unary(x, y, batch, [](float v) { return std::max(v, 0.0f); });
      return absl::OkStatus();
    case OpType::kClip: {
      const float lo = node.clip->lo, hi = node.clip->hi;
      Unary(x, y, batch, [lo, hi](float v) { return std::min(std::max(v, lo), hi); });
      return absl::OkStatus();
    }
    case OpType::kSigmoid:
      Unary(x, y, batch, [](float v) { return 1.0f / (1.0f + std::exp(-v)); });
      return absl::OkStatus();
    case OpType::kHardSigmoid: {
      const float alpha = node.alpha, beta = node.beta;
      Unary(x, y, batch, [=](float v) { return std::max(0.0f, std::min(1.0f, alpha * v + beta)); });
      return absl::OkStatus();
    }
    case OpType::kHardSwish:
      Unary(x, y, batch,
            [](float v) { return v * std::max(0.0f, std::min(1.0f, v * (1.0f / 6.0f) + 0.5f)); });
      return absl::OkStatus();
    case OpType::kSilu:
      Unary(x, y, batch, [](float v) { return v / (1.0f + std::exp(-v)); });
      return absl::OkStatus();
    case OpType::kAdd:
    case OpType::kSub: {
      const float sign = node.op == OpType::kAdd ? 1.0f : -1.0f;
      const float lo = node.clip ? node.clip->lo : -std::numeric_limits<float>::infinity();
      const float hi = node.clip ? node.clip->hi : std::numeric_limits<float>::infinity();
      Binary(x, inputs[1], y, batch,
             [=](float a, float b) { return std::min(std::max(a + sign * b, lo), hi); });
      return absl::OkStatus();
    }
    case OpType::kMul:
      Binary(x, inputs[1], y, batch, [](float a, float b) { return a * b; });
      return absl::OkStatus();
    case OpType::kDiv:
      Binary(x, inputs[1], y, batch, [](float a, float b) { return a / b; });
      return absl::OkStatus();
    case OpType::kConcat: {
      Output part = y;
      for (const Input& input : inputs) {
        part.shape = input.shape;
        Copy(input, part, batch);
        part.data += input.shape[node.axis] * y.strides[node.axis];
      }
      return absl::OkStatus();
    }
    case OpType::kMaxPool:
    case OpType::kAveragePool:
      Pool(node, x, y, batch);
      return absl::OkStatus();
    case OpType::kGlobalAveragePool:
      GlobalAverage(x, y, batch);
      return absl::OkStatus();
    case OpType::kReshape:
      Reshape(x, y, batch);
      return absl::OkStatus();
    case OpType::kTranspose: {
      Input turned = x;
      for (int i = 0; i < y.shape.rank(); ++i) turned.strides[i] = x.strides[node.perm[i]];
      turned.shape = y.shape;
      Copy(turned, y, batch);
      return absl::OkStatus();
    }
    case OpType::kSlice: {
      Input part = x;
      part.data += node.start * x.strides[node.axis];
      part.strides[node.axis] *= node.step;
      part.shape = y.shape;
      Copy(part, y, batch);
      return absl::OkStatus();
    }
    case OpType::kPad: {
      const float value = node.pad_value;
      const Input none{&value, y.shape, Strides(y.shape.rank(), 0), 0};
      Copy(none, y, batch);
      Output inside = y;
      inside.shape = x.shape;
      for (int i = 0; i < x.shape.rank(); ++i) inside.data += node.pads_before[i] * y.strides[i];
      Copy(x, inside, batch);
      return absl::OkStatus();
    }
    case OpType::kSoftmax:
      Softmax(node.axis, x, y, batch);
      return absl::OkStatus();
    case OpType::kReduceMean:
      Mean(node.axes, x, y, batch);
      return absl::OkStatus();
    case OpType::kConv:
    case OpType::kFullyConnected:
      break;
  }
  return absl::UnimplementedError(
      absl::StrCat("no plain loop for ", graph::Name(node.op), " node ", node.name));
}

}  // namespace tern::engine
