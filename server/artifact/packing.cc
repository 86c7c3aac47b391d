#include "server/artifact/packing.h"

#include <algorithm>

namespace tern::artifact {
namespace {

// Eight codes fill whole bytes, as many as a code has bits: groups are independent.
constexpr size_t kGroup = 8;

}  // namespace

std::string Pack(absl::Span<const int8_t> codes, int bits) {
  const uint32_t mask = (1u << bits) - 1;
  std::string packed(PackedBytes(codes.size(), bits), '\0');
  size_t byte = 0;
  for (size_t i = 0; i < codes.size(); i += kGroup) {
    const size_t count = std::min(kGroup, codes.size() - i);
    uint32_t group = 0;
    for (size_t k = 0; k < count; ++k)
      group |= (static_cast<uint32_t>(codes[i + k]) & mask) << (k * bits);
    for (uint64_t left = PackedBytes(count, bits); left > 0; --left, group >>= 8)
      packed[byte++] = static_cast<char>(group & 255);
  }
  return packed;
}

bool Unpack(absl::string_view packed, int bits, absl::Span<int8_t> codes) {
  const uint32_t mask = (1u << bits) - 1;
  const int sign = 1 << (bits - 1);
  bool valid = true;
  size_t byte = 0;
  for (size_t i = 0; i < codes.size(); i += kGroup) {
    const size_t count = std::min(kGroup, codes.size() - i);
    const uint64_t bytes = PackedBytes(count, bits);
    uint32_t group = 0;
    for (uint64_t b = 0; b < bytes; ++b)
      group |= static_cast<uint32_t>(static_cast<uint8_t>(packed[byte++])) << (8 * b);
    for (size_t k = 0; k < count; ++k, group >>= bits) {
      const int raw = static_cast<int>(group & mask);
      valid &= raw != sign;
      codes[i + k] = static_cast<int8_t>((raw ^ sign) - sign);
    }
    valid &= group == 0;
  }
  return valid;
}

}  // namespace tern::artifact
