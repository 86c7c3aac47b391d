#include "server/repository/watch.h"

#include <sys/stat.h>

#include <algorithm>
#include <chrono>
#include <iterator>

#include "absl/status/status.h"
#include "absl/strings/str_cat.h"
#include "server/base/log.h"
#include "server/repository/storage.h"

namespace tern::repository {
namespace {

// Size, time and inode of a file, with its name; "" if there is none.
std::string StateOf(const std::string& folder, const std::string& name) {
  struct stat info;
  if (::lstat(absl::StrCat(folder, "/", name).c_str(), &info) != 0) return "";
  return absl::StrCat(name, " ", info.st_size, " ", info.st_mtim.tv_sec, ".", info.st_mtim.tv_nsec,
                      " ", info.st_ino, "\n");
}

// Of what all versions of a model are loaded with.
std::string SharedState(const std::string& model_folder) {
  std::string state = StateOf(model_folder, kConfigFile);
  const auto config = ReadConfig(model_folder);
  if (config.ok() && !config->labels_file().empty()) {
    state += StateOf(model_folder, config->labels_file());
  }
  return state;
}

// Of a version's network; "" if there is none yet.
std::string NetworkState(const std::string& version_folder) {
  if (!IsRealFolder(version_folder)) return "";
  return StateOf(version_folder, kFloatFile) + StateOf(version_folder, kQuantizedFile);
}

}  // namespace

Watcher::Watcher(Repository* repository, std::string root, metrics::Metrics* metrics,
                 std::function<void()> changed)
    : repository_(repository),
      root_(std::move(root)),
      metrics_(metrics),
      changed_(std::move(changed)) {
  for (const VersionInfo& info : repository_->List("")) {
    // A version that failed at start may have been half copied then: it is tried once more.
    if (info.state == State::kUnavailable) continue;
    const std::string model = absl::StrCat(root_, "/", info.model);
    seen_[{info.model, info.version}] = {
        NetworkState(absl::StrCat(model, "/", info.version)) + SharedState(model), true, true};
  }
}

Watcher::~Watcher() {
  {
    std::lock_guard<std::mutex> lock(mutex_);
    stopping_ = true;
  }
  wake_.notify_all();
  if (thread_.joinable()) thread_.join();
}

void Watcher::Start(absl::Duration interval) {
  thread_ = std::thread([this, interval] {
    std::unique_lock<std::mutex> lock(mutex_);
    while (
        !wake_.wait_for(lock, absl::ToChronoNanoseconds(interval), [this] { return stopping_; })) {
      lock.unlock();
      Poll();
      lock.lock();
    }
  });
}

void Watcher::Event(const char* event) {
  events_ = true;
  if (metrics_ != nullptr) metrics_->WatchEvent(event);
}

void Watcher::Poll() {
  const auto names = ListFolder(root_);
  // A file system that was unmounted leaves an empty folder behind. Read-only there is no lock
  // whose absence would tell, so nothing is unloaded while there is nothing at all.
  const bool writable = repository_->CheckWritable().ok();
  const bool readable =
      names.ok() && (writable ? !IsGone(absl::StrCat(root_, "/.lock")) : !names->empty());
  if (!readable) {
    if (!unreadable_) {
      TERN_LOG_WARN("{}: nothing is changed until it is back: {}", root_,
                    !names.ok() ? names.status().ToString()
                                : (writable ? "its .lock is gone" : "it is empty"));
    }
    unreadable_ = true;
    return Event("unreadable");
  }
  unreadable_ = false;
  std::set<Key> present;
  for (const std::string& name : *names) {
    if (name[0] == '.' || !ValidateModelName(name).ok()) continue;
    if (IsRealFolder(absl::StrCat(root_, "/", name))) LookAt(name, present);
  }
  DropMissing(present);
  std::erase_if(default_refused_, [&](const auto& refused) {
    return !std::binary_search(names->begin(), names->end(), refused.first);
  });
  if (std::exchange(events_, false) && changed_) changed_();
}

void Watcher::LookAt(const std::string& model, std::set<Key>& present) {
  const std::string folder = absl::StrCat(root_, "/", model);
  const std::string shared = SharedState(folder);
  for (const uint64_t version : VersionsOnDisk(folder)) {
    const Key key{model, version};
    present.insert(key);
    const std::string own = NetworkState(absl::StrCat(folder, "/", version));
    if (own.empty()) continue;  // nothing to load yet
    Seen& seen = seen_[key];
    const std::string state = own + shared;
    if (state != seen.state) {
      seen.state = state;
      seen.tried = false;
      continue;
    }
    if (seen.tried) continue;
    seen.tried = true;
    const auto info = repository_->Info(model, version);
    const bool published = !seen.taken && info.ok() && info->state == State::kReady;
    seen.taken = true;
    if (published) continue;
    // The repository logs the outcome.
    Event(repository_->Load(model, version).ok() ? "loaded" : "load_failed");
  }
  const absl::StatusOr<bool> moved = repository_->FollowDefault(model);
  if (moved.ok()) {
    default_refused_.erase(model);
    if (*moved) Event("default_moved");
  } else if (!absl::IsNotFound(moved.status())) {
    std::string& said = default_refused_[model];
    if (said != moved.status().message()) {
      said = std::string(moved.status().message());
      TERN_LOG_WARN("the default of {} stays: {}", model, said);
      Event("default_refused");
    }
  }
}

void Watcher::DropMissing(const std::set<Key>& present) {
  for (auto it = seen_.begin(); it != seen_.end();) {
    it = present.count(it->first) > 0 ? std::next(it) : seen_.erase(it);
  }
  // Version 0 stands for a whole model.
  std::set<Key> missing;
  for (const VersionInfo& info : repository_->List("")) {
    const std::string folder = absl::StrCat(root_, "/", info.model);
    if (IsGone(folder)) {
      missing.insert({info.model, 0});
    } else if (IsGone(absl::StrCat(folder, "/", info.version))) {
      missing.insert({info.model, info.version});
    }
  }
  for (const Key& key : missing) {
    if (missing_.count(key) == 0) continue;
    const absl::Status status = repository_->Forget(key.first, key.second).status();
    if (status.ok()) Event("removed");
    std::string& said = drop_refused_[key];
    if (absl::IsFailedPrecondition(status) && said != status.message()) {
      said = std::string(status.message());
      TERN_LOG_WARN("the folder of {} version {} is gone: {}", key.first, key.second, said);
      Event("remove_refused");
    }
  }
  for (auto it = drop_refused_.begin(); it != drop_refused_.end();) {
    it = missing.count(it->first) > 0 ? std::next(it) : drop_refused_.erase(it);
  }
  missing_ = std::move(missing);
}

}  // namespace tern::repository
