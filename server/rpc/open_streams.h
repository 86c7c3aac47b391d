// The streams that are open, to tell them when the server stops: a stream has no end of its own.
#ifndef TERN_SERVER_RPC_OPEN_STREAMS_H_
#define TERN_SERVER_RPC_OPEN_STREAMS_H_

#include <condition_variable>
#include <map>
#include <memory>
#include <mutex>
#include <utility>
#include <vector>

#include "absl/time/time.h"

namespace tern::rpc {

class OpenStream {
 public:
  virtual ~OpenStream() = default;
  // Takes no more requests and ends once those that it has are answered.
  virtual void Stop() = 0;
};

// Thread safe. Owns the streams, and is empty before it is destroyed.
class OpenStreams {
 public:
  // After Stop() the stream is stopped at once.
  void Add(std::shared_ptr<OpenStream> stream) {
    {
      std::lock_guard<std::mutex> lock(mutex_);
      streams_.emplace(stream.get(), stream);
      if (!stopped_) return;
    }
    stream->Stop();
  }
  // Deletes `stream`, perhaps a little later.
  void Remove(OpenStream* stream) {
    std::shared_ptr<OpenStream> last;  // deleted without the lock
    std::lock_guard<std::mutex> lock(mutex_);
    const auto found = streams_.find(stream);
    last = std::move(found->second);
    streams_.erase(found);
    if (streams_.empty()) none_.notify_all();
  }
  // Stops all and waits up to `timeout` for them to end. False if there were none.
  bool Stop(absl::Duration timeout) {
    std::vector<std::shared_ptr<OpenStream>> open;
    {
      std::lock_guard<std::mutex> lock(mutex_);
      stopped_ = true;
      for (const auto& [unused, stream] : streams_) open.push_back(stream);
    }
    // Without the lock: one that has nothing to answer may be removed meanwhile.
    for (const std::shared_ptr<OpenStream>& stream : open) stream->Stop();
    std::unique_lock<std::mutex> lock(mutex_);
    none_.wait_for(lock, absl::ToChronoNanoseconds(timeout), [this] { return streams_.empty(); });
    return !open.empty();
  }

 private:
  std::mutex mutex_;
  std::condition_variable none_;
  std::map<OpenStream*, std::shared_ptr<OpenStream>> streams_;
  bool stopped_ = false;
};

}  // namespace tern::rpc

#endif  // TERN_SERVER_RPC_OPEN_STREAMS_H_
