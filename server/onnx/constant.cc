#include "server/onnx/constant.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <utility>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "server/base/status_macros.h"
#include "server/graph/graph.h"

namespace tern::onnx {
namespace {

using ::onnx::TensorProto;

absl::Status Overflow() {
  return absl::InvalidArgumentError("integer arithmetic on shapes overflows");
}

std::string ToString(const std::vector<int64_t>& dims) {
  return absl::StrCat("[", absl::StrJoin(dims, ","), "]");
}

// A constant of `dims` whose i-th element is x's element source(i).
template <typename Source>
absl::StatusOr<Constant> Rearrange(const Constant& x, std::vector<int64_t> dims, Source source) {
  TERN_ASSIGN_OR_RETURN(const int64_t n, CheckedElements(dims));
  if (n > (x.integer ? kMaxInts : kMaxFolded)) {
    return absl::UnimplementedError(absl::StrCat("a computed constant has ", n, " elements"));
  }
  Constant out{.dims = std::move(dims), .integer = x.integer};
  if (x.integer) {
    out.ints.reserve(n);
    for (int64_t i = 0; i < n; ++i) out.ints.push_back(x.ints[source(i)]);
  } else {
    out.floats = Tensor(DType::kF32, Shape(out.dims));
    const absl::Span<float> to = out.floats.data<float>();
    const absl::Span<const float> from = x.floats.data<float>();
    for (int64_t i = 0; i < n; ++i) to[i] = from[source(i)];
  }
  return out;
}

absl::StatusOr<BatchInt> Apply(char op, BatchInt a, BatchInt b) {
  BatchInt r;
  bool overflow = false;
  switch (op) {
    case '+':
      overflow = __builtin_add_overflow(a.batches, b.batches, &r.batches);
      overflow |= __builtin_add_overflow(a.offset, b.offset, &r.offset);
      break;
    case '-':
      overflow = __builtin_sub_overflow(a.batches, b.batches, &r.batches);
      overflow |= __builtin_sub_overflow(a.offset, b.offset, &r.offset);
      break;
    case '*':
      if (!a.plain()) std::swap(a, b);
      if (!a.plain()) return absl::UnimplementedError("a shape grows with the batch squared");
      overflow = __builtin_mul_overflow(a.offset, b.batches, &r.batches);
      overflow |= __builtin_mul_overflow(a.offset, b.offset, &r.offset);
      break;
    default:  // '/'
      if (!b.plain()) return absl::UnimplementedError("a shape is divided by the batch");
      if (b.offset == 0) return absl::InvalidArgumentError("a shape is divided by zero");
      if (b.offset == -1) return Apply('-', BatchInt{}, a);  // INT64_MIN / -1 overflows
      if (!a.plain() && (a.batches % b.offset != 0 || a.offset % b.offset != 0)) {
        return absl::UnimplementedError("a fraction of the batch is a shape");
      }
      r = {a.batches / b.offset, a.offset / b.offset};
      break;
  }
  if (overflow) return Overflow();
  return r;
}

float Apply(char op, float a, float b) {
  switch (op) {
    case '+':
      return a + b;
    case '-':
      return a - b;
    case '*':
      return a * b;
    default:
      return a / b;
  }
}

// Copies little-endian elements of type From out of raw bytes.
template <typename From, typename Take>
absl::Status ReadRaw(const TensorProto& proto, int64_t n, Take take) {
  if (proto.raw_data().size() != static_cast<size_t>(n) * sizeof(From)) {
    return absl::InvalidArgumentError(absl::StrCat("tensor '", proto.name(), "' has ",
                                                   proto.raw_data().size(), " bytes, wanted ",
                                                   n * static_cast<int64_t>(sizeof(From))));
  }
  const char* at = proto.raw_data().data();
  for (int64_t i = 0; i < n; ++i, at += sizeof(From)) {
    From value;
    std::memcpy(&value, at, sizeof(From));
    take(i, value);
  }
  return absl::OkStatus();
}

template <typename From, typename Field, typename Take>
absl::Status Read(const TensorProto& proto, const Field& field, int64_t n, Take take) {
  if (proto.has_raw_data()) return ReadRaw<From>(proto, n, take);
  if (field.size() != n) {
    return absl::InvalidArgumentError(
        absl::StrCat("tensor '", proto.name(), "' has ", field.size(), " elements, wanted ", n));
  }
  for (int i = 0; i < field.size(); ++i) take(i, field.Get(i));
  return absl::OkStatus();
}

// Whether the bytes can hold n elements, before anything of that size is allocated.
bool HoldsElements(const TensorProto& proto, int64_t n) {
  return n <= static_cast<int64_t>(proto.raw_data().size()) || n <= proto.float_data_size() ||
         n <= proto.double_data_size() || n <= proto.int32_data_size() ||
         n <= proto.int64_data_size();
}

absl::Status ReadCodes(const TensorProto& proto, int64_t n, Constant& out) {
  const auto read = [&](DType type, auto sample) {
    using T = decltype(sample);
    out.codes = Tensor(type, Shape(out.dims));
    const absl::Span<T> to = out.codes.data<T>();
    return Read<T>(proto, proto.int32_data(), n,
                   [&](int64_t i, int64_t value) { to[i] = static_cast<T>(value); });
  };
  if (proto.data_type() == TensorProto::INT8) return read(DType::kS8, int8_t{});
  if (proto.data_type() == TensorProto::UINT8) return read(DType::kU8, uint8_t{});
  return read(DType::kS32, int32_t{});
}

}  // namespace

int64_t Constant::elements() const {
  if (!codes.empty()) return codes.elements();
  return integer ? static_cast<int64_t>(ints.size()) : floats.elements();
}

Constant Constant::Ints(const std::vector<BatchInt>& values) {
  return {.dims = {static_cast<int64_t>(values.size())}, .integer = true, .ints = values};
}

absl::StatusOr<int64_t> CheckedElements(const std::vector<int64_t>& dims) {
  if (dims.size() > static_cast<size_t>(graph::kMaxRank)) {
    return absl::InvalidArgumentError(absl::StrCat("a tensor has rank ", dims.size()));
  }
  int64_t product = 1;
  for (int64_t dim : dims) {
    if (dim < 0 || (product > 0 && dim > graph::kMaxElements / product)) {
      return absl::InvalidArgumentError(
          absl::StrCat("a tensor has the impossible extents ", ToString(dims)));
    }
    product *= dim;
  }
  return product;
}

absl::StatusOr<Constant> ToConstant(TensorProto& proto) {
  if (proto.data_location() == TensorProto::EXTERNAL || proto.external_data_size() > 0) {
    return absl::InvalidArgumentError(absl::StrCat(
        "tensor '", proto.name(), "' keeps its data in another file; weights must be inside"));
  }
  if (proto.has_segment()) {
    return absl::UnimplementedError(absl::StrCat("tensor '", proto.name(), "' comes in segments"));
  }
  Constant out;
  out.dims.assign(proto.dims().begin(), proto.dims().end());
  TERN_ASSIGN_OR_RETURN(const int64_t n, CheckedElements(out.dims));
  if (!HoldsElements(proto, n)) {
    return absl::InvalidArgumentError(absl::StrCat("tensor '", proto.name(), "' of extents ",
                                                   ToString(out.dims), " lacks its data"));
  }
  const int type = proto.data_type();
  if (type == TensorProto::FLOAT || type == TensorProto::DOUBLE) {
    out.floats = Tensor(DType::kF32, Shape(out.dims));
    const absl::Span<float> to = out.floats.data<float>();
    const auto take = [&](int64_t i, double value) { to[i] = static_cast<float>(value); };
    if (type == TensorProto::FLOAT) {
      TERN_RETURN_IF_ERROR(Read<float>(proto, proto.float_data(), n, take));
    } else {
      TERN_RETURN_IF_ERROR(Read<double>(proto, proto.double_data(), n, take));
    }
  } else if (type == TensorProto::INT8 || type == TensorProto::UINT8 ||
             (type == TensorProto::INT32 && n > kMaxInts)) {
    TERN_RETURN_IF_ERROR(ReadCodes(proto, n, out));
  } else if (type == TensorProto::INT64 || type == TensorProto::INT32 ||
             type == TensorProto::BOOL) {
    if (n > kMaxInts) {
      return absl::UnimplementedError(
          absl::StrCat("tensor '", proto.name(), "' holds ", n, " integers"));
    }
    out.integer = true;
    out.ints.resize(n);
    const auto take = [&](int64_t i, int64_t value) { out.ints[i] = {0, value}; };
    if (type == TensorProto::INT64) {
      TERN_RETURN_IF_ERROR(Read<int64_t>(proto, proto.int64_data(), n, take));
    } else if (type == TensorProto::INT32) {
      TERN_RETURN_IF_ERROR(Read<int32_t>(proto, proto.int32_data(), n, take));
    } else {
      TERN_RETURN_IF_ERROR(Read<uint8_t>(proto, proto.int32_data(), n, take));
    }
  } else {
    return absl::UnimplementedError(absl::StrCat("tensor '", proto.name(), "' has element type ",
                                                 type,
                                                 "; float, double, int8, uint8, int32, int64 "
                                                 "and bool are known"));
  }
  proto.Clear();
  return out;
}

absl::StatusOr<Constant> Binary(char op, const Constant& a, const Constant& b) {
  if (a.integer != b.integer) {
    return absl::InvalidArgumentError("arithmetic mixes integers and floats");
  }
  const size_t rank = std::max(a.dims.size(), b.dims.size());
  std::vector<int64_t> dims(rank);
  // Step of each operand per output axis; 0 along a stretched one.
  std::vector<int64_t> step_a(rank), step_b(rank);
  int64_t run_a = 1, run_b = 1;
  for (size_t i = 1; i <= rank; ++i) {
    const int64_t da = i <= a.dims.size() ? a.dims[a.dims.size() - i] : 1;
    const int64_t db = i <= b.dims.size() ? b.dims[b.dims.size() - i] : 1;
    if (da != db && da != 1 && db != 1) {
      return absl::InvalidArgumentError(absl::StrCat("constants ", ToString(a.dims), " and ",
                                                     ToString(b.dims), " do not broadcast"));
    }
    dims[rank - i] = da == 1 ? db : da;
    step_a[rank - i] = da == 1 ? 0 : run_a;
    step_b[rank - i] = db == 1 ? 0 : run_b;
    run_a *= da;
    run_b *= db;
  }
  const auto index = [&](int64_t i, const std::vector<int64_t>& step) {
    int64_t at = 0;
    for (size_t d = rank; d-- > 0; i /= dims[d]) at += i % dims[d] * step[d];
    return at;
  };
  TERN_ASSIGN_OR_RETURN(Constant out,
                        Rearrange(a, dims, [&](int64_t i) { return index(i, step_a); }));
  for (int64_t i = 0; i < out.elements(); ++i) {
    if (out.integer) {
      TERN_ASSIGN_OR_RETURN(out.ints[i], Apply(op, out.ints[i], b.ints[index(i, step_b)]));
    } else {
      float& value = out.floats.data<float>()[i];
      value = Apply(op, value, b.floats.data<float>()[index(i, step_b)]);
    }
  }
  return out;
}

absl::StatusOr<Constant> Unary(absl::string_view type, const Constant& x) {
  Constant out = x;
  if (type == "Identity") return out;
  if (x.integer) {
    if (type != "Neg") {
      return absl::InvalidArgumentError(absl::StrCat(type, " of integers is not defined"));
    }
    for (BatchInt& value : out.ints) {
      TERN_ASSIGN_OR_RETURN(value, Apply('-', BatchInt{}, value));
    }
    return out;
  }
  for (float& value : out.floats.data<float>()) {
    if (type == "Neg") value = -value;
    if (type == "Sqrt") value = std::sqrt(value);
    if (type == "Floor") value = std::floor(value);
    if (type == "Ceil") value = std::ceil(value);
  }
  return out;
}

absl::StatusOr<Constant> CastTo(bool integer, const Constant& x) {
  if (integer == x.integer) return x;
  Constant out{.dims = x.dims, .integer = integer};
  if (!integer) {
    out.floats = Tensor(DType::kF32, Shape(out.dims));
    for (size_t i = 0; i < x.ints.size(); ++i) {
      if (!x.ints[i].plain()) return absl::UnimplementedError("the batch is cast to a float");
      out.floats.data<float>()[i] = static_cast<float>(x.ints[i].offset);
    }
    return out;
  }
  if (x.elements() > kMaxInts) {
    return absl::UnimplementedError(absl::StrCat(x.elements(), " floats are cast to integers"));
  }
  for (float value : x.floats.data<float>()) {
    // 2^63; the comparison is false for NaN.
    if (!(std::fabs(value) < 9223372036854775808.0f)) return Overflow();
    out.ints.push_back({0, static_cast<int64_t>(value)});
  }
  return out;
}

absl::StatusOr<Constant> Select(const Constant& x, int axis,
                                const std::vector<int64_t>& positions) {
  std::vector<int64_t> dims = x.dims;
  const int64_t extent = dims[axis], count = static_cast<int64_t>(positions.size());
  dims[axis] = count;
  int64_t inner = 1;
  for (size_t d = axis + 1; d < dims.size(); ++d) inner *= dims[d];
  return Rearrange(x, std::move(dims), [&](int64_t i) {
    const int64_t outer = i / inner / count;
    return (outer * extent + positions[i / inner % count]) * inner + i % inner;
  });
}

absl::StatusOr<Constant> Concat(const std::vector<const Constant*>& parts, int axis) {
  const Constant& first = *parts[0];
  std::vector<int64_t> dims = first.dims;
  dims[axis] = 0;
  for (const Constant* part : parts) {
    bool fits = part->integer == first.integer && part->dims.size() == dims.size();
    for (size_t d = 0; fits && d < dims.size(); ++d) {
      fits = static_cast<int>(d) == axis || part->dims[d] == dims[d];
    }
    if (!fits) {
      return absl::InvalidArgumentError(absl::StrCat("constants ", ToString(first.dims), " and ",
                                                     ToString(part->dims), " do not join"));
    }
    dims[axis] += part->dims[axis];  // each fits 31 bits and there are fewer than 2^31
  }
  TERN_ASSIGN_OR_RETURN(const int64_t n, CheckedElements(dims));
  if (n > (first.integer ? kMaxInts : kMaxFolded)) {
    return absl::UnimplementedError(absl::StrCat("a computed constant has ", n, " elements"));
  }
  Constant out{.dims = dims, .integer = first.integer};
  if (out.integer) {
    out.ints.resize(n);
  } else {
    out.floats = Tensor(DType::kF32, Shape(dims));
  }
  int64_t outer = 1, inner = 1;
  for (int d = 0; d < axis; ++d) outer *= dims[d];
  for (size_t d = axis + 1; d < dims.size(); ++d) inner *= dims[d];
  int64_t done = 0;  // along the axis
  for (const Constant* part : parts) {
    const int64_t run = part->dims[axis] * inner;
    for (int64_t o = 0; o < outer; ++o) {
      const int64_t to = (o * dims[axis] + done) * inner;
      for (int64_t i = 0; i < run; ++i) {
        if (out.integer) {
          out.ints[to + i] = part->ints[o * run + i];
        } else {
          out.floats.data<float>()[to + i] = part->floats.data<float>()[o * run + i];
        }
      }
    }
    done += part->dims[axis];
  }
  return out;
}

absl::StatusOr<Constant> Transpose(const Constant& x, const std::vector<int64_t>& perm) {
  const size_t rank = x.dims.size();
  std::vector<bool> seen(rank);
  std::vector<int64_t> dims;
  for (int64_t axis : perm) {
    if (axis < 0 || axis >= static_cast<int64_t>(rank) || seen[axis]) break;
    seen[axis] = true;
    dims.push_back(x.dims[axis]);
  }
  if (perm.size() != rank || dims.size() != rank) {
    return absl::InvalidArgumentError(
        absl::StrCat(ToString(perm), " does not permute the axes of ", ToString(x.dims)));
  }
  std::vector<int64_t> step(rank, 1);  // of x, per axis of x
  for (size_t d = rank; d-- > 1;) step[d - 1] = step[d] * x.dims[d];
  return Rearrange(x, dims, [&](int64_t i) {
    int64_t at = 0;
    for (size_t d = rank; d-- > 0; i /= dims[d]) at += i % dims[d] * step[perm[d]];
    return at;
  });
}

absl::StatusOr<Constant> Reshaped(const Constant& x, std::vector<int64_t> dims) {
  TERN_ASSIGN_OR_RETURN(const int64_t n, CheckedElements(dims));
  if (n != x.elements()) {
    return absl::InvalidArgumentError(
        absl::StrCat("constant ", ToString(x.dims), " cannot become ", ToString(dims)));
  }
  Constant out = x;
  if (!out.integer) out.floats = std::move(out.floats).Reshaped(Shape(dims));
  out.dims = std::move(dims);
  return out;
}

}  // namespace tern::onnx
