#include "server/base/log.h"

#include "absl/strings/str_cat.h"
#include "spdlog/sinks/stdout_sinks.h"

namespace tern {

absl::Status InitLog(absl::string_view level) {
  const std::string name(level);
  if (name != "debug" && name != "info" && name != "warn" && name != "error" && name != "off") {
    return absl::InvalidArgumentError(
        absl::StrCat("log level: got '", level, "', want debug, info, warn, error or off"));
  }
  spdlog::drop("tern");  // spdlog throws on a second logger of the same name
  auto logger = spdlog::stderr_logger_mt("tern");
  logger->set_pattern("%Y-%m-%dT%H:%M:%S.%e %L %t %v");
  logger->set_level(spdlog::level::from_str(name));
  logger->flush_on(spdlog::level::info);
  spdlog::set_default_logger(std::move(logger));
  return absl::OkStatus();
}

}  // namespace tern
