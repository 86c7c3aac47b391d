// The state of one import, and what the operators of layers.cc, arithmetic.cc, movement.cc and
// quantization.cc see of it. Internal to this folder.
#ifndef TERN_SERVER_ONNX_IMPORTER_H_
#define TERN_SERVER_ONNX_IMPORTER_H_

#include <onnx/onnx_pb.h>

#include <memory>
#include <optional>
#include <string>
#include <unordered_map>
#include <vector>

#include "absl/status/statusor.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/string_view.h"
#include "absl/types/span.h"
#include "server/graph/graph.h"
#include "server/onnx/attributes.h"
#include "server/onnx/constant.h"

namespace tern::onnx {

// What DequantizeLinear makes of constant codes: real = scales[j] * codes, j the position along
// `axis`, or 0 if there is one scale. The zero points are subtracted already. Weights of clusters,
// as Export writes them, are also multiplied by the scale of their output and input channel.
struct Dequantized {
  Tensor codes;  // s8 if all fit, else s32
  std::vector<float> scales;
  int axis = 0;
  int64_t largest = 0;    // magnitude of a code
  Tensor cluster_scales;  // s8 [o, c] in 1..127 beside codes [o, c, ...]; empty: all 1
};

// What an ONNX name stands for: a value of the graph (its axis 0, the batch, is not part of
// its shape), a constant, or a weight not yet converted.
struct Item {
  graph::ValueId value = graph::kNoValue;
  std::shared_ptr<Constant> constant;
  std::shared_ptr<const Dequantized> dequantized;
  // UINT8 or INT8 (TensorProto) if the name stands for the codes of `value`, as QuantizeLinear
  // writes them, and not for its reals.
  int code_type = 0;
  ::onnx::TensorProto* initializer = nullptr;
  bool unsupported = false;  // an output that Tern does not compute, such as MaxPool's indices
};

// Turns the nodes of one file, in their order, into a graph. Not thread-safe.
class Importer {
 public:
  // Both must outlive the importer; weights are moved out of `model`.
  Importer(::onnx::ModelProto& model, int opset) : model_(model), opset_(opset) {}

  // Errors as those of Import().
  absl::StatusOr<graph::Graph> Run();

 private:
  friend class Op;

  absl::Status AddInitializers();
  absl::Status AddInput();
  absl::Status AddNode(::onnx::NodeProto& proto);
  absl::Status SetOutput();

  // The item of a name, converted if it is a weight.
  absl::StatusOr<const Item*> Find(const std::string& name);
  // INVALID_ARGUMENT if the name is taken.
  absl::Status Define(const std::string& name, Item item);
  // `wanted` without control or non-ASCII characters, shortened, and with a number behind if
  // it is taken.
  std::string UniqueName(const std::string& wanted);
  // Accounts for `elements` floats that folding or sharing adds to what the file holds, so
  // that a small file cannot take all memory. INVALID_ARGUMENT when there are too many.
  absl::Status Charge(int64_t elements);

  ::onnx::ModelProto& model_;
  const int opset_;
  bool fixed_batch_ = false;  // the file says 1 for the batch, so a literal 1 may mean it
  graph::Graph graph_;
  std::unordered_map<std::string, Item> items_;
  std::unordered_map<std::string, int> mentions_;  // how often nodes read a name
  std::unordered_map<std::string, int> names_;     // node names taken -> next number to try
  int64_t charged_ = 0;
};

// One ONNX node while it is converted. Inputs are checked to exist, and to be present up to
// the operator's least number, before a handler runs.
class Op {
 public:
  Op(Importer& importer, ::onnx::NodeProto& proto, std::string name)
      : importer_(importer), proto_(proto), name_(std::move(name)), attributes_(proto) {}

  // Looks up the inputs; `least` of them must be present, more than `most` are an error.
  absl::Status Resolve(int least, int most);

  int opset() const { return importer_.opset_; }
  bool fixed_batch() const { return importer_.fixed_batch_; }
  const std::string& type() const { return proto_.op_type(); }
  Attributes& attributes() { return attributes_; }
  int inputs() const { return static_cast<int>(inputs_.size()); }
  int outputs() const { return proto_.output_size(); }

