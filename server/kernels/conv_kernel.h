// One ungrouped convolution with cluster or int8 weights, run by the fastest of the kernels that
// take it: register tiles (cluster_conv.h), sum tables (table_conv.h) or Winograd's products
// (winograd_conv.h). All give the same bits.
#ifndef TERN_SERVER_KERNELS_CONV_KERNEL_H_
#define TERN_SERVER_KERNELS_CONV_KERNEL_H_

#include <cstddef>
#include <cstdint>
#include <optional>
#include <string>
#include <utility>
#include <variant>
#include <vector>

#include "absl/strings/string_view.h"
#include "absl/types/span.h"
#include "server/kernels/cluster_conv.h"
#include "server/kernels/dispatch.h"
#include "server/kernels/table_conv.h"
#include "server/kernels/winograd_conv.h"
#include "server/tensor/quantized_weights.h"

namespace tern::kernels {

// Packed weights, shared by threads; immutable.
class ConvKernel {
 public:
  // Arguments as of PackClusterConv. Where several kernels take a layer and it is large enough for
  // a difference, all of them run a part of one image, and the shortest time wins, or the fewest
  // bytes among times that are equal. That takes 1 to
  // 4 ms and is done once per process for layers of the same shape, weights' kind, cluster size and
  // instruction set; the memory for it is freed again. Any thread may call it; measurements wait
  // for each other.
  static ConvKernel Make(const ConvGeometry& geometry, const QuantizedWeights& weights, Isa isa);

  // For int8 weights, by a model of the costs instead of a measurement; nothing where a library's
  // kernel that multiplies and adds every product by itself is expected to be faster.
  static std::optional<ConvKernel> MakeIfFaster(const ConvGeometry& geometry,
                                                const QuantizedWeights& weights, Isa isa);

  const ConvGeometry& geometry() const;
  // "avx2", "int8-avx2", "sum-tables-avx2", "winograd-4x4-avx2": what runs.
  std::string name() const;
  size_t bytes() const;
  // For one call of Run, any range: ClusterConvArgs::scratch.
  size_t scratch_bytes() const;

  // The output pixels of `batch` images form this many units of about equal cost.
  int64_t Units(int batch) const;

  // What every call does for a unit whatever its output channels, as a number of output-channel
  // blocks that take as long: tables and transformed inputs are made by each call that reads them.
  int SharedBlocks() const;

  // Computes units [unit_begin, unit_end) and output-channel blocks [block_begin, block_end) of
  // OutputBlocks(). Calls on disjoint ranges may run at once.
  void Run(const ClusterConvArgs& args, int64_t unit_begin, int64_t unit_end, int block_begin,
           int block_end) const;

 private:
  using Packed = std::variant<PackedClusterConv, PackedTableConv, PackedWinogradConv>;
  explicit ConvKernel(Packed packed) : packed_(std::move(packed)) {}

  // Seconds of processor time for a part of an image, the least of some runs, extended to the
  // whole image; by kernel.
  static std::vector<double> Measure(absl::Span<const ConvKernel> kernels);

  Packed packed_;
};

// What has been measured in this process, as lines of text that AddKernelChoices takes: the layer
// and what was fastest. Valid for this CPU and this version of the kernels. Thread safe.
std::string KernelChoices();
// What an earlier process measured: those layers are not measured again. What is no line of
// KernelChoices is ignored. A wrong choice costs time and changes no result. Thread safe.
void AddKernelChoices(absl::string_view text);

}  // namespace tern::kernels

#endif  // TERN_SERVER_KERNELS_CONV_KERNEL_H_
