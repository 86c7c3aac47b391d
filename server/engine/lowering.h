// Internal: how a graph becomes steps. One object lowers one graph; the methods are grouped in
// lower.cc (buffers, dispatch), lower_weighted.cc (convolutions, fully connected layers),
// lower_integer.cc (other operators on codes) and lower_float.cc (other operators in float).
#ifndef TERN_SERVER_ENGINE_LOWERING_H_
#define TERN_SERVER_ENGINE_LOWERING_H_

#include <functional>
#include <map>
#include <memory>
#include <optional>
#include <set>
#include <string>
#include <type_traits>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "server/engine/float_ops.h"
#include "server/engine/integer_ops.h"
#include "server/engine/onednn.h"
#include "server/engine/program.h"
#include "server/kernels/cluster_conv.h"
#include "server/kernels/conv_kernel.h"
#include "server/kernels/depthwise_conv.h"

namespace tern::engine {

class PackedWeights;

// Integer weights of a layer in plain OIHW order, as products of code and cluster scale.
struct IntegerWeights {
  // Products of clustered codes that will run as int8. Int8 codes are the products themselves, and
  // the kernels of clusters read codes: both need none.
  std::vector<int8_t> values;
  // Per output channel; 0 if the layer's input has zero point 0, which multiplies them.
  std::vector<int64_t> sums;
  int largest = 0;  // magnitude of a product; 0 for the kernels of clusters
};

// Emits the steps of a valid graph in its order. Not thread safe; used once.
class Lowering {
 public:
  Lowering(const graph::Graph& graph, const PlanOptions& options)
      : graph_(graph), options_(options) {}

  absl::StatusOr<Program> Run();

 private:
  using Node = graph::Node;
  using ValueId = graph::ValueId;
  using memory = dnnl::memory;

  // ---- Buffers -----------------------------------------------------------------------------

  LayerInfo& layer() { return program_.layers[node_]; }
  const std::optional<QuantParams>& quant(ValueId id) const { return graph_.values[id].quant; }
  Buffer& buffer(int id) { return program_.buffers[id]; }

  int NewBuffer(Format format, const Shape& shape);

  // f(0) .. f(n - 1) on PlanOptions::load_threads threads; what they throw becomes a status.
  absl::Status SideBySide(size_t n, const std::function<void(size_t)>& f) const;

  // Work on weights that no later decision needs: Run does it all at its end, side by side, then
  // calls every `done` in order.
  struct Packing {
    std::function<void()> work, done;
  };

  Step& AddStep(std::vector<int> reads, std::vector<int> writes,
                std::optional<Conversion> conversion = {});

  // Declares buffer `b` to be value `id`, in the format in which it is defined.
  void Define(ValueId id, int b);

  // Declares f32 buffer `b` to hold the reals of value `id`, and quantises them if the value is
  // defined as u8.
  void StoreFloat(ValueId id, int b);

  // A buffer with the f32 content of f32 buffer `b` in another order.
  int Convert(int b, Format format);

  // The buffer that holds value `id` in `format`; converts it if there is none. kU8 only if it is
  // quantised.
  int Get(ValueId id, Format format);

  // One f32 sample, in a format that is not blocked.
  int Constant(const graph::Value& value, Format format);

  // The f32 format that a consumer without a preference of its own should take.
  Format Current(ValueId id);

  // oneDNN's description of `batch` samples.
  static memory::desc Desc(Format format, const Shape& shape, int64_t batch);

  // The memory of buffer `b` in a session.
  static memory Wrap(const RunContext& run, int b, const memory::desc& desc);

  // What runs a shared primitive in a session, with these arguments beside its own.
  static Executable Bind(std::shared_ptr<const onednn::Primitive> primitive, onednn::Args args);

  // ---- Nodes -------------------------------------------------------------------------------

  absl::Status LowerNode(const Node& node);

  // True if every input is u8. Constants stay float, and their operator with them.
  bool IsInteger(const Node& node) const;

  // Names what runs a float node; in a quantised network that is an island.
  void SetFloatImplementation(const Node& node, const std::string& implementation);

  // ---- Convolution and fully connected, float ------------------------------------------------

  absl::Status LowerFloatWeighted(const Node& node);

  static memory::dims WeightDims(const Node& node, const Shape& w);
  static memory::format_tag PlainTag(const Node& node);

