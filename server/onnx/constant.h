// Constants of an ONNX file and their arithmetic, with the batch as a symbol.
//
// torch's exporter writes shapes as programs: Shape, Gather, Mul, Div, Concat, ... over
// integers that depend on the batch N only linearly. Evaluating those programs at import over
// numbers of the form a*N + b turns every reshape into a fixed one.
#ifndef TERN_SERVER_ONNX_CONSTANT_H_
#define TERN_SERVER_ONNX_CONSTANT_H_

#include <onnx/onnx_pb.h>

#include <cstdint>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"
#include "server/tensor/tensor.h"

namespace tern::onnx {

// batches * N + offset
struct BatchInt {
  int64_t batches = 0;
  int64_t offset = 0;
  bool plain() const { return batches == 0; }
  friend bool operator==(const BatchInt&, const BatchInt&) = default;
};

// Most elements of one integer constant: these are shapes, axes and indices, not data.
inline constexpr int64_t kMaxInts = 65536;
// Most elements of one float constant that folding computes (512 MiB).
inline constexpr int64_t kMaxFolded = int64_t{1} << 27;

// A tensor known at import: f32, or integers of any width and booleans, or codes: int8 and uint8
// tensors, and int32 ones too large for a shape, which stand for reals (DequantizeLinear). Extents
// may be 0 (an empty list). A value type. The functions below take no codes.
struct Constant {
  std::vector<int64_t> dims;
  bool integer = false;
  Tensor floats;               // f32 of shape `dims`, unless integer or codes
  std::vector<BatchInt> ints;  // if integer
  Tensor codes;                // s8, u8 or s32 of shape `dims`; empty otherwise

  int64_t elements() const;
  int rank() const { return static_cast<int>(dims.size()); }

  static Constant Ints(const std::vector<BatchInt>& values);  // a list
};

// Product of non-negative extents. INVALID_ARGUMENT if an extent is negative, the rank
// exceeds 8 or the product 2^31 - 1.
absl::StatusOr<int64_t> CheckedElements(const std::vector<int64_t>& dims);

// Converts an initialiser or attribute and releases its bytes in `proto`. f32 and f64 become
// floats; s64, s32 and bool integers; s8, u8 and more than kMaxInts s32 codes. INVALID_ARGUMENT:
// external data, bytes that do not match the extents. UNIMPLEMENTED: another type; more than
// kMaxInts integers of 64 bits.
absl::StatusOr<Constant> ToConstant(::onnx::TensorProto& proto);

// All below: INVALID_ARGUMENT if shapes or kinds do not fit or integers overflow;
// UNIMPLEMENTED for results that are not linear in N or too large.

// Element-wise with numpy broadcasting. `op` is one of + - * /; integers divide as in C++.
absl::StatusOr<Constant> Binary(char op, const Constant& a, const Constant& b);

// Element-wise. `type` is an ONNX operator: Neg, Sqrt, Floor, Ceil, Identity.
absl::StatusOr<Constant> Unary(absl::string_view type, const Constant& x);

// To integers (truncating) or floats; a number that depends on N only to integers.
absl::StatusOr<Constant> CastTo(bool integer, const Constant& x);

// The given positions along `axis`, each in [0, extent).
absl::StatusOr<Constant> Select(const Constant& x, int axis, const std::vector<int64_t>& positions);

absl::StatusOr<Constant> Concat(const std::vector<const Constant*>& parts, int axis);

absl::StatusOr<Constant> Transpose(const Constant& x, const std::vector<int64_t>& perm);

// The same elements under other extents. INVALID_ARGUMENT if there are not as many.
absl::StatusOr<Constant> Reshaped(const Constant& x, std::vector<int64_t> dims);

}  // namespace tern::onnx

#endif  // TERN_SERVER_ONNX_CONSTANT_H_
