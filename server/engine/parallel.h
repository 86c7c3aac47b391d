// Loops over the caller's OpenMP team.
#ifndef TERN_SERVER_ENGINE_PARALLEL_H_
#define TERN_SERVER_ENGINE_PARALLEL_H_

#include <omp.h>

#include <cstdint>

namespace tern::engine {

// f(begin, end) over [0, n), cut into a range for each thread; in one piece on the calling thread
// unless `worth`. A parallel region of one thread would allocate and free a team in libgomp.
template <typename F>
void InRanges(int64_t n, bool worth, F f) {
  if (!worth || omp_get_max_threads() == 1) {
    f(int64_t{0}, n);
    return;
  }
#pragma omp parallel
  {
    const int64_t team = omp_get_num_threads(), self = omp_get_thread_num();
    const int64_t begin = n * self / team, end = n * (self + 1) / team;
    if (begin < end) f(begin, end);
  }
}

}  // namespace tern::engine

#endif  // TERN_SERVER_ENGINE_PARALLEL_H_
