// The log's lines as data: fields, the JSON form and the audit log. log.h is for plain lines.
//
// A line is text (`time LEVEL thread [logger] message key="value"`) or one JSON object (members time,
// level, logger, thread, message and the fields). Nothing from outside can forge a line: control
// characters are escaped, bytes that are not UTF-8 are replaced in JSON.
#ifndef TERN_SERVER_BASE_LOG_FIELDS_H_
#define TERN_SERVER_BASE_LOG_FIELDS_H_

#include <string>
#include <utility>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"
#include "server/base/log.h"

namespace tern {

enum class LogFormat { kText, kJson };

// Named values of one line, in the order in which they are printed. Names are identifiers; time,
// level, logger, thread and message are taken.
using LogFields = std::vector<std::pair<std::string, std::string>>;

// As InitLog(level), in a form.
absl::Status InitLog(absl::string_view level, LogFormat format);

// kText for "text", kJson for "json"; INVALID_ARGUMENT for any other word.
absl::StatusOr<LogFormat> ParseLogFormat(absl::string_view word);

// One line at `level` with fields. Thread safe.
void Log(spdlog::level::level_enum level, absl::string_view message, const LogFields& fields);

// One line of the logger `audit`, which is written at every level but `off`. Thread safe.
void AuditLog(absl::string_view message, const LogFields& fields);

}  // namespace tern

#endif  // TERN_SERVER_BASE_LOG_FIELDS_H_
