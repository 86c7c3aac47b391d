// Fills EpilogueArgs for one call of a SIMD convolution, block by block and pixel by pixel.
#ifndef TERN_SERVER_KERNELS_CLUSTER_CONV_EPILOGUE_H_
#define TERN_SERVER_KERNELS_CLUSTER_CONV_EPILOGUE_H_

#include <algorithm>

#include "server/kernels/cluster_conv.h"
#include "server/kernels/cluster_conv_tiles.h"

namespace tern::kernels::tiled {

// Owns the constants that `out` points to; all three arguments must outlive it.
class BlockEpilogue {
 public:
  BlockEpilogue(const ConvGeometry& g, const ClusterConvArgs& args, EpilogueArgs& out)
      : g_(g), args_(args), out_(out) {
    out.stride = g.oc;
    out.residual_multiplier = args.residual_multiplier;
    out.lo = args.lo;
    out.hi = args.hi;
    if (args.fixed != nullptr) {
      out.fixed_multiplier = fixed_multiplier_;
      out.fixed_offset = fixed_offset_;
      out.fixed_residual_multiplier = static_cast<int32_t>(args.fixed->residual_multiplier);
      out.shift = args.fixed->shift;
      out.fixed_lo = static_cast<uint8_t>(args.fixed->lo);
      out.fixed_hi = static_cast<uint8_t>(args.fixed->hi);
    } else {
      out.multiplier = multiplier_;
      out.offset = offset_;
    }
  }
  BlockEpilogue(const BlockEpilogue&) = delete;
  BlockEpilogue& operator=(const BlockEpilogue&) = delete;

  // Output channels from 16 * block on.
  void SetBlock(int block) {
    o_ = block * kOutputBlock;
    out_.channels = std::min(kOutputBlock, g_.oc - o_);
    if (args_.fixed != nullptr) {
      std::copy_n(args_.fixed->multiplier.data() + o_, out_.channels, fixed_multiplier_);
      std::copy_n(args_.fixed->narrow_offset.data() + o_, out_.channels, fixed_offset_);
    } else if (args_.dst_s32 == nullptr) {
      std::copy_n(args_.multiplier + o_, out_.channels, multiplier_);
      std::copy_n(args_.offset + o_, out_.channels, offset_);
    }
  }

  // `pixel` of batch * oh * ow, in the block set last.
  void SetPixel(int64_t pixel) {
    const int64_t at = pixel * g_.oc + o_;
    out_.residual = args_.residual != nullptr ? args_.residual + at : nullptr;
    out_.dst = args_.dst != nullptr ? args_.dst + at : nullptr;
    out_.dst_f32 = args_.dst_f32 != nullptr ? args_.dst_f32 + at : nullptr;
    out_.dst_s32 = args_.dst_s32 != nullptr ? args_.dst_s32 + at : nullptr;
  }

 private:
  const ConvGeometry& g_;
  const ClusterConvArgs& args_;
  EpilogueArgs& out_;
  int o_ = 0;
  alignas(64) float multiplier_[kOutputBlock] = {};
  alignas(64) float offset_[kOutputBlock] = {};
  alignas(64) int32_t fixed_multiplier_[kOutputBlock] = {};
  alignas(64) int32_t fixed_offset_[kOutputBlock] = {};
};

}  // namespace tern::kernels::tiled

#endif  // TERN_SERVER_KERNELS_CLUSTER_CONV_EPILOGUE_H_