  // The oneDNN primitive of a weighted node. x is the input's sample shape, which for integer
  // layers may be padded already: then `node`'s own pads do not count. Throws dnnl::error.
  static onednn::Primitive MakeWeighted(const Node& node, Format x_format, Format y_format,
                                        const memory::dims& w_dims,
                                        const onednn::Epilogue& epilogue, const Shape& x,
                                        const Shape& y, int64_t batch, bool padded = false);

  // The same for every batch, of a node that need not live as long.
  static std::shared_ptr<onednn::SharedPrimitives> ShareWeighted(
      const Node& node, Format x_format, Format y_format, const memory::dims& w_dims,
      const onednn::Epilogue& epilogue, const Shape& x, const Shape& y, bool padded = false);

  // Int8 weights in OIHW order.
  static absl::Span<const int8_t> Products(const Node& node, const IntegerWeights& integers);

  // The same, to be packed while the graph lives.
  static std::shared_ptr<PackedWeights> Plain(const Node& node, const memory::dims& w_dims,
                                              IntegerWeights integers);

  // Packs them for oneDNN, and counts their bytes.
  void PackLater(std::shared_ptr<PackedWeights> weights, const memory::desc& wanted);

  // A layer's primitives and that of batch 1, which the layer's plan begins with.
  struct Weighted {
    std::shared_ptr<onednn::SharedPrimitives> primitives;
    std::shared_ptr<const onednn::Primitive> first;
  };

  // Emits the step of a weighted node; residual < 0: none. The residual's memory becomes dst's
  // where it dies.
  void AddWeightedStep(const Weighted& made, int src, int residual, int dst,
                       std::shared_ptr<PackedWeights> weights, std::shared_ptr<memory> bias);

  // ---- Convolution and fully connected, integer ----------------------------------------------

  absl::Status LowerIntegerWeighted(const Node& node);

  // codes of the output = clamp(sums * multiplier + offset + residual codes * residual_ratio)
  struct Rescaling {
    std::vector<float> multiplier, offset;
    double residual_ratio = 0;
    graph::ClipRange clamp;
  };
  Rescaling RescalingOf(const Node& node, const IntegerWeights& weights) const;

  // An int8 layer on oneDNN.
  struct Int8OneDnn {
    bool padded = false;  // its input is the layer's after Pad()
    memory::dims w_dims;
    std::vector<float> bias;
    Weighted made;
  };
  // Throws dnnl::error.
  Int8OneDnn MakeInt8OneDnn(const Node& node, const Rescaling& rescaling) const;

  // Whether oneDNN's sums of a layer are exact on this CPU. largest: the magnitude of its integer
  // weights.
  static bool IsExactOnOneDnn(const Node& node, int largest);

  // Whether node `i` with codes will be one. Wants integers_[i] and int8_kernels_[i].
  bool RunsInt8OnOneDnn(int i) const;

  // What `integers_` holds of a node with codes whose input has codes.
  IntegerWeights Expand(const Node& node) const;

  absl::Status LowerInt8(const Node& node, const IntegerWeights& integers,
                         const Rescaling& rescaling);

  // A copy of `src` with the node's spatial padding made of code `zero`.
  int Pad(int src, const Node& node, int zero);

  // The s32 sums of a grouped layer by the int8 kernel that is exact for every weight; the buffer.
  int AddInt8Sums(const Node& node, const IntegerWeights& integers, int src);

  // Whether clustered weights run as int8 products of code and scale.
  bool ExpandsToInt8(const Node& node) const;

  static kernels::ConvGeometry GeometryOf(const Node& node, const Shape& x, const Shape& y);

  // ---- Convolution and fully connected, fixed point ------------------------------------------

  absl::Status LowerFixedPoint(const Node& node);

  // oneDNN to s32, a few images or rows at a time, each followed by the epilogue while its sums are
  // in the cache. False if oneDNN has no exact implementation of the layer.
  absl::StatusOr<bool> LowerFixedPointOneDnn(const Node& node, const IntegerWeights& integers,
                                             std::shared_ptr<const FixedPointLayer> layer);

  // The step that turns the sums in buffer `acc` into `dst`.
  void AddRequantize(int acc, int residual, int dst, std::shared_ptr<const FixedPointLayer> layer,
                     std::optional<graph::ClipRange> clip);

