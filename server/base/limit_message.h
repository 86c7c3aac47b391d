// Messages of statuses quote what clients sent, which may be megabytes; answers and logs want
// lines.
#ifndef TERN_SERVER_BASE_LIMIT_MESSAGE_H_
#define TERN_SERVER_BASE_LIMIT_MESSAGE_H_

#include <cstddef>
#include <string>

#include "absl/strings/string_view.h"

namespace tern {

// gRPC sends a message as a header, three bytes for each that is not printable ASCII, and clients
// take 8 KiB of headers.
inline constexpr size_t kMaxMessageBytes = 1024;
// Of one name or value quoted in a message: what was wanted instead comes after it.
inline constexpr size_t kMaxQuoteBytes = 64;

// `message` in at most `most` bytes (3 or more): what is longer ends in "...", and no character of
// UTF-8 is cut in two.
std::string LimitMessage(absl::string_view message, size_t most = kMaxMessageBytes);

}  // namespace tern

#endif  // TERN_SERVER_BASE_LIMIT_MESSAGE_H_
