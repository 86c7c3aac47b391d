// Ranges of activation tensors: the scale and zero point of each u8 value.
#ifndef TERN_SERVER_QUANT_OBSERVE_H_
#define TERN_SERVER_QUANT_OBSERVE_H_

#include <cstdint>
#include <vector>

#include "absl/types/span.h"
#include "server/tensor/quant_params.h"
#include "tern/v1/model.pb.h"

namespace tern::quant {

// What is kept of a tensor on the calibration images: its exact range, and every stride-th
// element. Feed the whole tensor in order. Thread compatible.
class Observer {
 public:
  // `elements`: how many will be fed in all; about 200,000 of them are kept. The stride is odd, so
  // that it meets every column of an even-sized image.
  explicit Observer(int64_t elements);

  void Feed(absl::Span<const float> values);

  // Parameters for what was fed. Empty or all-zero tensors: scale 1.
  //   AFFINE: a non-negative tensor has zero point 0; else the range is asymmetric. Both ends may
  //   clip: of 33 shrunken
  //     ranges and a search around the best, the one with the least squared error on the sample.
  //   DFP8: scale 2^e, zero point 0 (non-negative) or 128; the best of four exponents by the same
  //   error.
  QuantParams Choose(v1::ActivationType type) const;

 private:
  int64_t stride_ = 1;
  int64_t next_ = 0;         // elements to skip before the next kept one
  float min_ = 0, max_ = 0;  // of what was fed and 0
  std::vector<float> sample_;
};

// Mean squared error of quantising `values` with `params`.
double QuantizationError(absl::Span<const float> values, const QuantParams& params);

}  // namespace tern::quant

#endif  // TERN_SERVER_QUANT_OBSERVE_H_