  // Runs a layer on the team; its arguments but for the scratch.
  using OwnKernel = std::function<void(const RunContext&, const kernels::ClusterConvArgs&)>;
  struct OwnLayer {
    OwnKernel run;        // null: oneDNN should run the layer
    bool padded = false;  // the kernel's input is the layer's after Pad()
    explicit operator bool() const { return run != nullptr; }
  };

  // On our own kernels, with the float epilogue.
  absl::Status LowerOwn(const Node& node, const OwnLayer& own, const Rescaling& rescaling);

  // ---- Our own kernels -----------------------------------------------------------------------

  // Whether a layer's int8 weights are depthwise: one filter for each channel.
  bool IsInt8Depthwise(const Node& node) const;

  // Packs weights for one of our kernels, and names it. largest: the magnitude of its integer
  // weights.
  OwnLayer PackOwn(const Node& node, int largest);

  // Packs any weights for the fastest of our kernels, later.
  OwnKernel UseKernel(const Node& node);

  // What runs an int8 layer on the kernels of conv_kernel.h; nothing where oneDNN should.
  struct Int8Kernel {
    kernels::ConvKernel kernel;
    bool padded = false;
  };
  std::optional<Int8Kernel> MakeInt8Kernel(const Node& node, int largest) const;

  void CountKernel(const kernels::ConvKernel& kernel, LayerInfo& layer);

  // The input that an own kernel reads.
  int OwnInput(const Node& node, const OwnLayer& own);

  // Cuts the layer for the team into a grid of unit ranges and output-channel ranges, whichever is
  // more even: late layers have few pixels, early ones few channels.
  static void RunCluster(const RunContext& run, const kernels::ConvKernel& kernel,
                         kernels::ClusterConvArgs args);

  // Cuts the layer for the team into ranges of rows.
  static void RunDepthwise(const RunContext& run, const kernels::PackedDepthwiseConv& packed,
                           kernels::ClusterConvArgs args);

  // ---- Other operators on codes --------------------------------------------------------------

  // An operand's place without its address, which only a run knows.
  struct Place {
    int buffer;
    Shape shape;
    Strides strides;
    int64_t batch_stride;

    template <typename T>
    Operand<T> At(const RunContext& run) const {
      using Plain = std::remove_const_t<T>;
      return {run.at<Plain>(buffer), shape, strides, batch_stride};
    }
  };
  Place PlaceOf(int b);

  // False if the operator has no integer form.
  bool LowerInteger(const Node& node);

  // Whether a reshape moves no byte: both sides lie in row-major order.
  static bool IsView(Format format, const Shape& in, const Shape& out);

  // Another value over the same memory.
  void DefineView(const Node& node, int src);

  // kReshape, kTranspose, kSlice, kPad.
  void LowerIntegerCopy(const Node& node, int src);

  // dst[to_offset + i . to] = table[src[from_offset + i . from]] for every index i; fill >= 0: the
  // rest of dst.
  void AddCopy(int src, int dst, Extents dims, const Strides& from, int64_t from_offset,
               const Strides& to, int64_t to_offset, int fill, std::optional<Table> table);

  // Max or average pooling over oneDNN in the formats of the two buffers; false if oneDNN refuses.
  bool AddPooling(const Node& node, int src, int dst);

  // ---- Channel shuffle -----------------------------------------------------------------------

  // reshape [c,h,w] -> [g,c/g,h,w], transpose, reshape back: one gather of channels. Recognised at
  // its first node (whose result and the next one's then exist nowhere); the other two are found
  // done.
  bool TryShuffle(const Node& node);

  // ---- Other operators in float --------------------------------------------------------------

  absl::Status LowerFloat(const Node& node);

  const graph::Graph& graph_;
  const PlanOptions& options_;
  Program program_;
  int node_ = 0;
  bool quantized_ = false;
  std::vector<Packing> packing_;
  std::vector<IntegerWeights> integers_;                 // by node; empty for those without codes
  std::vector<std::optional<Int8Kernel>> int8_kernels_;  // by node
  std::vector<std::optional<Int8OneDnn>> int8_onednn_;   // by node
  std::vector<std::string> slow_int8_;          // int8 layers that run in float for want of better
  std::vector<std::map<Format, int>> formats_;  // by ValueId: its buffers
  std::set<ValueId> fused_;                     // values that exist nowhere
};

}  // namespace tern::engine

#endif  // TERN_SERVER_ENGINE_LOWERING_H_
