#include "server/artifact/packing.h"

#include <algorithm>
#include <array>
#include <cstring>

namespace tern::artifact {
namespace {

// Eight numbers fill whole bytes, as many as a number has bits: groups are independent.
constexpr size_t kGroup = 8;

constexpr uint64_t InEveryByte(uint64_t value) { return value * 0x0101010101010101u; }

// Eight numbers at once, in the bytes of one word: a network has tens of millions.
class Spread {
 public:
  // Two's complement, or unsigned numbers.
  Spread(int bits, bool is_signed)
      : bits_(bits),
        halves_((uint64_t{1} << 4 * bits) - 1),
        quarters_(((uint64_t{1} << 2 * bits) - 1) * 0x0000000100000001u),
        each_(((uint64_t{1} << bits) - 1) * 0x0001000100010001u),
        signs_(is_signed ? InEveryByte(uint64_t{1} << (bits - 1)) : 0) {}

  // Writes the first `count` numbers; false if one of all eight is the least: the most negative
  // one, or 0 of unsigned ones.
  bool operator()(uint64_t group, int8_t* to, size_t count) const {
    uint64_t x = (group & halves_) | (group >> 4 * bits_) << 32;
    x = (x & quarters_) | (x << (16 - 2 * bits_) & quarters_ << 16);
    x = (x & each_) | (x << (8 - bits_) & each_ << 8);
    x ^= signs_;  // now 0 stands for the least number
    const bool valid = ((x - InEveryByte(1)) & ~x & InEveryByte(0x80)) == 0;
    x = ((x | InEveryByte(0x80)) - signs_) ^ InEveryByte(0x80);  // byte by byte: no borrows
    for (size_t i = 0; i < count; ++i) to[i] = static_cast<int8_t>(x >> 8 * i);
    return valid;
  }

 private:
  int bits_;
  uint64_t halves_, quarters_, each_, signs_;
};

bool Unpack(absl::string_view packed, int bits, bool is_signed, absl::Span<int8_t> values) {
  const Spread spread(bits, is_signed);
  bool valid = true;
  const size_t whole = values.size() / kGroup;
  const auto* from = reinterpret_cast<const uint8_t*>(packed.data());
  for (size_t g = 0; g < whole; ++g, from += bits) {
    uint64_t group = 0;
    for (int b = 0; b < bits; ++b) group |= uint64_t{from[b]} << (8 * b);
    valid &= spread(group, values.data() + g * kGroup, kGroup);
  }
  if (const size_t count = values.size() % kGroup; count > 0) {
    uint64_t group = 0;
    for (uint64_t b = 0; b < PackedBytes(count, bits); ++b) group |= uint64_t{from[b]} << (8 * b);
    valid &= group >> (count * bits) == 0;
    // What is not there must not look like a number that may not be.
    for (size_t i = count; i < kGroup; ++i) group |= uint64_t{1} << (i * bits);
    valid &= spread(group, values.data() + whole * kGroup, count);
  }
  return valid;
}

constexpr size_t kTernaryInByte = 5;
constexpr int kPowers[kTernaryInByte] = {1, 3, 9, 27, 81};
constexpr size_t kTernaryBytes = 243;  // values of a byte

// The five codes of every byte, and three zeros that make it a word.
constexpr size_t kWord = 8;
constexpr std::array<std::array<int8_t, kWord>, kTernaryBytes> kTernaryCodes = [] {
  std::array<std::array<int8_t, kWord>, kTernaryBytes> table{};
  for (size_t byte = 0; byte < kTernaryBytes; ++byte) {
    for (size_t k = 0; k < kTernaryInByte; ++k)
      table[byte][k] = static_cast<int8_t>(static_cast<int>(byte) / kPowers[k] % 3 - 1);
  }
  return table;
}();

}  // namespace

std::string Pack(absl::Span<const int8_t> values, int bits) {
  const uint64_t mask = (uint64_t{1} << bits) - 1;
  std::string packed(PackedBytes(values.size(), bits), '\0');
  size_t byte = 0;
  for (size_t i = 0; i < values.size(); i += kGroup) {
    const size_t count = std::min(kGroup, values.size() - i);
    uint64_t group = 0;
    for (size_t k = 0; k < count; ++k)
      group |= (static_cast<uint64_t>(values[i + k]) & mask) << (k * bits);
    for (uint64_t left = PackedBytes(count, bits); left > 0; --left, group >>= 8)
      packed[byte++] = static_cast<char>(group & 255);
  }
  return packed;
}

bool UnpackCodes(absl::string_view packed, int bits, absl::Span<int8_t> codes) {
  return Unpack(packed, bits, true, codes);
}

bool UnpackScales(absl::string_view packed, int bits, absl::Span<int8_t> scales) {
  return Unpack(packed, bits, false, scales);
}

std::string PackTernary(absl::Span<const int8_t> codes) {
  std::string packed(PackedTernaryBytes(codes.size()), '\0');
  for (size_t i = 0; i < codes.size(); ++i) {
    packed[i / kTernaryInByte] = static_cast<char>(packed[i / kTernaryInByte] +
                                                   kPowers[i % kTernaryInByte] * (codes[i] + 1));
  }
  return packed;
}

bool UnpackTernary(absl::string_view packed, absl::Span<int8_t> codes) {
  bool valid = true;
  for (size_t i = 0, byte = 0; i < codes.size(); i += kTernaryInByte, ++byte) {
    const auto value = static_cast<uint8_t>(packed[byte]);
    valid &= value < kTernaryBytes;
    const std::array<int8_t, kWord>& five = kTernaryCodes[value < kTernaryBytes ? value : 0];
    const size_t left = codes.size() - i;
    // A whole word is one store; its last three bytes are the next codes' places.
    std::memcpy(codes.data() + i, five.data(),
                left >= kWord ? kWord : std::min(left, kTernaryInByte));
    if (left < kTernaryInByte) valid &= value < kPowers[left];
  }
  return valid;
}

}  // namespace tern::artifact
