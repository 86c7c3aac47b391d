#include "server/base/log_fields.h"

#include <memory>
#include <nlohmann/json.hpp>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "absl/time/time.h"
#include "spdlog/sinks/stdout_sinks.h"

namespace tern {
namespace {

using Json = nlohmann::ordered_json;

// The fields of the line that this thread is writing. spdlog knows text only, and its loggers here
// are synchronous: the formatter runs inside the call.
thread_local const LogFields* t_fields = nullptr;

absl::string_view View(spdlog::string_view_t text) { return {text.data(), text.size()}; }

std::string Dump(const Json& json) {
  return json.dump(-1, ' ', false, Json::error_handler_t::replace);
}

// Control characters as \xNN, so that one event stays one line.
void AppendPrintable(absl::string_view text, std::string* out) {
  for (const char c : text) {
    const auto byte = static_cast<unsigned char>(c);
    if (byte < 0x20 || byte == 0x7f) {
      absl::StrAppendFormat(out, "\\x%02x", byte);
    } else {
      out->push_back(c);
    }
  }
}

class LineFormatter final : public spdlog::formatter {
 public:
  explicit LineFormatter(LogFormat format) : format_(format) {}

  void format(const spdlog::details::log_msg& msg, spdlog::memory_buf_t& dest) override {
    std::string line = format_ == LogFormat::kJson ? JsonLine(msg) : TextLine(msg);
    line.push_back('\n');
    dest.append(line.data(), line.data() + line.size());
  }
  std::unique_ptr<spdlog::formatter> clone() const override {
    return std::make_unique<LineFormatter>(format_);
  }

 private:
  static std::string TimeOf(const spdlog::details::log_msg& msg, const char* format,
                            absl::TimeZone zone) {
    return absl::FormatTime(format, absl::FromChrono(msg.time), zone);
  }

  static std::string TextLine(const spdlog::details::log_msg& msg) {
    static constexpr char kLetters[] = "TDIWECO";  // of spdlog's levels, in order
    std::string line = absl::StrCat(TimeOf(msg, "%Y-%m-%dT%H:%M:%E3S", absl::LocalTimeZone()), " ",
                                    std::string(1, kLetters[msg.level]), " ", msg.thread_id, " ");
    if (View(msg.logger_name) != "tern") absl::StrAppend(&line, "[", View(msg.logger_name), "] ");
    AppendPrintable(View(msg.payload), &line);
    if (t_fields != nullptr) {
      for (const auto& [name, value] : *t_fields) {
        absl::StrAppend(&line, " ", name, "=", Dump(Json(value)));
      }
    }
    return line;
  }

  static std::string JsonLine(const spdlog::details::log_msg& msg) {
    Json line = {
        {"time", TimeOf(msg, "%Y-%m-%dT%H:%M:%E6SZ", absl::UTCTimeZone())},
        {"level", std::string(spdlog::level::to_string_view(msg.level).data())},
        {"logger", std::string(View(msg.logger_name))},
        {"thread", msg.thread_id},
        {"message", std::string(View(msg.payload))},
    };
    if (t_fields != nullptr) {
      for (const auto& [name, value] : *t_fields) line.emplace(name, value);
    }
    return Dump(line);
  }

  const LogFormat format_;
};

void Write(spdlog::logger* logger, spdlog::level::level_enum level, absl::string_view message,
           const LogFields& fields) {
  if (logger == nullptr) return;  // before InitLog
  t_fields = &fields;
  logger->log(level, spdlog::string_view_t(message.data(), message.size()));
  t_fields = nullptr;
}

}  // namespace

absl::Status InitLog(absl::string_view level, LogFormat format) {
  const std::string name(level);
  if (name != "debug" && name != "info" && name != "warn" && name != "error" && name != "off") {
    return absl::InvalidArgumentError(
        absl::StrCat("log level: got '", level, "', want debug, info, warn, error or off"));
  }
  spdlog::drop_all();  // spdlog throws on a second logger of the same name
  const auto make = [&](const char* logger_name) {
    auto logger = spdlog::stderr_logger_mt(logger_name);
    logger->set_formatter(std::make_unique<LineFormatter>(format));
    logger->set_level(spdlog::level::from_str(name));
    logger->flush_on(spdlog::level::info);
    return logger;
  };
  spdlog::set_default_logger(make("tern"));
  if (auto audit = make("audit"); name != "off") audit->set_level(spdlog::level::info);
  return absl::OkStatus();
}

absl::Status InitLog(absl::string_view level) { return InitLog(level, LogFormat::kText); }

absl::StatusOr<LogFormat> ParseLogFormat(absl::string_view word) {
  if (word == "text") return LogFormat::kText;
  if (word == "json") return LogFormat::kJson;
  return absl::InvalidArgumentError(
      absl::StrCat("log format: got '", word, "', want text or json"));
}

void Log(spdlog::level::level_enum level, absl::string_view message, const LogFields& fields) {
  Write(spdlog::default_logger_raw(), level, message, fields);
}

void AuditLog(absl::string_view message, const LogFields& fields) {
  Write(spdlog::get("audit").get(), spdlog::level::info, message, fields);
}

}  // namespace tern
