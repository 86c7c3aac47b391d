#include "server/artifact/packing.h"

namespace tern::artifact {

std::string Pack(absl::Span<const int8_t> codes, int bits) {
  const int per_byte = 8 / bits;
  const unsigned mask = (1u << bits) - 1;
  std::string packed(PackedBytes(codes.size(), bits), '\0');
  for (size_t i = 0; i < codes.size(); ++i) {
    const unsigned code = static_cast<unsigned>(codes[i]) & mask;
    const unsigned old = static_cast<uint8_t>(packed[i / per_byte]);
    packed[i / per_byte] = static_cast<char>(old | code << (i % per_byte * bits));
  }
  return packed;
}

bool Unpack(absl::string_view packed, int bits, absl::Span<int8_t> codes) {
  const int per_byte = 8 / bits;
  const int mask = (1 << bits) - 1;
  const int sign = 1 << (bits - 1);
  bool valid = true;
  for (size_t i = 0; i < codes.size(); ++i) {
    const int raw = static_cast<uint8_t>(packed[i / per_byte]) >> (i % per_byte * bits) & mask;
    valid &= raw != sign;
    codes[i] = static_cast<int8_t>((raw ^ sign) - sign);
  }
  const size_t used = codes.size() % per_byte;
  if (used != 0) valid &= static_cast<uint8_t>(packed.back()) >> (used * bits) == 0;
  return valid;
}

}  // namespace tern::artifact
