#include "server/base/limit_message.h"

#include "absl/strings/str_cat.h"

namespace tern {

std::string LimitMessage(absl::string_view message, size_t most) {
  if (message.size() <= most) return std::string(message);
  constexpr absl::string_view kDots = "...";
  size_t end = most - kDots.size();
  // A character has up to three bytes 10xxxxxx after its first; where more follow it is no UTF-8.
  for (int i = 0; i < 3 && end > 0 && (message[end] & 0xc0) == 0x80; ++i) --end;
  return absl::StrCat(message.substr(0, end), kDots);
}

}  // namespace tern
