// QuantizeLinear and DequantizeLinear, on the image's values and on constants.

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <limits>
#include <utility>

#include "server/base/status_macros.h"
#include "server/onnx/importer.h"

namespace tern::onnx {
namespace {

using graph::ValueId;
using ::onnx::TensorProto;

// Elements of a constant of integers as the file holds them.
absl::StatusOr<std::vector<int64_t>> Integers(Op& op, const Constant& constant,
                                              absl::string_view what) {
  std::vector<int64_t> result;
  if (constant.integer) {
    constexpr int64_t kMost = std::numeric_limits<int32_t>::max();
    for (const BatchInt& i : constant.ints) {
      if (!i.plain()) return op.Unimplemented(what, " depends on the batch");
      if (i.offset < -kMost || i.offset > kMost) {
        return op.Unimplemented(what, " holds ", i.offset);
      }
      result.push_back(i.offset);
    }
    return result;
  }
  if (constant.codes.empty()) return op.Invalid(what, " holds no integers");
  const auto copy = [&](auto span) { result.assign(span.begin(), span.end()); };
  switch (constant.codes.dtype()) {
    case DType::kS8:
      copy(constant.codes.data<int8_t>());
      break;
    case DType::kU8:
      copy(constant.codes.data<uint8_t>());
      break;
    default:
      copy(constant.codes.data<int32_t>());  // INT32_MIN stays far inside 64 bits
  }
  return result;
}

// TensorProto's type of the codes that a constant holds. int32 are also the integers of shapes,
// whose width ToConstant does not keep; nothing else in a quantised file is dequantised.
int TypeOf(const Constant& constant) {
  if (constant.codes.empty()) return TensorProto::INT32;
  if (constant.codes.dtype() == DType::kS8) return TensorProto::INT8;
  if (constant.codes.dtype() == DType::kU8) return TensorProto::UINT8;
  return TensorProto::INT32;
}

struct Parameters {
  std::vector<float> scales;
  std::vector<int64_t> zero_points;  // as many
  int type = 0;                      // of the codes
};

// Inputs 1 and 2. `type` is that of the codes if there are no zero points.
absl::StatusOr<Parameters> ReadParameters(Op& op, int type) {
  Parameters parameters;
  TERN_ASSIGN_OR_RETURN(const Constant* scale, op.ConstantInput(1));
  if (scale->integer || scale->rank() > 1 || scale->elements() < 1) {
    return op.Invalid("scale has shape ", Shape(scale->dims).ToString(),
                      ", wanted a float or a list of floats");
  }
  const absl::Span<const float> scales = scale->floats.data<float>();
  parameters.scales.assign(scales.begin(), scales.end());
  for (float s : parameters.scales) {
    if (!std::isfinite(s) || s <= 0) return op.Invalid("a scale is ", s);
  }
  parameters.type = type;
  parameters.zero_points.assign(parameters.scales.size(), 0);
  if (!op.Has(2)) return parameters;
  if (op.item(2).constant == nullptr) return op.Unimplemented("input 2 is not a constant");
  const Constant& zero = *op.item(2).constant;
  TERN_ASSIGN_OR_RETURN(parameters.zero_points, Integers(op, zero, "the zero point"));
  if (parameters.zero_points.size() != parameters.scales.size()) {
    return op.Invalid("got ", parameters.zero_points.size(), " zero points for ",
                      parameters.scales.size(), " scales");
  }
  parameters.type = TypeOf(zero);
  return parameters;
}

// The axis of several scales in a constant of this shape, checked.
absl::StatusOr<int> ScaleAxis(Op& op, const Parameters& parameters, const Shape& shape) {
  const int64_t given = op.attributes().Int("axis", 1);
  if (parameters.scales.size() == 1) return 0;
  TERN_ASSIGN_OR_RETURN(const int axis, op.PlainAxis(given, shape.rank()));
  if (shape[axis] != static_cast<int64_t>(parameters.scales.size())) {
    return op.Invalid("got ", parameters.scales.size(), " scales for ", shape[axis],
                      " positions along axis ", axis);
  }
  return axis;
}

// One pair for a whole activation, as u8.
absl::StatusOr<QuantParams> ActivationParameters(Op& op, const Parameters& parameters) {
  if (parameters.type != TensorProto::UINT8 && parameters.type != TensorProto::INT8) {
    return op.Unimplemented("quantises values to element type ", parameters.type,
                            "; int8 and uint8 are supported");
  }
  op.attributes().Ignore("axis");
  if (parameters.scales.size() != 1) {
    return op.Unimplemented("values have ", parameters.scales.size(),
                            " scales; one per tensor is supported");
  }
  const int64_t shift = parameters.type == TensorProto::INT8 ? 128 : 0;
  return QuantParams{parameters.scales[0], static_cast<int32_t>(parameters.zero_points[0] + shift)};
}

absl::Status QuantizeConstant(Op& op, const Parameters& parameters) {
  TERN_ASSIGN_OR_RETURN(const Constant* x, op.ConstantInput(0));
  if (x->integer) return op.Invalid("input 0 holds integers, wanted floats");
  const bool is_signed = parameters.type == TensorProto::INT8;
  if (!is_signed && parameters.type != TensorProto::UINT8) {
    return op.Unimplemented("quantises to element type ", parameters.type,
                            "; int8 and uint8 are supported");
  }
  const Shape shape(x->dims);
  TERN_ASSIGN_OR_RETURN(const int axis, ScaleAxis(op, parameters, shape));
  TERN_RETURN_IF_ERROR(op.Charge((x->elements() + 3) / 4));
  int64_t inner = 1;
  for (int d = axis + 1; d < shape.rank(); ++d) inner *= shape[d];
  Constant out{.dims = x->dims};
  out.codes = Tensor(is_signed ? DType::kS8 : DType::kU8, shape);
  const absl::Span<const float> from = x->floats.data<float>();
  const float lo = is_signed ? -128.0f : 0.0f, hi = is_signed ? 127.0f : 255.0f;
  for (size_t i = 0; i < from.size(); ++i) {
    const size_t j = parameters.scales.size() == 1 ? 0 : i / inner % parameters.scales.size();
    const float zero = static_cast<float>(parameters.zero_points[j]);
    const float q = std::nearbyint(from[i] / parameters.scales[j]) + zero;
    const float code = std::isnan(q) ? zero : std::min(hi, std::max(lo, q));
    if (is_signed) {
      out.codes.data<int8_t>()[i] = static_cast<int8_t>(code);
    } else {
      out.codes.data<uint8_t>()[i] = static_cast<uint8_t>(code);
    }
  }
  return op.Define(0, std::move(out));
}

absl::Status QuantizeLinear(Op& op) {
  TERN_ASSIGN_OR_RETURN(const Parameters parameters, ReadParameters(op, TensorProto::UINT8));
  if (op.IsConstant(0)) return QuantizeConstant(op, parameters);
  TERN_ASSIGN_OR_RETURN(const ValueId x, op.Variable(0));
  TERN_ASSIGN_OR_RETURN(const QuantParams quant, ActivationParameters(op, parameters));
  return op.Quantize(x, quant, parameters.type);
}

absl::Status DequantizeConstant(Op& op, const Constant& constant) {
  const int type = TypeOf(constant);
  TERN_ASSIGN_OR_RETURN(const Parameters parameters, ReadParameters(op, type));
  if (op.Has(2) && parameters.type != type) {
    return op.Invalid("codes have element type ", type, ", their zero point ", parameters.type);
  }
  if (type == TensorProto::INT32 &&
      parameters.zero_points != std::vector<int64_t>(parameters.scales.size(), 0)) {
    return op.Invalid("int32 codes have a zero point that is not 0");
  }
  TERN_ASSIGN_OR_RETURN(const std::vector<int64_t> codes, Integers(op, constant, "input 0"));
  const Shape shape(constant.dims);
  auto out = std::make_shared<Dequantized>();
  TERN_ASSIGN_OR_RETURN(out->axis, ScaleAxis(op, parameters, shape));
  out->scales = parameters.scales;
  int64_t inner = 1;
  for (int d = out->axis + 1; d < shape.rank(); ++d) inner *= shape[d];
  const auto code = [&](size_t i) {
    const size_t j = parameters.scales.size() == 1 ? 0 : i / inner % parameters.scales.size();
    return codes[i] - parameters.zero_points[j];
  };
  bool narrow = true;
  for (size_t i = 0; i < codes.size(); ++i) {
    out->largest = std::max<int64_t>(out->largest, std::abs(code(i)));
    narrow = narrow && code(i) >= -128 && code(i) <= 127;
  }
  const int64_t n = static_cast<int64_t>(codes.size());
  TERN_RETURN_IF_ERROR(op.Charge(narrow ? (n + 3) / 4 : n));
  out->codes = Tensor(narrow ? DType::kS8 : DType::kS32, shape);
  for (size_t i = 0; i < codes.size(); ++i) {
    if (narrow) {
      out->codes.data<int8_t>()[i] = static_cast<int8_t>(code(i));
    } else {
      out->codes.data<int32_t>()[i] = static_cast<int32_t>(code(i));
    }
  }
  return op.Define(0, std::shared_ptr<const Dequantized>(std::move(out)));
}

absl::Status DequantizeLinear(Op& op) {
  const Item& x = op.item(0);
  if (x.constant != nullptr) return DequantizeConstant(op, *x.constant);
  if (x.code_type == 0) {
    return op.Invalid("input 0 holds reals, wanted the codes of QuantizeLinear or a constant");
  }
  TERN_ASSIGN_OR_RETURN(const Parameters parameters, ReadParameters(op, x.code_type));
  TERN_ASSIGN_OR_RETURN(const QuantParams quant, ActivationParameters(op, parameters));
  if (op.Has(2) && parameters.type != x.code_type) {
    return op.Invalid("codes have element type ", x.code_type, ", their zero point ",
                      parameters.type);
  }
  return op.Dequantize(x.value, quant);
}

}  // namespace

std::shared_ptr<Dequantized> ClusterProduct(const Dequantized& codes, const Dequantized& scales) {
  const Shape &a = codes.codes.shape(), &b = scales.codes.shape();
  if (a.rank() < 2 || a.rank() != b.rank() || a[0] != b[0] || a[1] != b[1] ||
      b.elements() != b[0] * b[1] || b.elements() == 0 || codes.codes.dtype() != DType::kS8 ||
      scales.codes.dtype() != DType::kS8 || codes.axis != 0 ||
      static_cast<int64_t>(codes.scales.size()) != a[0] || !codes.cluster_scales.empty() ||
      !scales.cluster_scales.empty() || scales.scales != std::vector<float>{1.0f}) {
    return nullptr;
  }
  for (const int8_t scale : scales.codes.data<int8_t>()) {
    if (scale < 1) return nullptr;
  }
  auto product = std::make_shared<Dequantized>(codes);
  product->cluster_scales = scales.codes.Reshaped({b[0], b[1]});
  return product;
}

absl::Span<const Operator> QuantizationOperators() {
  static constexpr Operator kOperators[] = {
      {"DequantizeLinear", 2, 3, DequantizeLinear},
      {"QuantizeLinear", 2, 3, QuantizeLinear},
  };
  return kOperators;
}

}  // namespace tern::onnx
