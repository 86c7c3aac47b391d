// Runs float and quantised graphs in f32 (quantised values and weights dequantised, results rounded
// to codes), for accuracy checks on many images.
#ifndef TERN_TESTS_QUANT_SIMULATE_H_
#define TERN_TESTS_QUANT_SIMULATE_H_

#include "server/graph/graph.h"

namespace tern::quant {

// Logits f32 [n, classes] of `input` f32 [n, c, h, w]. Aborts the test program on failure.
Tensor Simulate(const graph::Graph& graph, const Tensor& input, int threads = 1);

}  // namespace tern::quant

#endif  // TERN_TESTS_QUANT_SIMULATE_H_