  // Whether the optional input is given.
  bool Has(int i) const { return i < inputs() && inputs_[i] != nullptr; }
  const Item& item(int i) const { return *inputs_[i]; }
  bool IsConstant(int i) const {
    return inputs_[i]->constant != nullptr || inputs_[i]->dequantized != nullptr;
  }
  bool AllConstant() const;
  // UNIMPLEMENTED if the input is a constant, or codes.
  absl::StatusOr<graph::ValueId> Variable(int i) const;
  // UNIMPLEMENTED if it is computed from the image, or codes.
  absl::StatusOr<const Constant*> ConstantInput(int i) const;
  // A constant f32 input, moved out of the file's weights if nobody else reads it.
  absl::StatusOr<Tensor> Weights(int i);
  // A constant input that DequantizeLinear made, as the weights of a layer whose output channels
  // lie along `axis` of it (the result's first; `axis` 1 of a matrix is transposed); nothing for
  // other inputs. UNIMPLEMENTED: codes beyond -128..127 (with cluster scales -7..7), scales along
  // another axis.
  absl::StatusOr<std::optional<QuantizedWeights>> CodedWeights(int i, int axis) const;
  // A constant integer input, flattened.
  absl::StatusOr<std::vector<BatchInt>> BatchInts(int i) const;
  absl::StatusOr<std::vector<int64_t>> Ints(int i) const;  // that do not depend on the batch
  // A constant of one element.
  absl::StatusOr<float> Scalar(int i) const;

  const Shape& shape(graph::ValueId id) const { return importer_.graph_.shape(id); }

  // Appends a node that computes output `i`, or a value between two nodes of one operator.
  // `shape` declares what InferShape only checks (kReshape, kReduceMean).
  absl::Status Emit(graph::Node node, int i = 0, std::optional<Shape> shape = std::nullopt);
  absl::StatusOr<graph::ValueId> Between(graph::Node node,
                                         std::optional<Shape> shape = std::nullopt);
  // Input i as a constant value of the graph, for a reader of rank `rank` (with the batch).
  absl::StatusOr<graph::ValueId> ConstantValue(int i, int rank);
  // Output 0 is input i / output i is a value or constant.
  absl::Status Forward(int i = 0);
  absl::Status Define(int i, graph::ValueId value);
  absl::Status Define(int i, absl::StatusOr<Constant> constant);
  absl::Status Define(int i, std::shared_ptr<const Dequantized> dequantized);
  // Output 0 is the codes of `x`, or their reals again. UNIMPLEMENTED if other parameters read them
  // than wrote them.
  absl::Status Quantize(graph::ValueId x, const QuantParams& quant, int code_type);
  absl::Status Dequantize(graph::ValueId codes, const QuantParams& quant);
  // As Importer::Charge.
  absl::Status Charge(int64_t elements) const { return importer_.Charge(elements); }

  // An axis of ONNX, counted from the batch or back from the end, as an axis of the sample.
  // INVALID_ARGUMENT if there is none, UNIMPLEMENTED if it is the batch.
  absl::StatusOr<int> SampleAxis(int64_t axis, graph::ValueId value) const;
  // An axis of a constant of that rank.
  absl::StatusOr<int> PlainAxis(int64_t axis, int rank) const;

  template <typename... Args>
  absl::Status Invalid(const Args&... what) const {
    return absl::InvalidArgumentError(absl::StrCat(Prefix(), what...));
  }
  template <typename... Args>
  absl::Status Unimplemented(const Args&... what) const {
    return absl::UnimplementedError(absl::StrCat(Prefix(), what...));
  }
  // "node 'name' (Type): "
  std::string Prefix() const;

 private:
  Importer& importer_;
  ::onnx::NodeProto& proto_;
  const std::string name_;
  Attributes attributes_;
  std::vector<const Item*> inputs_;  // null where left out
  // By input: the reals of a `dequantized` one, once somebody wanted them.
  mutable std::vector<std::shared_ptr<Constant>> reals_;
};

struct Operator {
  const char* type;
  int least_inputs, most_inputs;
  absl::Status (*handler)(Op& op);
};

// The product of two constants as weights of clusters: `codes` s8 [o, c, ...] with one scale per o,
// times `scales` s8 [o, c, 1, ...] of 1..127 with scale 1. Null for any other two.
std::shared_ptr<Dequantized> ClusterProduct(const Dequantized& codes, const Dequantized& scales);

absl::Span<const Operator> LayerOperators();       // convolution, pooling, normalisation, ...
absl::Span<const Operator> ArithmeticOperators();  // element-wise
absl::Span<const Operator> MovementOperators();    // shapes and rearrangement
absl::Span<const Operator> QuantizationOperators();

}  // namespace tern::onnx

#endif  // TERN_SERVER_ONNX_IMPORTER_H_
