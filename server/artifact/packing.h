// Weight codes and cluster scales in fewer bits than a byte. Internal to server/artifact; FORMAT.md
// has the layout.
#ifndef TERN_SERVER_ARTIFACT_PACKING_H_
#define TERN_SERVER_ARTIFACT_PACKING_H_

#include <cstdint>
#include <string>

#include "absl/strings/string_view.h"
#include "absl/types/span.h"

namespace tern::artifact {

// Bytes that `elements` numbers of `bits` bits take; bits * elements must not overflow.
constexpr uint64_t PackedBytes(uint64_t elements, int bits) { return (elements * bits + 7) / 8; }

// The low `bits` (1..7) bits of every value: bit b of value i is bit k % 8 of byte k / 8,
// k = i * bits + b. Unused bits of the last byte are 0.
std::string Pack(absl::Span<const int8_t> values, int bits);

// The inverse for two's complement codes of 2..7 bits; `packed` must have PackedBytes(codes.size(),
// bits) bytes. False if a code is the most negative number, -2^(bits - 1), which no scheme uses, or
// if an unused bit is set.
bool UnpackCodes(absl::string_view packed, int bits, absl::Span<int8_t> codes);

// The same for unsigned scales of 1..7 bits. False if a scale is 0 or an unused bit is set.
bool UnpackScales(absl::string_view packed, int bits, absl::Span<int8_t> scales);

// Ternary codes, five to a byte: 1.6 bits each, where log2(3) = 1.58 are needed.
constexpr uint64_t PackedTernaryBytes(uint64_t elements) { return (elements + 4) / 5; }

// Byte i is the sum of 3^k (code 5i + k, plus 1) over k = 0..4; codes after the last are -1. Codes
// must be within -1..1.
std::string PackTernary(absl::Span<const int8_t> codes);

// The inverse; `packed` must have PackedTernaryBytes(codes.size()) bytes. False if a byte is above
// 3^5 - 1 or an unused code is not -1.
bool UnpackTernary(absl::string_view packed, absl::Span<int8_t> codes);

}  // namespace tern::artifact

#endif  // TERN_SERVER_ARTIFACT_PACKING_H_
