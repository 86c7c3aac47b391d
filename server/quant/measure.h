// How far a quantised network's values are from the float network's.
#ifndef TERN_SERVER_QUANT_MEASURE_H_
#define TERN_SERVER_QUANT_MEASURE_H_

#include <atomic>
#include <cstdint>

#include "absl/status/status.h"
#include "absl/types/span.h"
#include "server/graph/graph.h"
#include "server/tensor/tensor.h"
#include "tern/v1/model.pb.h"

namespace tern::quant {

// The u8 codes of f32 values, and the values of codes.
Tensor ToCodes(const Tensor& real, const QuantParams& params);
Tensor ToReal(const Tensor& codes, const QuantParams& params);

// Values of f32 `real` more than half a step beyond the last codes.
int64_t CountClipped(const Tensor& real, const QuantParams& params);

// Signal-to-noise ratio from two sums of squares, within +-200 dB.
double Decibels(double signal, double noise);

// Sets what a report says about outputs, from the images `which` (of f32 NCHW `images`): of every
// layer, which the report names in the network's order, signal-to-noise ratio and clipped share;
// the logits' signal-to-noise ratio and the agreement. `quantised` was made from `reference`; its
// activations are rounded to their codes. CANCELLED; other errors are oneDNN's.
absl::Status MeasureOutputs(const graph::Graph& reference, const graph::Graph& quantised,
                            const Tensor& images, absl::Span<const int64_t> which, int threads,
                            const std::atomic<bool>* cancelled, v1::QuantizationReport& report);

}  // namespace tern::quant

#endif  // TERN_SERVER_QUANT_MEASURE_H_
