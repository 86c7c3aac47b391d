// One convolution with cluster weights, run by the faster of the kernels that take it: register
// tiles (cluster_conv.h) or sum tables (table_conv.h). Both give the same bits.
#ifndef TERN_SERVER_KERNELS_CLUSTER_KERNEL_H_
#define TERN_SERVER_KERNELS_CLUSTER_KERNEL_H_

#include <cstddef>
#include <cstdint>
#include <optional>
#include <string>

#include "absl/strings/string_view.h"
#include "server/kernels/cluster_conv.h"
#include "server/kernels/dispatch.h"
#include "server/kernels/table_conv.h"
#include "server/tensor/quantized_weights.h"

namespace tern::kernels {

// Packed weights, shared by threads; immutable.
class ClusterKernel {
 public:
  // Arguments as of PackClusterConv. Where both kernels take the layer and it is large enough for a
  // difference, both run a part of one image, and the shorter time wins. That takes 1 to 3 ms and
  // is done once per process for layers of the same shape, cluster size and instruction set; the
  // memory for it is freed again. Any thread may call it; measurements wait for each other.
  static ClusterKernel Make(const ConvGeometry& geometry, const QuantizedWeights& weights, Isa isa);

  const ConvGeometry& geometry() const { return tables_ ? tables_->geometry : tiles_->geometry; }
  // "avx2", "sum-tables-avx2": what runs.
  std::string name() const;
  size_t bytes() const { return tables_ ? tables_->bytes() : tiles_->bytes(); }
  // For one call of Run, any range: ClusterConvArgs::scratch.
  size_t scratch_bytes() const;

  // The output pixels of `batch` images form this many units of about equal cost.
  int64_t Units(int batch) const;

  // What every call does for a unit whatever its output channels, as a number of output-channel
  // blocks that take as long: tables are built by each call that reads them.
  int SharedBlocks() const;

  // Computes units [unit_begin, unit_end) and output-channel blocks [block_begin, block_end) of
  // OutputBlocks(). Calls on disjoint ranges may run at once.
  void Run(const ClusterConvArgs& args, int64_t unit_begin, int64_t unit_end, int block_begin,
           int block_end) const;

 private:
  // One of the two.
  std::optional<PackedClusterConv> tiles_;
  std::optional<PackedTableConv> tables_;
};

// What has been measured in this process, as lines of text that AddKernelChoices takes: the layer
// and what was faster. Valid for this CPU and this version of the kernels. Thread safe.
std::string KernelChoices();
// What an earlier process measured: those layers are not measured again. What is no line of
// KernelChoices is ignored. A wrong choice costs time and changes no result. Thread safe.
void AddKernelChoices(absl::string_view text);

}  // namespace tern::kernels

#endif  // TERN_SERVER_KERNELS_CLUSTER_KERNEL_H_
