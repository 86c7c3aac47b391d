// Runs another program in the foreground, as a shell would.
#ifndef TERN_CLIENT_CHILD_PROCESS_H_
#define TERN_CLIENT_CHILD_PROCESS_H_

#include <string>
#include <vector>

#include "absl/status/statusor.h"

namespace tern::client {

// The path of `name`: beside this program, else in PATH. NOT_FOUND if it is in neither.
absl::StatusOr<std::string> FindProgram(const std::string& name);

// Runs `arguments` (the first is the program's path) with this process's terminal, streams and
// environment, and waits. Meanwhile SIGINT and SIGQUIT of the terminal, which reach the child
// anyway, are left to it, and SIGTERM and SIGHUP are passed on. Returns the exit status, or 128 + n
// if signal n ended it. NOT_FOUND or PERMISSION_DENIED if the program cannot be started. Changes
// the process's signal handlers while it runs: one call at a time.
absl::StatusOr<int> RunInForeground(const std::vector<std::string>& arguments);

}  // namespace tern::client

#endif  // TERN_CLIENT_CHILD_PROCESS_H_
