// How much memory this process may use: the cgroup's limit (v2 memory.max, v1
// memory.limit_in_bytes; any ancestor's), or the machine's memory where that is less.
#ifndef TERN_SERVER_BASE_MEMORY_LIMIT_H_
#define TERN_SERVER_BASE_MEMORY_LIMIT_H_

#include <cstdint>
#include <string>

namespace tern {

// Bytes. Reads the machine; `root` is prepended to /proc and /sys paths (tests use a folder). What
// cannot be read does not limit; 0 if nothing can be read.
uint64_t ReadMemoryLimit(const std::string& root = "");

}  // namespace tern

#endif  // TERN_SERVER_BASE_MEMORY_LIMIT_H_
