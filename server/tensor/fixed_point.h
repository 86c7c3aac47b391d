// Dynamic fixed point (Mellempudi et al. 2017, section 2): integer arithmetic on u8 codes whose
// scales are powers of two. docs/quantisation.md, "Fixed-point arithmetic", is the definition.
//
// Every operator ends in the one rounding
//   y = clamp((sum + offset) >> shift, lo, hi)      s64; >> rounds towards minus infinity
// where `offset` holds half a unit of the result, 2^(shift - 1): round to nearest, ties upwards.
#ifndef TERN_SERVER_TENSOR_FIXED_POINT_H_
#define TERN_SERVER_TENSOR_FIXED_POINT_H_

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <optional>
#include <vector>

namespace tern {

// Exponents of scales and steps lie in -kMaxExponent..kMaxExponent: f32 numbers with all bits.
inline constexpr int kMaxExponent = 100;
// The largest multiplier of a weight step: 7 bits, as the cluster scales have.
inline constexpr int kMaxStepMultiplier = 127;
// The largest shift of a residual, an operand of an addition, or a result; and of an accumulator.
inline constexpr int kMaxShift = 40;
inline constexpr int kMaxAccumulatorShift = 24;
// The largest magnitude of a bias, in units of the sum it is added to.
inline constexpr int64_t kMaxFixedPointBias = int64_t{1} << 56;

// e if `scale` is 2^e with e in -kMaxExponent..kMaxExponent.
inline std::optional<int> ExponentOf(float scale) {
  int exponent = 0;
  if (std::frexp(scale, &exponent) != 0.5f || std::abs(exponent - 1) > kMaxExponent) return {};
  return exponent - 1;
}

// One code from one integer: y = clamp((v * multiplier + offset) >> shift, lo, hi). Whoever makes
// one sees to it that nothing overflows for the v it is meant for.
struct FixedPointMap {
  int64_t multiplier = 1;
  int64_t offset = 0;
  int shift = 0;
  int32_t lo = 0, hi = 255;

  uint8_t operator()(int64_t v) const {
    return static_cast<uint8_t>(std::clamp<int64_t>((v * multiplier + offset) >> shift, lo, hi));
  }
};

// Addition: y = clamp((a * multiplier_a + b * multiplier_b + offset) >> shift, lo, hi).
// Multipliers are 2^0..2^kMaxShift and |offset| < 2^49, so |sum| < 2^50.
struct FixedPointAdd {
  int64_t multiplier_a = 1, multiplier_b = 1;
  int64_t offset = 0;
  int shift = 0;
  int32_t lo = 0, hi = 255;

  uint8_t operator()(uint8_t a, uint8_t b) const {
    return static_cast<uint8_t>(
        std::clamp<int64_t>((a * multiplier_a + b * multiplier_b + offset) >> shift, lo, hi));
  }
};

// A convolution or fully connected layer. For output channel o, with acc = sum_j w_j x_j in s32
// (w = cluster scale x code, x the u8 codes, padding = the zero point) and residual code r:
//   sum = acc * multiplier[o] + r * residual_multiplier + offset[o]
//   y = clamp(sum >> shift, lo, hi), or the real number sum * 2^exponent.
// No overflow: |acc| < 2^31 and 1 <= multiplier <= 127 * 2^24 give |acc * multiplier| < 2^62; the
// offset holds the input's zero point (below 128/255 of that), a bias of at most 2^56, and shifted
// zero points and half a unit below 2^49; the residual adds less than 2^48: in all below 2^62.9.
struct FixedPointLayer {
  std::vector<int32_t> multiplier;  // [o]
  std::vector<int64_t> offset;      // [o]
  int64_t residual_multiplier = 0;  // 0: no residual
  int shift = 0;
  int exponent = 0;
  int32_t lo = 0, hi = 255;
  // The largest |acc| that any input can give, of all output channels and of every part of the
  // sum.
  int64_t largest_accumulator = 0;
  // |acc * multiplier| + r * residual_multiplier + |offset| < 2^31 for every channel and input:
  // then 32 bits give the same result, with `narrow_offset` [o]; empty otherwise.
  std::vector<int32_t> narrow_offset;

  bool narrow() const { return !narrow_offset.empty(); }
};

}  // namespace tern

#endif  // TERN_SERVER_TENSOR_FIXED_POINT_H_
