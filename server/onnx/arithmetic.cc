// Element-wise operators, on the image's values and on constants.

#include <limits>
#include <utility>

#include "server/base/status_macros.h"
#include "server/onnx/importer.h"

namespace tern::onnx {
namespace {

using graph::Node;
using graph::OpType;
using graph::ValueId;

absl::Status Arithmetic(Op& op) {
  const bool add = op.type() == "Add", sub = op.type() == "Sub", mul = op.type() == "Mul";
  if (mul && op.item(0).dequantized != nullptr && op.item(1).dequantized != nullptr) {
    auto weights = ClusterProduct(*op.item(0).dequantized, *op.item(1).dequantized);
    if (weights != nullptr) {
      TERN_RETURN_IF_ERROR(op.Charge((weights->codes.elements() + 3) / 4));
      return op.Define(0, std::shared_ptr<const Dequantized>(std::move(weights)));
    }
  }
  if (op.AllConstant()) {
    TERN_ASSIGN_OR_RETURN(const Constant* a, op.ConstantInput(0));
    TERN_ASSIGN_OR_RETURN(const Constant* b, op.ConstantInput(1));
    return op.Define(0, Binary(add ? '+' : sub ? '-' : mul ? '*' : '/', *a, *b));
  }
  Node node{.op = add ? OpType::kAdd : sub ? OpType::kSub : mul ? OpType::kMul : OpType::kDiv};
  int rank = 0;
  for (int i : {0, 1}) {
    if (op.IsConstant(i)) continue;
    TERN_ASSIGN_OR_RETURN(const ValueId x, op.Variable(i));
    // ONNX aligns axes from the right, so unequal ranks would pair a batch with a channel.
    if (rank != 0 && op.shape(x).rank() + 1 != rank) {
      return op.Unimplemented("inputs have ranks ", rank, " and ", op.shape(x).rank() + 1);
    }
    rank = op.shape(x).rank() + 1;
  }
  for (int i : {0, 1}) {
    TERN_ASSIGN_OR_RETURN(const ValueId id,
                          op.IsConstant(i) ? op.ConstantValue(i, rank) : op.Variable(i));
    node.inputs.push_back(id);
  }
  return op.Emit(std::move(node));
}

absl::Status Activation(Op& op) {
  TERN_ASSIGN_OR_RETURN(const ValueId x, op.Variable(0));
  Node node{.op = OpType::kRelu, .inputs = {x}};
  if (op.type() == "Sigmoid") node.op = OpType::kSigmoid;
  if (op.type() == "HardSwish") node.op = OpType::kHardSwish;
  if (op.type() == "HardSigmoid") {
    node.op = OpType::kHardSigmoid;
    node.alpha = op.attributes().Float("alpha", 0.2f);
    node.beta = op.attributes().Float("beta", 0.5f);
  }
  return op.Emit(std::move(node));
}

absl::Status Clip(Op& op) {
  constexpr float kInfinity = std::numeric_limits<float>::infinity();
  TERN_ASSIGN_OR_RETURN(const ValueId x, op.Variable(0));
  graph::ClipRange range{-kInfinity, kInfinity};
  if (op.opset() < 11) {
    range.lo = op.attributes().Float("min", range.lo);
    range.hi = op.attributes().Float("max", range.hi);
  } else {
    if (op.Has(1)) {
      TERN_ASSIGN_OR_RETURN(range.lo, op.Scalar(1));
    }
    if (op.Has(2)) {
      TERN_ASSIGN_OR_RETURN(range.hi, op.Scalar(2));
    }
  }
  Node node{.op = OpType::kClip, .inputs = {x}};
  node.clip = range;
  return op.Emit(std::move(node));
}

absl::Status UnaryOfConstant(Op& op) {
  TERN_ASSIGN_OR_RETURN(const Constant* x, op.ConstantInput(0));
  return op.Define(0, Unary(op.type(), *x));
}

absl::Status Cast(Op& op) {
  const int64_t to = op.attributes().Int("to", 0);
  const bool is_float = to == ::onnx::TensorProto::FLOAT;
  const bool is_integer = to == ::onnx::TensorProto::INT64 || to == ::onnx::TensorProto::INT32;
  if (!is_float && !is_integer) return op.Unimplemented("casts to element type ", to);
  if (op.AllConstant()) {
    TERN_ASSIGN_OR_RETURN(const Constant* x, op.ConstantInput(0));
    return op.Define(0, CastTo(is_integer, *x));
  }
  if (!is_float) return op.Unimplemented("casts the image's values to integers");
  return op.Forward();
}

absl::Status Identity(Op& op) { return op.Forward(); }

// Nothing is dropped outside training.
absl::Status Dropout(Op& op) {
  op.attributes().Ignore("ratio");
  op.attributes().Ignore("seed");
  if (op.Has(2)) {
    TERN_ASSIGN_OR_RETURN(const std::vector<int64_t> training, op.Ints(2));
    if (training != std::vector<int64_t>{0}) {
      return op.Unimplemented("is in training mode; export the network in eval mode");
    }
  }
  return op.Forward();
}

}  // namespace

absl::Span<const Operator> ArithmeticOperators() {
  static constexpr Operator kOperators[] = {
      {"Add", 2, 2, Arithmetic},        {"Cast", 1, 1, Cast},
      {"Ceil", 1, 1, UnaryOfConstant},  {"Clip", 1, 3, Clip},
      {"Div", 2, 2, Arithmetic},        {"Dropout", 1, 3, Dropout},
      {"Floor", 1, 1, UnaryOfConstant}, {"HardSigmoid", 1, 1, Activation},
      {"HardSwish", 1, 1, Activation},  {"Identity", 1, 1, Identity},
      {"Mul", 2, 2, Arithmetic},        {"Neg", 1, 1, UnaryOfConstant},
      {"Relu", 1, 1, Activation},       {"Sigmoid", 1, 1, Activation},
      {"Sqrt", 1, 1, UnaryOfConstant},  {"Sub", 2, 2, Arithmetic},
  };
  return kOperators;
}

}  // namespace tern::onnx
