#include "server/artifact/packing.h"

#include <algorithm>
#include <array>
#include <bit>
#include <cstring>

namespace tern::artifact {
namespace {

// Eight numbers fill whole bytes, as many as a number has bits: groups are independent.
constexpr size_t kGroup = 8;
constexpr size_t kWord = 8;  // bytes that are moved at once

constexpr uint64_t InEveryByte(uint64_t value) { return value * 0x0101010101010101u; }

// The first `bytes` (up to 8) bytes, the first one lowest.
uint64_t Load(const char* from, size_t bytes) {
  uint64_t word = 0;
  for (size_t b = 0; b < bytes; ++b) word |= uint64_t{static_cast<uint8_t>(from[b])} << (8 * b);
  return word;
}

// A word's bytes in that order; one instruction on x86, which compilers do not find by themselves.
uint64_t LoadWord(const char* from) {
  if constexpr (std::endian::native != std::endian::little) return Load(from, kWord);
  uint64_t word = 0;
  std::memcpy(&word, from, kWord);
  return word;
}
void Store(uint64_t word, int8_t* to) {
  if constexpr (std::endian::native == std::endian::little) {
    std::memcpy(to, &word, kWord);
  } else {
    for (size_t b = 0; b < kWord; ++b) to[b] = static_cast<int8_t>(word >> 8 * b);
  }
}

// Eight numbers at once, in the bytes of one word: a network has tens of millions.
template <int kBits, bool kSigned>
class Spread {
 public:
  // Writes the numbers of a whole group; false if one is the least: the most negative one, or 0 of
  // unsigned ones.
  static bool Write(uint64_t group, int8_t* to) {
    uint64_t x = (group & kHalves) | (group >> 4 * kBits & kHalves) << 32;
    x = (x & kQuarters) | (x << (16 - 2 * kBits) & kQuarters << 16);
    x = (x & kEach) | (x << (8 - kBits) & kEach << 8);
    x ^= kSigns;  // now 0 stands for the least number
    const bool valid = ((x - InEveryByte(1)) & ~x & InEveryByte(0x80)) == 0;
    x = ((x | InEveryByte(0x80)) - kSigns) ^ InEveryByte(0x80);  // byte by byte: no borrows
    Store(x, to);
    return valid;
  }

 private:
  static constexpr uint64_t kHalves = (uint64_t{1} << 4 * kBits) - 1;
  static constexpr uint64_t kQuarters = ((uint64_t{1} << 2 * kBits) - 1) * 0x0000000100000001u;
  static constexpr uint64_t kEach = ((uint64_t{1} << kBits) - 1) * 0x0001000100010001u;
  static constexpr uint64_t kSigns = kSigned ? InEveryByte(uint64_t{1} << (kBits - 1)) : 0;
};

template <int kBits, bool kSigned>
bool Unpack(absl::string_view packed, absl::Span<int8_t> values) {
  using Numbers = Spread<kBits, kSigned>;
  bool valid = true;
  size_t i = 0, byte = 0;
  // What a word holds of the next group is not looked at.
  for (; i + kGroup <= values.size() && byte + kWord <= packed.size(); i += kGroup, byte += kBits)
    valid &= Numbers::Write(LoadWord(packed.data() + byte), values.data() + i);
  for (; i + kGroup <= values.size(); i += kGroup, byte += kBits)
    valid &= Numbers::Write(Load(packed.data() + byte, kBits), values.data() + i);
  if (const size_t count = values.size() - i; count > 0) {
    uint64_t group = Load(packed.data() + byte, packed.size() - byte);
    valid &= group >> (count * kBits) == 0;
    // What is not there must not look like a number that may not be.
    for (size_t k = count; k < kGroup; ++k) group |= uint64_t{1} << (k * kBits);
    int8_t last[kGroup];
    valid &= Numbers::Write(group, last);
    std::copy_n(last, count, values.data() + i);
  }
  return valid;
}

template <bool kSigned>
bool UnpackAny(absl::string_view packed, int bits, absl::Span<int8_t> values) {
  switch (bits) {
    case 1:
      return !kSigned && Unpack<1, false>(packed, values);
    case 2:
      return Unpack<2, kSigned>(packed, values);
    case 3:
      return Unpack<3, kSigned>(packed, values);
    case 4:
      return Unpack<4, kSigned>(packed, values);
    case 5:
      return Unpack<5, kSigned>(packed, values);
    case 6:
      return Unpack<6, kSigned>(packed, values);
    case 7:
      return Unpack<7, kSigned>(packed, values);
  }
  return false;
}

constexpr size_t kTernaryInByte = 5;
constexpr int kPowers[kTernaryInByte] = {1, 3, 9, 27, 81};
constexpr size_t kTernaryBytes = 243;  // values of a byte

// The five codes of every byte, and three zeros that make it a word.
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
  return UnpackAny<true>(packed, bits, codes);
}

bool UnpackScales(absl::string_view packed, int bits, absl::Span<int8_t> scales) {
  return UnpackAny<false>(packed, bits, scales);
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
