// Operators on u8 codes beyond convolutions: docs/quantisation.md, "Inference arithmetic", row by
// row. All tensors are NHWC. They run on the caller's OpenMP team.
#ifndef TERN_SERVER_ENGINE_INTEGER_OPS_H_
#define TERN_SERVER_ENGINE_INTEGER_OPS_H_

#include <array>
#include <cstdint>
#include <utility>
#include <vector>

#include "server/engine/float_ops.h"
#include "server/graph/graph.h"
#include "server/kernels/dispatch.h"
#include "server/kernels/elementwise.h"
#include "server/tensor/fixed_point.h"
#include "server/tensor/quant_params.h"

namespace tern::engine {

using Table = std::array<uint8_t, 256>;

// [lo, hi] in codes: the clamp of a fused activation; the full range without one.
std::pair<uint8_t, uint8_t> ClipCodes(const std::optional<graph::ClipRange>& clip, QuantParams y);

// The codes under y of the reals that x's codes stand for; the identity if x == y.
Table RequantizeTable(graph::Arithmetic arithmetic, QuantParams x, QuantParams y);
// The codes under y of f(real), f one of the unary operators.
Table UnaryTable(const graph::Node& node, QuantParams x, QuantParams y);
// Batch normalisation of codes: clamp(rint(fma(code, multiplier[c], offset[c])), lo, hi).
struct ChannelScale {
  std::vector<float> multiplier, offset;
  uint8_t lo = 0, hi = 255;
};
ChannelScale BatchNormScale(const graph::Graph& graph, const graph::Node& node);
void ScaleChannels(kernels::Isa isa, const uint8_t* src, int64_t pixels, const ChannelScale& scale,
                   uint8_t* dst);
// The same in fixed point: one table per channel, [c][256].
std::vector<uint8_t> BatchNormTables(const graph::Graph& graph, const graph::Node& node);

// dst[i] = table[src[i]]; the same memory may serve both.
void Lookup(kernels::Isa isa, const uint8_t* src, size_t n, const Table& table, uint8_t* dst);
// dst[p][c] = tables[c][src[p][c]]
void LookupPerChannel(const uint8_t* src, int64_t pixels, int64_t channels, const uint8_t* tables,
                      uint8_t* dst);
// dst[i...] = table[src[i...]]: slices, transpositions, reshapes, the parts of a concatenation.
// Null table: the codes stay.
void CopyCodes(kernels::Isa isa, absl::Span<const int64_t> dims, const Strides& dst_strides,
               uint8_t* dst, const Strides& src_strides, const uint8_t* src, const Table* table);

struct QuantizedOperand {
  Operand<const uint8_t> codes;
  QuantParams params;
};
// Addition with broadcasting; dst may be the memory of an operand of dst's shape.
void AddCodes(kernels::Isa isa, const QuantizedOperand& a, const QuantizedOperand& b,
              const Operand<uint8_t>& y, QuantParams y_params,
              const std::optional<graph::ClipRange>& clip, int64_t batch);
void AddCodes(kernels::Isa isa, const FixedPointAdd& add, const Operand<const uint8_t>& a,
              const Operand<const uint8_t>& b, const Operand<uint8_t>& y, int64_t batch);
// `fixed_point`: by FixedPointProduct instead of the float rule.
void MultiplyCodes(kernels::Isa isa, const QuantizedOperand& a, const QuantizedOperand& b,
                   const Operand<uint8_t>& y, QuantParams y_params, bool fixed_point,
                   int64_t batch);

// The float epilogue after a layer's s32 sums, for `pixels` pixels. To codes, or (dst null) to f32.
// `residual` may be null or dst.
void FinishSums(kernels::Isa isa, const kernels::FloatEpilogue& epilogue, int64_t channels,
                const int32_t* acc, const uint8_t* residual, int64_t pixels, uint8_t* dst,
                float* dst_f32);
// The epilogue of a fixed-point layer after its s32 sums, for `pixels` pixels. To codes; or to f32,
// clamped to `clip`. `residual` may be null or dst.
void RequantizeSums(kernels::Isa isa, const FixedPointLayer& layer, const int32_t* acc,
                    const uint8_t* residual, int64_t pixels, uint8_t* dst);
void ScaleSums(const FixedPointLayer& layer, const std::optional<graph::ClipRange>& clip,
               const int32_t* acc, const uint8_t* residual, int64_t pixels, float* dst);

// Average pooling. Each OpenMP thread has 12 * channels bytes of scratch.
struct AveragePoolArgs {
  graph::PoolAttributes pool;
  Shape x_shape, y_shape;  // [c,h,w]
  QuantParams x, y;
  bool fixed_point = false;
  int64_t batch = 1;
};
void AveragePoolCodes(kernels::Isa isa, const AveragePoolArgs& args, const uint8_t* src,
                      uint8_t* dst, char* scratch, size_t scratch_stride);
void GlobalAverageCodes(kernels::Isa isa, const AveragePoolArgs& args, const uint8_t* src,
                        uint8_t* dst, char* scratch, size_t scratch_stride);

// Copies [n,h,w,c] into the middle of [n,h+top+bottom,w+left+right,c], the rest is `value`.
void PadCodes(const uint8_t* src, int64_t n, const Shape& shape, int64_t top, int64_t left,
              int64_t bottom, int64_t right, uint8_t value, uint8_t* dst);

}  // namespace tern::engine

#endif  // TERN_SERVER_ENGINE_INTEGER_OPS_H_
