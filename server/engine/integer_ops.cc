#include "server/engine/integer_ops.h"

#include <omp.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <tuple>

#include "server/engine/parallel.h"
#include "server/graph/fixed_point.h"

namespace tern::engine {
namespace {

uint8_t RoundAndClamp(float v, float lo = 0.0f, float hi = 255.0f) {
  return static_cast<uint8_t>(std::min(std::max(lo, std::nearbyint(v)), hi));
}

// Below this many bytes one thread is faster than waking the team.
constexpr int64_t kParallelBytes = 16384;

// f(begin, end) over [0, n), cut for the OpenMP team at multiples of 64.
template <typename F>
void ParallelRange(int64_t n, F f) {
  InRanges((n + 63) / 64, n > kParallelBytes,
           [&](int64_t begin, int64_t end) { f(64 * begin, std::min(n, 64 * end)); });
}

bool SameLayout(const Operand<const uint8_t>& x, const Operand<uint8_t>& y) {
  return x.shape == y.shape && x.strides == y.strides && x.batch_stride == y.batch_stride;
}

Strides Broadcast(const Operand<const uint8_t>& x, const Shape& shape) {
  Strides strides(shape.rank(), 0);
  const int shift = shape.rank() - x.shape.rank();
  for (int i = std::max(0, -shift); i < x.shape.rank(); ++i) {
    if (x.shape[i] != 1) strides[i + shift] = x.strides[i];
  }
  return strides;
}

template <typename Map>
void Binary(const Operand<const uint8_t>& a, const Operand<const uint8_t>& b,
            const Operand<uint8_t>& y, int64_t batch, Map map) {
  ForEachRow<3>(
      y.shape.WithBatch(batch).extents(),
      {WithBatch(y.batch_stride, y.strides), WithBatch(a.batch_stride, Broadcast(a, y.shape)),
       WithBatch(b.batch_stride, Broadcast(b, y.shape))},
      [&](const int64_t* offset, int64_t count, const int64_t* step) {
        for (int64_t i = 0; i < count; ++i) {
          y.data[offset[0] + i * step[0]] =
              map(a.data[offset[1] + i * step[1]], b.data[offset[2] + i * step[2]]);
        }
      });
}

}  // namespace

std::pair<uint8_t, uint8_t> ClipCodes(const std::optional<graph::ClipRange>& clip, QuantParams y) {
  if (!clip) return {0, 255};
  return {y.Quantize(clip->lo), y.Quantize(clip->hi)};
}

Table RequantizeTable(graph::Arithmetic arithmetic, QuantParams x, QuantParams y) {
  Table table;
  if (arithmetic == graph::Arithmetic::kFixedPoint && x != y) {
    const FixedPointMap map = graph::FixedPointRescale(x, y);
    for (int q = 0; q < 256; ++q) table[q] = map(q);
    return table;
  }
  const double ratio = static_cast<double>(x.scale) / y.scale;
  const float m = static_cast<float>(ratio);
  const float offset = static_cast<float>(y.zero_point - x.zero_point * ratio);
  for (int q = 0; q < 256; ++q) {
    table[q] = x == y ? static_cast<uint8_t>(q)
                      : RoundAndClamp(std::fma(static_cast<float>(q), m, offset));
  }
  return table;
}

Table UnaryTable(const graph::Node& node, QuantParams x, QuantParams y) {
  Table table;
  for (int q = 0; q < 256; ++q) {
    table[q] =
        y.Quantize(static_cast<float>(EvaluateUnary(node, x.Dequantize(static_cast<uint8_t>(q)))));
  }
  return table;
}

ChannelScale BatchNormScale(const graph::Graph& graph, const graph::Node& node) {
  const QuantParams &x = *graph.values[node.inputs[0]].quant, &y = *graph.values[node.output].quant;
  const auto scale = node.weight.data<float>(), shift = node.bias.data<float>();
  ChannelScale result;
  std::tie(result.lo, result.hi) = ClipCodes(node.clip, y);
  for (size_t c = 0; c < scale.size(); ++c) {
    const double ratio = static_cast<double>(scale[c]) * x.scale / y.scale;
    result.multiplier.push_back(static_cast<float>(ratio));
    result.offset.push_back(static_cast<float>(static_cast<double>(shift[c]) / y.scale +
                                               y.zero_point - x.zero_point * ratio));
  }
  return result;
}

std::vector<uint8_t> BatchNormTables(const graph::Graph& graph, const graph::Node& node) {
  const size_t channels = node.weight.data<float>().size();
  std::vector<uint8_t> tables(channels * 256);
  for (size_t c = 0; c < channels; ++c) {
    const FixedPointMap map = graph::FixedPointBatchNorm(graph, node, static_cast<int64_t>(c));
    for (int q = 0; q < 256; ++q) tables[c * 256 + q] = map(q);
  }
  return tables;
}

void ScaleChannels(kernels::Isa isa, const uint8_t* src, int64_t pixels, const ChannelScale& scale,
                   uint8_t* dst) {
  const int64_t channels = static_cast<int64_t>(scale.multiplier.size());
  const kernels::FloatEpilogue epilogue{scale.multiplier.data(), scale.offset.data(), 0.0f,
                                        static_cast<float>(scale.lo), static_cast<float>(scale.hi)};
  InRanges(pixels, pixels * channels > kParallelBytes, [&](int64_t begin, int64_t end) {
    kernels::ScaleChannelsU8(isa, src + begin * channels, epilogue, end - begin, channels,
                             dst + begin * channels);
  });
}

void Lookup(kernels::Isa isa, const uint8_t* src, size_t n, const Table& table, uint8_t* dst) {
  ParallelRange(n, [&](int64_t begin, int64_t end) {
    kernels::LookupU8(isa, src + begin, end - begin, table.data(), dst + begin);
  });
}

void LookupPerChannel(const uint8_t* src, int64_t pixels, int64_t channels, const uint8_t* tables,
                      uint8_t* dst) {
  InRanges(pixels, pixels * channels > kParallelBytes, [&](int64_t begin_p, int64_t end_p) {
    for (int64_t p = begin_p; p < end_p; ++p) {
      for (int64_t c = 0; c < channels; ++c)
        dst[p * channels + c] = tables[c * 256 + src[p * channels + c]];
    }
  });
}

void CopyCodes(kernels::Isa isa, absl::Span<const int64_t> dims, const Strides& dst_strides,
               uint8_t* dst, const Strides& src_strides, const uint8_t* src, const Table* table) {
  ForEachRow<2>(dims, {dst_strides, src_strides},
                [&](const int64_t* offset, int64_t count, const int64_t* step) {
                  uint8_t* d = dst + offset[0];
                  const uint8_t* s = src + offset[1];
                  if (step[0] == 1 && step[1] == 1) {
                    if (table != nullptr) {
                      kernels::LookupU8(isa, s, count, table->data(), d);
                    } else {
                      std::memcpy(d, s, count);
                    }
                  } else if (table != nullptr) {
                    for (int64_t i = 0; i < count; ++i) d[i * step[0]] = (*table)[s[i * step[1]]];
                  } else {
                    for (int64_t i = 0; i < count; ++i) d[i * step[0]] = s[i * step[1]];
                  }
                });
}

void AddCodes(kernels::Isa isa, const QuantizedOperand& a, const QuantizedOperand& b,
              const Operand<uint8_t>& y, QuantParams y_params,
              const std::optional<graph::ClipRange>& clip, int64_t batch) {
  const double ratio_a = static_cast<double>(a.params.scale) / y_params.scale;
  const double ratio_b = static_cast<double>(b.params.scale) / y_params.scale;
  const float ma = static_cast<float>(ratio_a), mb = static_cast<float>(ratio_b);
  const float offset = static_cast<float>(y_params.zero_point - a.params.zero_point * ratio_a -
                                          b.params.zero_point * ratio_b);
  const auto codes = ClipCodes(clip, y_params);
  const uint8_t lo = codes.first, hi = codes.second;
  if (SameLayout(a.codes, y) && SameLayout(b.codes, y)) {
    ParallelRange(batch * y.batch_stride, [&](int64_t begin, int64_t end) {
      kernels::AddU8(isa, a.codes.data + begin, ma, b.codes.data + begin, mb, offset, lo, hi,
                     end - begin, y.data + begin);
    });
    return;
  }
  Binary(a.codes, b.codes, y, batch, [=](uint8_t p, uint8_t q) {
    return RoundAndClamp(
        std::fma(static_cast<float>(p), ma, std::fma(static_cast<float>(q), mb, offset)), lo, hi);
  });
}

void AddCodes(kernels::Isa isa, const FixedPointAdd& add, const Operand<const uint8_t>& a,
              const Operand<const uint8_t>& b, const Operand<uint8_t>& y, int64_t batch) {
  if (SameLayout(a, y) && SameLayout(b, y)) {
    ParallelRange(batch * y.batch_stride, [&](int64_t begin, int64_t end) {
      kernels::AddFixedU8(isa, a.data + begin, b.data + begin, add, end - begin, y.data + begin);
    });
    return;
  }
  Binary(a, b, y, batch, add);
}

void MultiplyCodes(kernels::Isa isa, const QuantizedOperand& a, const QuantizedOperand& b,
                   const Operand<uint8_t>& y, QuantParams y_params, bool fixed_point,
                   int64_t batch) {
  const FixedPointMap map =
      fixed_point ? graph::FixedPointProduct(a.params, b.params, y_params) : FixedPointMap{};
  const int za = a.params.zero_point, zb = b.params.zero_point, zy = y_params.zero_point;
  const float m =
      static_cast<float>(static_cast<double>(a.params.scale) * b.params.scale / y_params.scale);
  if (SameLayout(a.codes, y) && SameLayout(b.codes, y)) {
    // One pixel whose channels are all elements.
    ParallelRange(batch * y.batch_stride, [&](int64_t begin, int64_t end) {
      const uint8_t *p = a.codes.data + begin, *q = b.codes.data + begin;
      if (fixed_point) {
        kernels::MulChannelsFixedU8(isa, p, za, q, zb, map, 1, end - begin, y.data + begin);
      } else {
        kernels::MulChannelsU8(isa, p, za, q, zb, m, zy, 1, end - begin, y.data + begin);
      }
    });
    return;
  }
  const auto per_channel = [](const Operand<const uint8_t>& x, const Shape& shape) {
    return shape.rank() == 3 && x.shape == Shape{shape[0], 1, 1} && x.batch_stride != 0;
  };
  const bool swap = SameLayout(b.codes, y) && per_channel(a.codes, y.shape);
  const QuantizedOperand& image = swap ? b : a;
  const QuantizedOperand& factors = swap ? a : b;
  if (SameLayout(image.codes, y) && per_channel(factors.codes, y.shape)) {
    const int64_t channels = y.shape[0], pixels = y.shape[1] * y.shape[2];
    InRanges(
        batch, batch * pixels * channels > kParallelBytes, [&](int64_t begin_n, int64_t end_n) {
          for (int64_t n = begin_n; n < end_n; ++n) {
            if (fixed_point) {
              kernels::MulChannelsFixedU8(
                  isa, image.codes.data + n * y.batch_stride, image.params.zero_point,
                  factors.codes.data + n * factors.codes.batch_stride, factors.params.zero_point,
                  map, pixels, channels, y.data + n * y.batch_stride);
              continue;
            }
            kernels::MulChannelsU8(
                isa, image.codes.data + n * y.batch_stride, image.params.zero_point,
                factors.codes.data + n * factors.codes.batch_stride, factors.params.zero_point, m,
                zy, pixels, channels, y.data + n * y.batch_stride);
          }
        });
    return;
  }
  if (fixed_point) {
    Binary(a.codes, b.codes, y, batch,
           [=](uint8_t p, uint8_t q) { return map(int64_t{p - za} * (q - zb)); });
    return;
  }
  Binary(a.codes, b.codes, y, batch, [=](uint8_t p, uint8_t q) {
    return RoundAndClamp(
        std::fma(static_cast<float>((p - za) * (q - zb)), m, static_cast<float>(zy)));
  });
}

void FinishSums(kernels::Isa isa, const kernels::FloatEpilogue& epilogue, int64_t channels,
                const int32_t* acc, const uint8_t* residual, int64_t pixels, uint8_t* dst,
                float* dst_f32) {
  InRanges(pixels, pixels * channels > kParallelBytes, [&](int64_t begin, int64_t end) {
    const int64_t at = begin * channels;
    kernels::FinishS32(isa, acc + at, residual != nullptr ? residual + at : nullptr, epilogue,
                       end - begin, channels, dst != nullptr ? dst + at : nullptr,
                       dst_f32 != nullptr ? dst_f32 + at : nullptr);
  });
}

void RequantizeSums(kernels::Isa isa, const FixedPointLayer& layer, const int32_t* acc,
                    const uint8_t* residual, int64_t pixels, uint8_t* dst) {
  const int64_t channels = static_cast<int64_t>(layer.multiplier.size());
  InRanges(pixels, pixels * channels > kParallelBytes, [&](int64_t begin, int64_t end) {
    const int64_t at = begin * channels;
    kernels::RequantizeS32(isa, acc + at, residual != nullptr ? residual + at : nullptr, layer,
                           end - begin, channels, dst + at);
  });
}

void ScaleSums(const FixedPointLayer& layer, const std::optional<graph::ClipRange>& clip,
               const int32_t* acc, const uint8_t* residual, int64_t pixels, float* dst) {
  const int64_t channels = static_cast<int64_t>(layer.multiplier.size());
  const float unit = std::ldexp(1.0f, layer.exponent);
  constexpr float kInfinity = std::numeric_limits<float>::infinity();
  const float lo = clip ? clip->lo : -kInfinity, hi = clip ? clip->hi : kInfinity;
  InRanges(pixels, pixels * channels > kParallelBytes, [&](int64_t begin_p, int64_t end_p) {
    for (int64_t p = begin_p; p < end_p; ++p) {
      for (int64_t c = 0, i = p * channels; c < channels; ++c, ++i) {
        int64_t sum = int64_t{acc[i]} * layer.multiplier[c] + layer.offset[c];
        if (residual != nullptr) sum += residual[i] * layer.residual_multiplier;
        dst[i] = std::min(std::max(static_cast<float>(sum) * unit, lo), hi);
      }
    }
  });
}

void AveragePoolCodes(kernels::Isa isa, const AveragePoolArgs& args, const uint8_t* src,
                      uint8_t* dst, char* scratch, size_t scratch_stride) {
  const auto& pool = args.pool;
  const int64_t channels = args.x_shape[0], h = args.x_shape[1], w = args.x_shape[2];
  const int64_t oh = args.y_shape[1], ow = args.y_shape[2], rows = args.batch * oh;
  const double ratio = static_cast<double>(args.x.scale) / args.y.scale;
  const float offset = static_cast<float>(args.y.zero_point - args.x.zero_point * ratio);
  InRanges(rows, true, [&](int64_t begin_row, int64_t end_row) {
    for (int64_t row = begin_row; row < end_row; ++row) {
      int32_t* sums = reinterpret_cast<int32_t*>(scratch + omp_get_thread_num() * scratch_stride);
      float* multiplier = reinterpret_cast<float*>(sums + channels);
      float* offsets = multiplier + channels;
      std::fill(offsets, offsets + channels, offset);
      int64_t scaled_for = -1;  // the count that `multiplier` is for
      const int64_t n = row / oh, oy = row % oh;
      const int64_t y0 = oy * pool.stride_h - pool.pad_top;
      const int64_t y1 = std::min<int64_t>(y0 + pool.kernel_h, h + pool.pad_bottom);
      const int64_t ya = std::max<int64_t>(y0, 0), yb = std::min(y1, h);
      for (int64_t ox = 0; ox < ow; ++ox) {
        const int64_t x0 = ox * pool.stride_w - pool.pad_left;
        const int64_t x1 = std::min<int64_t>(x0 + pool.kernel_w, w + pool.pad_right);
        const int64_t xa = std::max<int64_t>(x0, 0), xb = std::min(x1, w);
        const int64_t inside = std::max<int64_t>(yb - ya, 0) * std::max<int64_t>(xb - xa, 0);
        const int64_t count = pool.count_include_pad ? (y1 - y0) * (x1 - x0) : inside;
        const int32_t padding = static_cast<int32_t>((count - inside) * args.x.zero_point);
        std::fill(sums, sums + channels, padding);
        for (int64_t y = ya; y < yb; ++y) {
          for (int64_t x = xa; x < xb; ++x) {
            const uint8_t* p = src + ((n * h + y) * w + x) * channels;
            for (int64_t c = 0; c < channels; ++c) sums[c] += p[c];
          }
        }
        uint8_t* d = dst + (row * ow + ox) * channels;
        if (args.fixed_point) {
          const FixedPointMap map = graph::FixedPointMean(args.x, args.y, count);
          for (int64_t c = 0; c < channels; ++c) d[c] = map(sums[c]);
          continue;
        }
        if (count != scaled_for) {
          std::fill(multiplier, multiplier + channels,
                    static_cast<float>(static_cast<double>(args.x.scale) /
                                       (static_cast<double>(count) * args.y.scale)));
          scaled_for = count;
        }
        kernels::FinishS32(isa, sums, nullptr, {multiplier, offsets, 0.0f, 0.0f, 255.0f}, 1,
                           channels, d, nullptr);
      }
    }
  });
}

void GlobalAverageCodes(kernels::Isa isa, const AveragePoolArgs& args, const uint8_t* src,
                        uint8_t* dst, char* scratch, size_t scratch_stride) {
  const int64_t channels = args.x_shape[0], pixels = args.x_shape[1] * args.x_shape[2];
  const double ratio = static_cast<double>(args.x.scale) / args.y.scale;
  const float offset = static_cast<float>(args.y.zero_point - args.x.zero_point * ratio);
  const float m = static_cast<float>(static_cast<double>(args.x.scale) /
                                     (static_cast<double>(pixels) * args.y.scale));
  InRanges(args.batch, args.batch * pixels * channels > kParallelBytes,
           [&](int64_t begin_n, int64_t end_n) {
             for (int64_t n = begin_n; n < end_n; ++n) {
               int32_t* sums =
                   reinterpret_cast<int32_t*>(scratch + omp_get_thread_num() * scratch_stride);
               kernels::SumPixelsU8(isa, src + n * pixels * channels, pixels, channels, sums);
               if (args.fixed_point) {
                 const FixedPointMap map = graph::FixedPointMean(args.x, args.y, pixels);
                 for (int64_t c = 0; c < channels; ++c) dst[n * channels + c] = map(sums[c]);
                 continue;
               }
               for (int64_t c = 0; c < channels; ++c) {
                 dst[n * channels + c] =
                     RoundAndClamp(std::fma(static_cast<float>(sums[c]), m, offset));
               }
             }
           });
}

void PadCodes(const uint8_t* src, int64_t n, const Shape& shape, int64_t top, int64_t left,
              int64_t bottom, int64_t right, uint8_t value, uint8_t* dst) {
  const int64_t c = shape[0], h = shape[1], w = shape[2];
  const int64_t rows = h + top + bottom, row_bytes = (w + left + right) * c;
  InRanges(n * rows, n * rows * row_bytes > kParallelBytes, [&](int64_t begin_r, int64_t end_r) {
    for (int64_t r = begin_r; r < end_r; ++r) {
      const int64_t image = r / rows, y = r % rows - top;
      uint8_t* d = dst + r * row_bytes;
      if (y < 0 || y >= h) {
        std::memset(d, value, row_bytes);
        continue;
      }
      std::memset(d, value, left * c);
      std::memcpy(d + left * c, src + (image * h + y) * w * c, w * c);
      std::memset(d + (left + w) * c, value, right * c);
    }
  });
}

}  // namespace tern::engine
