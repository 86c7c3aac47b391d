// Logging: one line per event on stderr, `LEVEL time thread message`.
//
// Use TERN_LOG_INFO("loaded {} version {}", name, version), _WARN, _ERROR, _DEBUG.
// Arguments are {fmt} formatted. absl::string_view and Status messages go through
// std::string(...). Thread safe.
#ifndef TERN_SERVER_BASE_LOG_H_
#define TERN_SERVER_BASE_LOG_H_

#include <string>

#include "absl/status/status.h"
#include "absl/strings/string_view.h"
#include "spdlog/spdlog.h"

#define TERN_LOG_DEBUG(...) ::spdlog::debug(__VA_ARGS__)
#define TERN_LOG_INFO(...) ::spdlog::info(__VA_ARGS__)
#define TERN_LOG_WARN(...) ::spdlog::warn(__VA_ARGS__)
#define TERN_LOG_ERROR(...) ::spdlog::error(__VA_ARGS__)

namespace tern {

// Sends the log to stderr at `level` (debug, info, warn, error, off).
// INVALID_ARGUMENT for any other word. Call once, before threads start.
absl::Status InitLog(absl::string_view level);

}  // namespace tern

#endif  // TERN_SERVER_BASE_LOG_H_
