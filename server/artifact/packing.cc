#include "server/artifact/packing.h"

#include <algorithm>

namespace tern::artifact {
namespace {

// Eight codes fill whole bytes, as many as a code has bits: groups are independent.
constexpr size_t kGroup = 8;

constexpr uint64_t InEveryByte(uint64_t value) { return value * 0x0101010101010101u; }

// Eight codes at once, in the bytes of one word: a network has tens of millions.
class Spread {
 public:
  explicit Spread(int bits)
      : bits_(bits),
        halves_((uint64_t{1} << 4 * bits) - 1),
        quarters_(((uint64_t{1} << 2 * bits) - 1) * 0x0000000100000001u),
        codes_(((uint64_t{1} << bits) - 1) * 0x0001000100010001u),
        signs_(InEveryByte(uint64_t{1} << (bits - 1))) {}

  // Writes the first `count` codes; false if one of all eight is the most negative number.
  bool operator()(uint64_t group, int8_t* to, size_t count) const {
    uint64_t x = (group & halves_) | (group >> 4 * bits_) << 32;
    x = (x & quarters_) | (x << (16 - 2 * bits_) & quarters_ << 16);
    x = (x & codes_) | (x << (8 - bits_) & codes_ << 8);
    x ^= signs_;  // now 0 stands for the most negative number
    const bool valid = ((x - InEveryByte(1)) & ~x & InEveryByte(0x80)) == 0;
    x = ((x | InEveryByte(0x80)) - signs_) ^ InEveryByte(0x80);  // byte by byte: no borrows
    for (size_t i = 0; i < count; ++i) to[i] = static_cast<int8_t>(x >> 8 * i);
    return valid;
  }

 private:
  int bits_;
  uint64_t halves_, quarters_, codes_, signs_;
};

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
  const Spread spread(bits);
  bool valid = true;
  const size_t whole = codes.size() / kGroup;
  const auto* from = reinterpret_cast<const uint8_t*>(packed.data());
  for (size_t g = 0; g < whole; ++g, from += bits) {
    uint32_t group = 0;
    for (int b = 0; b < bits; ++b) group |= static_cast<uint32_t>(from[b]) << (8 * b);
    valid &= spread(group, codes.data() + g * kGroup, kGroup);
  }
  if (const size_t count = codes.size() % kGroup; count > 0) {
    const uint64_t bytes = PackedBytes(count, bits);
    uint32_t group = 0;
    for (uint64_t b = 0; b < bytes; ++b) group |= static_cast<uint32_t>(from[b]) << (8 * b);
    valid &= spread(group, codes.data() + whole * kGroup, count);
    valid &= group >> (count * bits) == 0;
  }
  return valid;
}

}  // namespace tern::artifact
