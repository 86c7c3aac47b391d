#include "server/base/allocator.h"

#include <algorithm>
#include <cstdlib>  // defines __GLIBC__
#include <thread>

#ifdef __GLIBC__
#include <malloc.h>
#endif

namespace tern {

void KeepFreedMemory() {
#ifdef __GLIBC__
  mallopt(M_TRIM_THRESHOLD, 16 << 20);
  mallopt(M_MMAP_THRESHOLD, 4 << 20);
  mallopt(M_ARENA_MAX, static_cast<int>(std::max(2u, std::thread::hardware_concurrency())));
#endif
}

void ReturnFreedMemory() {
#ifdef __GLIBC__
  malloc_trim(0);
#endif
}

}  // namespace tern
