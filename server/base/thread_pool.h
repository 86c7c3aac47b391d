// A fixed set of threads that run closures in submission order, and loops over several threads.
#ifndef TERN_SERVER_BASE_THREAD_POOL_H_
#define TERN_SERVER_BASE_THREAD_POOL_H_

#include <condition_variable>
#include <deque>
#include <functional>
#include <mutex>
#include <string>
#include <thread>
#include <vector>

namespace tern {

// Thread safe. The destructor runs what was submitted, then joins.
class ThreadPool {
 public:
  // `name` (at most 15 bytes are kept) shows in ps and in the log.
  ThreadPool(int threads, const std::string& name);
  ~ThreadPool();
  ThreadPool(const ThreadPool&) = delete;
  ThreadPool& operator=(const ThreadPool&) = delete;

  // Queues `work`. The queue is unbounded: callers bound what they submit.
  void Submit(std::function<void()> work);

  int threads() const { return static_cast<int>(threads_.size()); }

 private:
  void Work();

  std::mutex mutex_;
  std::condition_variable wake_;
  std::deque<std::function<void()>> queue_;
  bool stopping_ = false;
  std::vector<std::thread> threads_;
};

// Calls f(i) for every i < n on up to `threads` threads, the caller's among them, and returns when
// all are done; which thread gets which i is not fixed. Throws the first exception of `f`, after all.
void ParallelFor(int threads, size_t n, const std::function<void(size_t)>& f);

}  // namespace tern

#endif  // TERN_SERVER_BASE_THREAD_POOL_H_
