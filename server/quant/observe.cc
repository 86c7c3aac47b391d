#include "server/quant/observe.h"

#include <algorithm>
#include <cmath>
#include <limits>

#include "server/quant/rounding.h"

namespace tern::quant {
namespace {

constexpr int64_t kSampleSize = 200'000;
// Ranges below this are all zero for every purpose; keeps scales far from denormals.
constexpr float kSmallestRange = 1e-20f;

// u8 parameters whose codes span [lo, hi], lo <= 0 <= hi, lo < hi.
QuantParams Spanning(float lo, float hi) {
  QuantParams params;
  params.scale = (hi - lo) / 255.0f;
  params.zero_point =
      static_cast<int32_t>(std::clamp(std::nearbyint(-lo / params.scale), 0.0f, 255.0f));
  return params;
}

QuantParams ChooseAffine(absl::Span<const float> sample, float min, float max) {
  QuantParams best = Spanning(min, max);
  double best_error = std::numeric_limits<double>::infinity();
  float best_lo = min, best_hi = max;
  const auto consider = [&](float lo, float hi) {
    const QuantParams params = Spanning(lo, hi);
    const double error = QuantizationError(sample, params);
    if (!(error < best_error)) return;  // NaN, too
    best_error = error;
    best = params;
    best_lo = lo;
    best_hi = hi;
  };
  constexpr int kRatios = 33;
  for (int i = 0; i < kRatios; ++i) {
    const float ratio = 1.0f - 0.8f * static_cast<float>(i) / (kRatios - 1);
    consider(min * ratio, max * ratio);
  }
  if (min < 0 && max > 0) {
    // The ends of a signed range move on their own.
    for (float ratio : {0.6f, 0.75f, 0.9f, 1.1f, 1.3f}) {
      consider(std::max(min, best_lo * ratio), best_hi);
      consider(best_lo, std::min(max, best_hi * ratio));
    }
  }
  return best;
}

QuantParams ChooseDynamicFixedPoint(absl::Span<const float> sample, float min, float max) {
  const bool is_signed = min < 0;
  const float largest = std::max(-min, max);
  const int top = static_cast<int>(std::ceil(std::log2(largest / (is_signed ? 127.0f : 255.0f))));
  QuantParams best;
  double best_error = std::numeric_limits<double>::infinity();
  for (int k = 0; k < 4; ++k) {
    QuantParams params;
    params.scale = std::ldexp(1.0f, top - k);
    params.zero_point = is_signed ? 128 : 0;
    const double error = QuantizationError(sample, params);
    if (k > 0 && !(error < best_error)) continue;
    best_error = error;
    best = params;
  }
  return best;
}

}  // namespace

double QuantizationError(absl::Span<const float> values, const QuantParams& params) {
  const float inverse = 1.0f / params.scale;
  const float lo = static_cast<float>(-params.zero_point);
  const float hi = static_cast<float>(255 - params.zero_point);
  double sum = 0;
  for (float v : values) {
    const float q = RoundInto(v * inverse, lo, hi);
    const float e = v - q * params.scale;
    sum += static_cast<double>(e) * e;
  }
  return values.empty() ? 0 : sum / static_cast<double>(values.size());
}

Observer::Observer(int64_t elements) : stride_((elements / kSampleSize) | 1) {}

void Observer::Feed(absl::Span<const float> values) {
  float min = min_, max = max_;
  for (float v : values) {
    min = std::min(min, v);
    max = std::max(max, v);
  }
  min_ = min;
  max_ = max;
  const int64_t size = static_cast<int64_t>(values.size());
  for (; next_ < size; next_ += stride_) sample_.push_back(values[next_]);
  next_ -= size;
}

QuantParams Observer::Choose(v1::ActivationType type) const {
  if (std::max(-min_, max_) < kSmallestRange) return QuantParams{};
  if (type == v1::DFP8) return ChooseDynamicFixedPoint(sample_, min_, max_);
  return ChooseAffine(sample_, min_, max_);
}

}  // namespace tern::quant
