// Rounding that compiles to two additions; the baseline instruction set has no rounding
// instruction.
#ifndef TERN_SERVER_QUANT_ROUNDING_H_
#define TERN_SERVER_QUANT_ROUNDING_H_

namespace tern::quant {

// x rounded to the nearest integer, ties to even, for |x| <= 2^22.
inline float RoundToEven(float x) {
  constexpr float kShift = 12582912.0f;  // 1.5 * 2^23: sums have no fraction bits left
  return (x + kShift) - kShift;
}

// The nearest integer within [lo, hi], which are integers of magnitude <= 2^22. NaN gives hi.
inline float RoundInto(float x, float lo, float hi) {
  const float below = x < hi ? x : hi;
  return RoundToEven(below > lo ? below : lo);
}

}  // namespace tern::quant

#endif  // TERN_SERVER_QUANT_ROUNDING_H_
