// How a status travels up inside the client. (Shared with the server: proto/ and statistics/ only.)
#ifndef TERN_CLIENT_STATUS_H_
#define TERN_CLIENT_STATUS_H_

#include <utility>

#include "absl/status/status.h"
#include "absl/status/statusor.h"

#define TERN_CLIENT_CONCAT_INNER_(a, b) a##b
#define TERN_CLIENT_CONCAT_(a, b) TERN_CLIENT_CONCAT_INNER_(a, b)

#define TERN_CLIENT_RETURN_IF_ERROR(expr)                      \
  do {                                                         \
    ::absl::Status tern_client_status_ = (expr);               \
    if (!tern_client_status_.ok()) return tern_client_status_; \
  } while (false)

// TERN_CLIENT_ASSIGN_OR_RETURN(auto x, F()): `x` may declare a variable.
#define TERN_CLIENT_ASSIGN_OR_RETURN(lhs, expr) \
  TERN_CLIENT_ASSIGN_OR_RETURN_IMPL_(TERN_CLIENT_CONCAT_(tern_client_or_, __LINE__), lhs, expr)
#define TERN_CLIENT_ASSIGN_OR_RETURN_IMPL_(var, lhs, expr) \
  auto var = (expr);                                       \
  if (!var.ok()) return var.status();                      \
  lhs = std::move(var).value()

#endif  // TERN_CLIENT_STATUS_H_
