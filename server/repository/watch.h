// Follows what others change in the repository's folder: new, changed and removed version folders,
// and the default pointers. Polls, so that it works on every file system, network ones included.
//
// - A version folder is loaded once its files (and the model's config.textproto and labels file)
// have
//   had the same names, sizes and times for two polls, and one of them is a network: a copy in
//   progress changes in between, and what a pause leaves half copied fails to parse and is tried
//   again when it changes. A version that serves is replaced without a gap, and a new one that
//   fails never displaces it. Versions that the server itself published are left as they are, and
//   so are those that were unloaded by request, until their files change.
// - A version whose folder has been gone for two polls is unloaded. The default version is kept in
//   memory while others exist: move the default first. A model whose folder is gone goes as a
//   whole.
// - `default` is read at every poll: the default moves there once that version is ready, and stays
//   where it is while it is not, or if the pointer is damaged or gone.
// Nothing is unloaded while the root cannot be read or is not the one that was opened (its .lock is
// absent: a file system that was unmounted).
#ifndef TERN_SERVER_REPOSITORY_WATCH_H_
#define TERN_SERVER_REPOSITORY_WATCH_H_

#include <condition_variable>
#include <cstdint>
#include <functional>
#include <map>
#include <mutex>
#include <set>
#include <string>
#include <thread>
#include <utility>

#include "absl/time/time.h"
#include "server/metrics/metrics.h"
#include "server/repository/repository.h"

namespace tern::repository {

class Watcher {
 public:
  // Remembers what lies there now and is in memory already. Nothing is owned; `metrics` may be
  // null. `changed`, if not null, is called at the end of each poll that tried to load, unload or
  // move something, on its thread.
  Watcher(Repository* repository, std::string root, metrics::Metrics* metrics,
          std::function<void()> changed = nullptr);
  // Ends the thread of Start(), after a load that it is in.
  ~Watcher();

  // One look at the folder; loads and unloads on the calling thread. One call at a time.
  void Poll();
  // Polls every `interval` on a thread of its own, counted from the end of a poll to the start of
  // the next. Once.
  void Start(absl::Duration interval);

 private:
  using Key = std::pair<std::string, uint64_t>;  // model and version
  struct Seen {
    std::string state;   // of the files
    bool tried = false;  // this state has been loaded, or is known to be in memory
    bool taken = false;  // an earlier state was
  };
  // Loads what is new and stable of one model, and follows its pointer. Adds its versions to
  // `present`.
  void LookAt(const std::string& model, std::set<Key>& present);
  // Unloads what has been gone twice.
  void DropMissing(const std::set<Key>& present);
  void Event(const char* event);

  Repository* const repository_;
  const std::string root_;
  metrics::Metrics* const metrics_;
  const std::function<void()> changed_;
  bool events_ = false;       // in this poll
  std::map<Key, Seen> seen_;  // of the folders that exist
  std::set<Key> missing_;     // known to the repository, without a folder at the last poll
  // Why a pointer was not followed, or a version not dropped: said once.
  std::map<std::string, std::string> default_refused_;
  std::map<Key, std::string> drop_refused_;
  bool unreadable_ = false;
  std::mutex mutex_;
  std::condition_variable wake_;
  bool stopping_ = false;
  std::thread thread_;
};

}  // namespace tern::repository

#endif  // TERN_SERVER_REPOSITORY_WATCH_H_
