// Weight codes in 2, 3 or 4 bits. Internal to server/artifact; FORMAT.md has the layout.
#ifndef TERN_SERVER_ARTIFACT_PACKING_H_
#define TERN_SERVER_ARTIFACT_PACKING_H_

#include <cstdint>
#include <string>

#include "absl/strings/string_view.h"
#include "absl/types/span.h"

namespace tern::artifact {

// The largest magnitude that fits `bits` (2, 3, 4): 1, 3, 7. Two's complement's -2, -4 and -8 are
// not used.
constexpr int MaxCode(int bits) { return (1 << (bits - 1)) - 1; }

// Bytes that `elements` codes of `bits` bits take; bits * elements must not overflow.
constexpr uint64_t PackedBytes(uint64_t elements, int bits) { return (elements * bits + 7) / 8; }

// Two's complement codes of `bits` (2, 3 or 4) bits: bit b of code i is bit k % 8 of byte k / 8,
// k = i * bits + b. Unused bits of the last byte are 0. Codes must be within MaxCode.
std::string Pack(absl::Span<const int8_t> codes, int bits);

// The inverse; `packed` must have PackedBytes(codes.size(), bits) bytes. False if a code is below
// -MaxCode or an unused bit is set.
bool Unpack(absl::string_view packed, int bits, absl::Span<int8_t> codes);

}  // namespace tern::artifact

#endif  // TERN_SERVER_ARTIFACT_PACKING_H_
