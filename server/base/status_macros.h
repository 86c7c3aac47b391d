// TERN_RETURN_IF_ERROR and TERN_ASSIGN_OR_RETURN: the two ways a status travels up.
#ifndef TERN_SERVER_BASE_STATUS_MACROS_H_
#define TERN_SERVER_BASE_STATUS_MACROS_H_

#include <utility>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/strings/cord.h"
#include "absl/strings/str_cat.h"

#define TERN_RETURN_IF_ERROR(expr)               \
  do {                                           \
    ::absl::Status tern_status_ = (expr);        \
    if (!tern_status_.ok()) return tern_status_; \
  } while (false)

#define TERN_MACRO_CONCAT_INNER_(a, b) a##b
#define TERN_MACRO_CONCAT_(a, b) TERN_MACRO_CONCAT_INNER_(a, b)

// TERN_ASSIGN_OR_RETURN(auto x, F()): `x` may declare a variable. An expression with a
// comma outside parentheses must be wrapped in parentheses.
#define TERN_ASSIGN_OR_RETURN(lhs, expr) \
  TERN_ASSIGN_OR_RETURN_IMPL_(TERN_MACRO_CONCAT_(tern_statusor_, __LINE__), lhs, expr)
#define TERN_ASSIGN_OR_RETURN_IMPL_(statusor, lhs, expr) \
  auto statusor = (expr);                                \
  if (!statusor.ok()) return statusor.status();          \
  lhs = std::move(statusor).value()

namespace tern {

// The same code and payloads with `context: ` before the message; OK stays OK.
inline absl::Status Annotate(const absl::Status& status, absl::string_view context) {
  if (status.ok()) return status;
  absl::Status annotated(status.code(), absl::StrCat(context, ": ", status.message()));
  status.ForEachPayload([&](absl::string_view type, const absl::Cord& payload) {
    annotated.SetPayload(type, payload);
  });
  return annotated;
}

}  // namespace tern

#endif  // TERN_SERVER_BASE_STATUS_MACROS_H_
