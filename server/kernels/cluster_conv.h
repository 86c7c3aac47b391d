// Convolution of u8 activations with cluster or int8 weights: the contract of every variant.
//
// out[p][o] = epilogue( sum over clusters g of scale[o][g] *
//                       sum over channels c in g, taps t of code[o][c][t] * x[pixel(p, t)][c] )
// Codes of clusters are small (|code| <= 7), so the inner sums run in 16 bits (vpmaddubsw + vpaddw)
// and only one 32-bit multiply per cluster remains (Mellempudi et al. 2017, section 3; the
// register-blocked design is described in docs/kernels.md). int8 weights are one cluster of scale
// 1, any s8 codes; their 16-bit sums are as long as the weights at hand allow.
//
// All variants are bit-exact: the accumulator is an exact s32, and the epilogue is
//   v = fma(float(acc), multiplier[o], offset[o])
//   v = fma(float(r), residual_multiplier, v)            if there is a residual
//   y = clamp(round to nearest, ties to even (v), lo, hi) as u8;   or y = clamp(v, lo, hi) as f32
// with IEEE single precision and one rounding per fma; a v that is not a number gives lo.
// Fixed-point layers have an integer epilogue instead (ClusterConvArgs::fixed).
//
// Pure functions: no allocation, no threads, no errors. The caller validated the shapes.
#ifndef TERN_SERVER_KERNELS_CLUSTER_CONV_H_
#define TERN_SERVER_KERNELS_CLUSTER_CONV_H_

#include <cstddef>
#include <cstdint>
#include <vector>

#include "server/base/aligned_buffer.h"
#include "server/kernels/dispatch.h"
#include "server/tensor/fixed_point.h"
#include "server/tensor/quantized_weights.h"

namespace tern::kernels {

// One ungrouped convolution, NHWC. A fully connected layer is 1x1 on a 1x1 image.
struct ConvGeometry {
  int ih = 1, iw = 1, ic = 1;
  int oh = 1, ow = 1, oc = 1;
  int kh = 1, kw = 1;
  int stride_h = 1, stride_w = 1;
  int pad_top = 0, pad_left = 0;  // bottom and right follow from oh, ow
  int dilation_h = 1, dilation_w = 1;
};

// Weights in the order in which the kernels read them, built once per plan, shared by threads.
struct PackedClusterConv {
  ConvGeometry geometry;
  Isa isa = Isa::kScalar;  // the variant that must run it
  int cluster_size = 0;    // N; 0 for int8
  AlignedBuffer weights;
  AlignedBuffer scales;
  // Variant-private indexing; see the .cc files.
  std::vector<int32_t> layout;
  size_t bytes() const { return weights.size_bytes() + scales.size_bytes(); }
};

// `isa` must be <= DetectIsa(). The weights' shape must be [oc, ic, kh, kw] (or [oc, ic]).
PackedClusterConv PackClusterConv(const ConvGeometry& geometry, const QuantizedWeights& weights,
                                  Isa isa);

// Whether int8 tiles would rather read whole rows of taps (kw * ic neighbouring codes) than taps,
// because `ic` fills vectors poorly: the first layer of a network. They can if no pixel needs
// padding; else the caller should pad the source first.
bool PrefersRowTaps(const ConvGeometry& geometry, Isa isa);

// Cycles that AVX2 tiles with int8 weights are expected to take for one image, by the flushes that
// these weights need (docs/kernels.md, "int8"); infinity for anything else.
double Int8TileCycles(const PackedClusterConv& conv);

struct ClusterConvArgs {
  const uint8_t* src = nullptr;  // [n, ih, iw, ic] dense NHWC. Not one byte outside is read.
  int batch = 1;
  uint8_t src_zero_point = 0;         // value of padding pixels
  const float* multiplier = nullptr;  // [oc]
  const float* offset = nullptr;      // [oc]
  const uint8_t* residual = nullptr;  // [n, oh, ow, oc] or null; may be the same memory as dst
  float residual_multiplier = 0.0f;
  // Set: the epilogue of server/tensor/fixed_point.h instead of the float one, to dst; the float
  // constants are not used. Must be narrow().
  const FixedPointLayer* fixed = nullptr;
  // Exactly one destination, dense NHWC [n, oh, ow, oc]; overwritten.
  uint8_t* dst = nullptr;
  float* dst_f32 = nullptr;
  int32_t* dst_s32 = nullptr;    // the sums themselves: no epilogue
  float lo = 0.0f, hi = 255.0f;  // clamp, in codes (u8, whole numbers) or reals (f32)
  // ClusterConvScratchBytes() bytes, 64-byte aligned, private to the call.
  void* scratch = nullptr;
};

// Scratch for one call of RunClusterConv, any range.
size_t ClusterConvScratchBytes(const PackedClusterConv& conv);

// Computes output pixels [pixel_begin, pixel_end) of batch*oh*ow and output-channel blocks
// [block_begin, block_end) of OutputBlocks(). Calls on disjoint ranges may run at once.
void RunClusterConv(const PackedClusterConv& conv, const ClusterConvArgs& args, int64_t pixel_begin,
                    int64_t pixel_end, int block_begin, int block_end);

// Output channels come in blocks of 16 (the last may be short).
inline constexpr int kOutputBlock = 16;
inline int OutputBlocks(const ConvGeometry& g) { return (g.oc + kOutputBlock - 1) / kOutputBlock; }

}  // namespace tern::kernels

#endif  // TERN_SERVER_KERNELS_CLUSTER_CONV_H_
