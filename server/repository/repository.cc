#include "server/repository/repository.h"

#include <algorithm>
#include <array>
#include <map>
#include <mutex>
#include <optional>
#include <shared_mutex>
#include <utility>

#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "absl/time/clock.h"
#include "google/protobuf/text_format.h"
#include "google/protobuf/util/message_differencer.h"
#include "server/base/allocator.h"
#include "server/base/file.h"
#include "server/base/log.h"
#include "server/base/status_macros.h"
#include "server/classify/top_k.h"
#include "server/graph/passes.h"
#include "server/onnx/classifier.h"
#include "server/onnx/export.h"
#include "server/repository/load.h"
#include "server/repository/storage.h"

namespace tern::repository {
namespace {

// A version in memory. `loaded` and `servable` are set exactly while it is kReady.
struct Entry {
  VersionInfo info;
  std::shared_ptr<const LoadedModel> loaded;
  std::shared_ptr<Servable> servable;
};

struct Model {
  uint64_t default_version = 0;  // 0 = no version has been usable yet
  uint64_t missing_default = 0;  // what the pointer named when there was no such version
  uint64_t next_version = 1;
  std::map<uint64_t, Entry> versions;
};

constexpr uint64_t kLastVersion = 999'999'999'999'999'999;  // ParseVersion's limit

metrics::ModelLabels LabelsOf(const VersionInfo& info) {
  return {info.model, info.version, info.scheme};
}

// At most ten items, for messages.
template <typename Map>
std::string Keys(const Map& map) {
  if (map.empty()) return "none";
  std::string text;
  int count = 0;
  for (const auto& item : map) {
    if (count == 10) return absl::StrCat(text, ", ... (", map.size(), " in all)");
    absl::StrAppend(&text, count++ == 0 ? "" : ", ", item.first);
  }
  return text;
}

void DrainAndDrop(std::shared_ptr<Servable> servable) {
  if (servable != nullptr) servable->Drain();
}

absl::Status CheckLabels(const std::vector<std::string>& labels) {
  if (labels.empty()) return absl::OkStatus();
  const auto parsed = classify::ParseLabels(absl::StrJoin(labels, "\n") + "\n",
                                            static_cast<int64_t>(labels.size()));
  if (!parsed.ok())
    return absl::InvalidArgumentError(absl::StrCat("labels: ", parsed.status().message()));
  if (*parsed != labels)
    return absl::InvalidArgumentError("labels: a name holds a line break or the last is empty");
  return absl::OkStatus();
}

}  // namespace

absl::Status ValidateModelName(absl::string_view name) {
  const auto letter_or_digit = [](char c) {
    return (c >= 'a' && c <= 'z') || (c >= '0' && c <= '9');
  };
  const bool valid = !name.empty() && name.size() <= 64 && letter_or_digit(name[0]) &&
                     std::all_of(name.begin(), name.end(), [&](char c) {
                       return letter_or_digit(c) || c == '.' || c == '_' || c == '-';
                     });
  if (valid) return absl::OkStatus();
  std::string shown(name.substr(0, 64));
  for (char& c : shown) {
    if (c < ' ' || c > '~') c = '?';
  }
  return absl::InvalidArgumentError(absl::StrCat(
      "model name: got '", shown, "' (", name.size(),
      " bytes), want 1 to 64 of a-z, 0-9, '.', '_', '-', beginning with a letter or digit"));
}

struct Repository::Impl {
  Impl(RepositoryOptions options, std::optional<RootLock> root_lock)
      : options(std::move(options)), root_lock(std::move(root_lock)) {}

  const RepositoryOptions options;
  const std::optional<RootLock> root_lock;  // none if read-only

  // Changes of a model hold its gate from start to end, loading included; lookups never do. A fixed
  // number of gates, so names from outside cannot grow anything.
  std::array<std::mutex, 64> gates;
  // Guards what follows; held for moments. Taken after a gate, never before one.
  mutable std::shared_mutex mutex;
  std::map<std::string, Model> models;
  // First unused version number of models that were deleted: numbers are not used twice in one
  // process.
  std::map<std::string, uint64_t> retired;
  bool shutdown = false;

  std::mutex& GateOf(const std::string& name) {
    return gates[std::hash<std::string>()(name) % gates.size()];
  }
  std::string FolderOf(const std::string& name) const {
    return absl::StrCat(options.root, "/", name);
  }
  std::string FolderOf(const std::string& name, uint64_t version) const {
    return absl::StrCat(options.root, "/", name, "/", version);
  }

  // With `mutex` held. NOT_FOUND naming what exists.
  absl::StatusOr<const Model*> FindModel(absl::string_view name) const {
    const auto it = models.find(std::string(name));
    if (it == models.end()) {
      return absl::NotFoundError(
          absl::StrCat("model '", name.substr(0, 64), "' does not exist; models: ", Keys(models)));
    }
    return &it->second;
  }
  absl::StatusOr<const Entry*> FindEntry(absl::string_view name, uint64_t version) const {
    TERN_ASSIGN_OR_RETURN(const Model* model, FindModel(name));
    const bool none_usable =
        version == 0 && model->default_version == 0;  // then the lowest one's reason helps
    const auto it = none_usable
                        ? model->versions.begin()
                        : model->versions.find(version == 0 ? model->default_version : version);
    if (it == model->versions.end()) {
      return absl::NotFoundError(
          absl::StrCat("model '", name, "' has no ",
                       version == 0 ? "default version" : absl::StrCat("version ", version),
                       "; versions: ", Keys(model->versions)));
    }
    return &it->second;
  }
  // As FindEntry; UNAVAILABLE unless it serves.
  absl::StatusOr<const Entry*> FindReady(absl::string_view name, uint64_t version) const {
    TERN_ASSIGN_OR_RETURN(const Entry* entry, FindEntry(name, version));
    if (entry->loaded != nullptr) return entry;
    const std::string what = absl::StrCat("model '", name, "' version ", entry->info.version);
    switch (entry->info.state) {
      case State::kLoading:
        return absl::UnavailableError(absl::StrCat(what, " is being loaded"));
      case State::kUnloaded:
        return absl::UnavailableError(absl::StrCat(what, " is not loaded"));
      default:
        // The reason names files, which those who may only classify do not see.
        return absl::UnavailableError(
            absl::StrCat(what, " cannot be served; the log and the list of models say why"));
    }
  }
  VersionInfo Snapshot(const Entry& entry) const {
    VersionInfo info = entry.info;
    info.is_default = models.at(info.model).default_version == info.version;
    return info;
  }
  absl::StatusOr<VersionInfo> SnapshotOf(const std::string& name, uint64_t version) const {
    std::shared_lock<std::shared_mutex> lock(mutex);
    TERN_ASSIGN_OR_RETURN(const Entry* entry, FindEntry(name, version));
    return Snapshot(*entry);
  }
  absl::Status CheckOpen() const {
    std::shared_lock<std::shared_mutex> lock(mutex);
    return shutdown ? absl::UnavailableError("the server is shutting down") : absl::OkStatus();
  }

  // The functions below are called with the model's gate held and `mutex` free.

  // Reads the model's folder into `models` unless it is known; every version starts as kUnloaded.
  // Does nothing if there is no such folder.
  void Discover(const std::string& name);
  // Takes a known version out of memory, after its last batch.
  absl::StatusOr<VersionInfo> Drop(const std::string& name, uint64_t version);
  // Loads a known version and makes it serve in place of what served before.
  absl::Status Activate(const std::string& name, uint64_t version);
  // Gives a fresh model its identity and makes its servable.
  absl::StatusOr<std::shared_ptr<Servable>> Prepare(const std::shared_ptr<LoadedModel>& loaded,
                                                    const std::string& name, uint64_t version,
                                                    bool is_default) const;
  // Publishes `folder` as `target` and makes the version serve. `write_default`: move the pointer.
  absl::StatusOr<VersionInfo> Install(std::shared_ptr<LoadedModel> loaded, const std::string& name,
                                      uint64_t version, TempFolder folder,
                                      const std::string& target, bool is_default,
                                      bool write_default);
  // The next number for a version; RESOURCE_EXHAUSTED after 10^18.
  absl::StatusOr<uint64_t> NextVersion(const std::string& name) const;
  // INVALID_ARGUMENT if a version of the model that has been read takes other images or has other
  // classes.
  absl::Status CheckFits(const std::string& name, const LoadedModel& loaded) const;
  // FAILED_PRECONDITION unless the model has this version, of a file with this SHA-256.
  absl::Status CheckSource(const std::string& name, uint64_t version,
                           const std::string& sha256) const;
  // Whether removing `version` (0 = all) removes the model. NOT_FOUND; FAILED_PRECONDITION for the
  // default version while others exist.
  absl::StatusOr<bool> RemovesWhole(const std::string& name, uint64_t version) const;
  // Takes a version (or all, `whole`: the model) out of memory. Returns how many there were.
  uint64_t Drop(const std::string& name, uint64_t version, bool whole, const char* word);
  // Reports the default's change to the metrics.
  void TellDefault(const std::string& name, uint64_t before, uint64_t after) const;
  // The metrics of a version that is about to serve.
  void TellLoaded(const LoadedModel& loaded, bool is_default) const;
};

void Repository::Impl::Discover(const std::string& name) {
  {
    std::shared_lock<std::shared_mutex> lock(mutex);
    if (models.count(name) > 0) return;
  }
  const std::string folder = FolderOf(name);
  if (!IsRealFolder(folder)) return;
  if (!options.read_only) CleanUp(folder);
  Model model;
  for (uint64_t version : VersionsOnDisk(folder)) {
    Entry& entry = model.versions[version];
    entry.info.model = name;
    entry.info.version = version;
    entry.info.state = State::kUnloaded;
    model.next_version = version + 1;
  }
  if (const auto names = ListFolder(folder); names.ok()) {
    for (const std::string& file : *names) {
      if (file[0] != '.' && !ParseVersion(file) && IsRealFolder(absl::StrCat(folder, "/", file))) {
        TERN_LOG_WARN("{}/{}: ignored, not a version number", folder, file);
      }
    }
  }
  const auto pointer = ReadDefault(folder);
  if (pointer.ok() && model.versions.count(*pointer) > 0) {
    model.default_version = *pointer;
  } else if (!absl::IsNotFound(pointer.status()) && !model.versions.empty()) {
    model.missing_default = pointer.value_or(0);
    TERN_LOG_WARN("{}: the default pointer is unusable ({}); another version becomes the default",
                  folder,
                  pointer.ok() ? absl::StrCat("there is no version ", *pointer)
                               : pointer.status().ToString());
    if (options.metrics != nullptr) options.metrics->Fallback("default_pointer");
  }
  std::unique_lock<std::shared_mutex> lock(mutex);
  const auto used = retired.find(name);
  if (used != retired.end()) model.next_version = std::max(model.next_version, used->second);
  models.emplace(name, std::move(model));
}

absl::StatusOr<std::shared_ptr<Servable>> Repository::Impl::Prepare(
    const std::shared_ptr<LoadedModel>& loaded, const std::string& name, uint64_t version,
    bool is_default) const {
  loaded->info.model = name;
  loaded->info.version = version;
  loaded->info.is_default = is_default;
  loaded->metric_labels = LabelsOf(loaded->info);
  if (!options.make_servable) return std::shared_ptr<Servable>();
  return options.make_servable(loaded);
}

absl::Status Repository::Impl::Activate(const std::string& name, uint64_t version) {
  bool is_default = false;
  {
    std::unique_lock<std::shared_mutex> lock(mutex);
    Model& model = models.at(name);
    Entry& entry = model.versions.at(version);
    is_default = model.default_version == version || model.default_version == 0;
    if (entry.loaded == nullptr) entry.info.state = State::kLoading;
  }
  const absl::Time start = absl::Now();
  absl::StatusOr<std::shared_ptr<LoadedModel>> loaded =
      LoadVersion(FolderOf(name), FolderOf(name, version), Origin::kKnown, options);
  absl::StatusOr<std::shared_ptr<Servable>> servable = std::shared_ptr<Servable>();
  if (loaded.ok()) servable = Prepare(*loaded, name, version, is_default);
  const absl::Status status = loaded.ok() ? servable.status() : loaded.status();

  // Before the first request, which would not be counted for a version that was removed.
  if (status.ok()) TellLoaded(**loaded, is_default);
  std::shared_ptr<const LoadedModel> old_loaded;
  std::shared_ptr<Servable> old_servable;
  bool unavailable = false;
  VersionInfo info;
  {
    std::unique_lock<std::shared_mutex> lock(mutex);
    Model& model = models.at(name);
    Entry& entry = model.versions.at(version);
    if (status.ok()) {
      old_loaded = std::exchange(entry.loaded, *loaded);
      old_servable = std::exchange(entry.servable, *std::move(servable));
      entry.info = (*loaded)->info;
      if (model.default_version == 0) model.default_version = version;
    } else if (entry.loaded == nullptr) {
      unavailable = true;
      entry.info.state = State::kUnavailable;
      entry.info.reason = std::string(status.message());
    }
    info = Snapshot(entry);
  }
  if (status.ok()) {
    DrainAndDrop(std::move(old_servable));
    if (old_loaded != nullptr) {
      old_loaded = nullptr;
      ReturnFreedMemory();
    }
    TERN_LOG_INFO("loaded {} version {}: {}, {} bytes, in {}", name, version, info.scheme,
                  info.file_bytes, absl::FormatDuration(absl::Now() - start));
  } else {
    TERN_LOG_ERROR("{} version {} cannot be loaded{}: {}", name, version,
                   unavailable ? "" : ", the one in memory goes on serving", status.ToString());
  }
  if (options.metrics != nullptr) {
    if (unavailable) options.metrics->ModelUnavailable(LabelsOf(info));
    if (IsFailedSelfTest(status)) {
      options.metrics->ModelSelfTest(LabelsOf(info), kernels::IsaName(options.plan.isa), false);
    }
  }
  return status;
}

absl::StatusOr<uint64_t> Repository::Impl::NextVersion(const std::string& name) const {
  uint64_t next = 1;
  {
    std::shared_lock<std::shared_mutex> lock(mutex);
    if (const auto used = retired.find(name); used != retired.end()) next = used->second;
    if (const auto it = models.find(name); it != models.end())
      next = std::max(next, it->second.next_version);
  }
  const std::vector<uint64_t> on_disk = VersionsOnDisk(FolderOf(name));
  if (!on_disk.empty()) next = std::max(next, on_disk.back() + 1);
  if (next > kLastVersion) {
    return absl::ResourceExhaustedError(
        absl::StrCat("model '", name, "' has used its last version number"));
  }
  return next;
}

absl::Status Repository::Impl::CheckFits(const std::string& name, const LoadedModel& loaded) const {
  std::shared_lock<std::shared_mutex> lock(mutex);
  const auto it = models.find(name);
  if (it == models.end()) return absl::OkStatus();
  for (const auto& [version, entry] : it->second.versions) {
    if (entry.info.classes == 0) continue;
    if (entry.info.input_shape != loaded.info.input_shape ||
        entry.info.classes != loaded.info.classes) {
      return absl::InvalidArgumentError(
          absl::StrCat("the network maps ", loaded.info.input_shape.ToString(), " to ",
                       loaded.info.classes, " classes, version ", version, " of '", name, "' maps ",
                       entry.info.input_shape.ToString(), " to ", entry.info.classes));
    }
  }
  return absl::OkStatus();
}

void Repository::Impl::TellLoaded(const LoadedModel& loaded, bool is_default) const {
  if (options.metrics == nullptr) return;
  options.metrics->ModelLoaded(loaded.metric_labels, loaded.isa, loaded.plan->weight_bytes(),
                               is_default, GaugesOf(loaded.report));
  if (loaded.self_tested) options.metrics->ModelSelfTest(loaded.metric_labels, loaded.isa, true);
}

void Repository::Impl::TellDefault(const std::string& name, uint64_t before, uint64_t after) const {
  if (options.metrics == nullptr || before == after) return;
  for (const uint64_t version : {before, after}) {
    const auto info = version == 0 ? absl::NotFoundError("none") : SnapshotOf(name, version);
    if (info.ok()) options.metrics->ModelDefault(LabelsOf(*info), info->is_default);
  }
}

absl::StatusOr<VersionInfo> Repository::Impl::Install(std::shared_ptr<LoadedModel> loaded,
                                                      const std::string& name, uint64_t version,
                                                      TempFolder folder, const std::string& target,
                                                      bool is_default, bool write_default) {
  TERN_ASSIGN_OR_RETURN(std::shared_ptr<Servable> servable,
                        Prepare(loaded, name, version, is_default));
  absl::Status status = folder.Publish(target);
  if (status.ok() && write_default) {
    status = WriteDefault(FolderOf(name), version);
    if (!status.ok()) RemoveFolder(target).IgnoreError();
  }
  if (!status.ok()) {
    DrainAndDrop(std::move(servable));
    // A collection may have met it.
    if (options.metrics != nullptr) options.metrics->ModelRemoved(loaded->metric_labels);
    return status;
  }
  TellLoaded(*loaded, is_default);
  uint64_t before = 0;
  VersionInfo info;
  {
    std::unique_lock<std::shared_mutex> lock(mutex);
    Model& model = models[name];
    before = model.default_version;
    model.next_version = version + 1;
    if (is_default) model.default_version = version;
    model.versions[version] = Entry{loaded->info, loaded, std::move(servable)};
    info = Snapshot(model.versions[version]);
  }
  TERN_LOG_INFO("published {} version {}: {}, {} bytes{}", name, version, info.scheme,
                info.file_bytes, info.is_default ? ", default" : "");
  if (is_default) TellDefault(name, before, version);
  return info;
}

absl::Status Repository::Impl::CheckSource(const std::string& name, uint64_t version,
                                           const std::string& sha256) const {
  const std::string source = absl::StrCat("the source version ", version, " of '", name, "'");
  if (!SnapshotOf(name, version).ok()) {
    return absl::FailedPreconditionError(absl::StrCat(source, " was deleted meanwhile"));
  }
  // The number alone does not tell: others may have put another file in place.
  const auto file = FindVersionFile(FolderOf(name, version), options.max_file_bytes);
  const auto bytes =
      file.ok() ? ReadRegularFile(file->path, options.max_file_bytes) : file.status();
  if (!bytes.ok()) {
    return absl::FailedPreconditionError(
        absl::StrCat(source, " is not there any more: ", bytes.status().message()));
  }
  if (Sha256Hex(*bytes) == sha256) return absl::OkStatus();
  return absl::FailedPreconditionError(absl::StrCat(source, " was replaced meanwhile"));
}

absl::StatusOr<bool> Repository::Impl::RemovesWhole(const std::string& name,
                                                    uint64_t version) const {
  std::shared_lock<std::shared_mutex> lock(mutex);
  TERN_ASSIGN_OR_RETURN(const Model* known, FindModel(name));
  if (version == 0) return true;
  TERN_RETURN_IF_ERROR(FindEntry(name, version).status());
  if (known->versions.size() == 1) return true;
  if (known->default_version != version) return false;
  return absl::FailedPreconditionError(
      absl::StrCat("version ", version, " is the default of '", name,
                   "' and others exist; make another one the default first"));
}

uint64_t Repository::Impl::Drop(const std::string& name, uint64_t version, bool whole,
                                const char* word) {
  std::vector<Entry> removed;
  {
    std::unique_lock<std::shared_mutex> lock(mutex);
    Model& known = models.at(name);
    if (whole) {
      for (auto& item : known.versions) removed.push_back(std::move(item.second));
      retired[name] = known.next_version;
      models.erase(name);
    } else {
      removed.push_back(std::move(known.versions.at(version)));
      known.versions.erase(version);
    }
  }
  for (Entry& entry : removed) {
    DrainAndDrop(std::move(entry.servable));
    if (options.metrics != nullptr) options.metrics->ModelRemoved(LabelsOf(entry.info));
    TERN_LOG_INFO("{} {} version {}", word, name, entry.info.version);
    entry.loaded = nullptr;
  }
  ReturnFreedMemory();
  return removed.size();
}

absl::StatusOr<std::unique_ptr<Repository>> Repository::Open(RepositoryOptions options) {
  std::optional<RootLock> root_lock;
  if (!options.read_only) {
    TERN_ASSIGN_OR_RETURN(RootLock acquired, RootLock::Acquire(options.root));
    root_lock.emplace(std::move(acquired));
  }
  auto impl = std::make_unique<Impl>(std::move(options), std::move(root_lock));
  const std::string& root = impl->options.root;
  if (!impl->options.read_only) CleanUp(root);
  TERN_ASSIGN_OR_RETURN(const std::vector<std::string> names, ListFolder(root));
  for (const std::string& name : names) {
    if (name[0] == '.') continue;
    const bool folder = IsRealFolder(absl::StrCat(root, "/", name));
    const absl::Status valid = ValidateModelName(name);
    if (!valid.ok() || !folder) {
      TERN_LOG_WARN("{}/{}: ignored, {}", root, name,
                    folder ? std::string(valid.message()) : "not a folder");
      continue;
    }
    impl->Discover(name);
    const Model& model = impl->models.at(name);
    std::vector<uint64_t> versions;
    for (const auto& item : model.versions) versions.push_back(item.first);
    // Without a default the first that can be used becomes it: the lowest, or, where the pointer
    // names one that is gone, what probably served before that.
    std::reverse(versions.begin(),
                 std::lower_bound(versions.begin(), versions.end(), model.missing_default));
    for (const uint64_t version : versions)
      impl->Activate(name, version).IgnoreError();  // kept as unavailable
  }
  return std::unique_ptr<Repository>(new Repository(std::move(impl)));
}

Repository::Repository(std::unique_ptr<Impl> impl) : impl_(std::move(impl)) {}

Repository::~Repository() { Shutdown(); }

absl::Status Repository::CheckWritable() const {
  if (!impl_->options.read_only) return absl::OkStatus();
  return absl::FailedPreconditionError(
      absl::StrCat("repository ", impl_->options.root, " is served read-only (--read_only)"));
}

absl::StatusOr<std::shared_ptr<Servable>> Repository::Acquire(absl::string_view model,
                                                              uint64_t version) const {
  std::shared_lock<std::shared_mutex> lock(impl_->mutex);
  if (impl_->shutdown) return absl::UnavailableError("the server is shutting down");
  TERN_ASSIGN_OR_RETURN(const Entry* entry, impl_->FindReady(model, version));
  return entry->servable;
}

absl::StatusOr<std::shared_ptr<const LoadedModel>> Repository::Find(absl::string_view model,
                                                                    uint64_t version) const {
  std::shared_lock<std::shared_mutex> lock(impl_->mutex);
  TERN_ASSIGN_OR_RETURN(const Entry* entry, impl_->FindReady(model, version));
  return entry->loaded;
}

absl::StatusOr<VersionInfo> Repository::Info(absl::string_view model, uint64_t version) const {
  return impl_->SnapshotOf(std::string(model), version);
}

std::vector<VersionInfo> Repository::List(absl::string_view model) const {
  std::vector<VersionInfo> list;
  std::shared_lock<std::shared_mutex> lock(impl_->mutex);
  for (const auto& [name, versions_of] : impl_->models) {
    if (!model.empty() && model != name) continue;
    for (const auto& item : versions_of.versions) list.push_back(impl_->Snapshot(item.second));
  }
  return list;
}

absl::StatusOr<VersionInfo> Repository::Import(absl::string_view model, absl::string_view onnx,
                                               const v1::Preprocessing& preprocessing,
                                               const std::vector<std::string>& labels,
                                               bool set_default) {
  return ImportFile(model, kFloatFile, onnx, preprocessing, labels, set_default);
}

absl::StatusOr<VersionInfo> Repository::ImportArtifact(absl::string_view model,
                                                       absl::string_view bytes, bool set_default) {
  TERN_RETURN_IF_ERROR(ValidateModelName(model));
  TERN_ASSIGN_OR_RETURN(const artifact::Artifact parsed, artifact::Parse(bytes, "the artifact"));
  return ImportFile(model, kQuantizedFile, bytes, parsed.preprocessing, parsed.labels, set_default);
}

absl::StatusOr<VersionInfo> Repository::ImportFile(absl::string_view model, const char* file,
                                                   absl::string_view bytes,
                                                   const v1::Preprocessing& preprocessing,
                                                   const std::vector<std::string>& labels,
                                                   bool set_default) {
  TERN_RETURN_IF_ERROR(CheckWritable());
  TERN_RETURN_IF_ERROR(ValidateModelName(model));
  TERN_RETURN_IF_ERROR(CheckLabels(labels));
  if (bytes.size() > impl_->options.max_file_bytes) {
    return absl::ResourceExhaustedError(absl::StrCat(
        "the file: ", bytes.size(), " bytes, the limit is ", impl_->options.max_file_bytes));
  }
  const std::string name(model);
  const std::string folder = impl_->FolderOf(name);
  std::lock_guard<std::mutex> gate(impl_->GateOf(name));
  TERN_RETURN_IF_ERROR(impl_->CheckOpen());
  impl_->Discover(name);
  TERN_ASSIGN_OR_RETURN(const uint64_t version, impl_->NextVersion(name));
  bool exists = false, first = true;
  {
    std::shared_lock<std::shared_mutex> lock(impl_->mutex);
    const auto it = impl_->models.find(name);
    exists = it != impl_->models.end();
    first = !exists || it->second.default_version == 0;
  }

  if (exists) {
    auto config = ReadConfig(folder);
    if (!config.ok()) return absl::FailedPreconditionError(config.status().message());
    if (!google::protobuf::util::MessageDifferencer::Equals(config->preprocessing(),
                                                            preprocessing)) {
      return absl::InvalidArgumentError(
          absl::StrCat("preprocessing: model '", name, "' exists with another contract (",
                       config->preprocessing().ShortDebugString(), "); import under another name"));
    }
    if (!labels.empty()) {
      TERN_ASSIGN_OR_RETURN(const std::vector<std::string> present, ReadLabels(folder, *config, 0));
      if (present != labels) {
        return absl::InvalidArgumentError(
            absl::StrCat("labels: model '", name,
                         present.empty() ? "' has none; to add them write one name per line to a "
                                           "file in its folder, name it as labels_file in its "
                                           "config.textproto and load its versions"
                                         : "' exists with other labels"));
      }
    }
    TERN_ASSIGN_OR_RETURN(TempFolder temp, TempFolder::Create(folder));
    TERN_RETURN_IF_ERROR(WriteFileAtomically(absl::StrCat(temp.path(), "/", file), {bytes}));
    TERN_ASSIGN_OR_RETURN(std::shared_ptr<LoadedModel> loaded,
                          LoadVersion(folder, temp.path(), Origin::kNew, impl_->options));
    TERN_RETURN_IF_ERROR(impl_->CheckFits(name, *loaded));
    const std::string target = impl_->FolderOf(name, version);
    return impl_->Install(std::move(loaded), name, version, std::move(temp), target,
                          set_default || first, set_default || first);
  }

  // A new model is published as a whole: config, labels, default pointer and first version by one
  // rename.
  TERN_ASSIGN_OR_RETURN(TempFolder temp, TempFolder::Create(impl_->options.root));
  v1::ModelConfig config;
  *config.mutable_preprocessing() = preprocessing;
  if (!labels.empty()) {
    config.set_labels_file(kLabelsFile);
    const std::string text = absl::StrJoin(labels, "\n") + "\n";
    TERN_RETURN_IF_ERROR(WriteFileAtomically(absl::StrCat(temp.path(), "/", kLabelsFile), {text}));
  }
  std::string config_text;
  google::protobuf::TextFormat::PrintToString(config, &config_text);
  TERN_RETURN_IF_ERROR(
      WriteFileAtomically(absl::StrCat(temp.path(), "/", kConfigFile), {config_text}));
  TERN_RETURN_IF_ERROR(WriteDefault(temp.path(), version));
  const std::string version_folder = absl::StrCat(temp.path(), "/", version);
  TERN_RETURN_IF_ERROR(MakeFolder(version_folder));
  TERN_RETURN_IF_ERROR(WriteFileAtomically(absl::StrCat(version_folder, "/", file), {bytes}));
  TERN_ASSIGN_OR_RETURN(std::shared_ptr<LoadedModel> loaded,
                        LoadVersion(temp.path(), version_folder, Origin::kNew, impl_->options));
  return impl_->Install(std::move(loaded), name, version, std::move(temp), folder, true, false);
}

absl::StatusOr<VersionInfo> Repository::Publish(absl::string_view model,
                                                const artifact::Artifact& artifact,
                                                bool set_default, uint64_t source_version) {
  TERN_RETURN_IF_ERROR(CheckWritable());
  TERN_RETURN_IF_ERROR(ValidateModelName(model));
  const std::string name(model);
  const std::string folder = impl_->FolderOf(name);
  std::lock_guard<std::mutex> gate(impl_->GateOf(name));
  TERN_RETURN_IF_ERROR(impl_->CheckOpen());
  impl_->Discover(name);
  if (source_version != 0) {
    TERN_RETURN_IF_ERROR(impl_->CheckSource(name, source_version, artifact.source_sha256));
  }
  bool first = false;
  {
    std::shared_lock<std::shared_mutex> lock(impl_->mutex);
    TERN_ASSIGN_OR_RETURN(const Model* known, impl_->FindModel(name));
    first = known->default_version == 0;
  }
  TERN_ASSIGN_OR_RETURN(const uint64_t version, impl_->NextVersion(name));
  TERN_ASSIGN_OR_RETURN(TempFolder temp, TempFolder::Create(folder));
  TERN_RETURN_IF_ERROR(artifact::Write(artifact, absl::StrCat(temp.path(), "/", kQuantizedFile)));
  // Loaded from the file, so what is published is what was tested.
  TERN_ASSIGN_OR_RETURN(std::shared_ptr<LoadedModel> loaded,
                        LoadVersion(folder, temp.path(), Origin::kNew, impl_->options));
  TERN_RETURN_IF_ERROR(impl_->CheckFits(name, *loaded));
  const std::string target = impl_->FolderOf(name, version);
  return impl_->Install(std::move(loaded), name, version, std::move(temp), target,
                        set_default || first, set_default || first);
}

absl::StatusOr<VersionInfo> Repository::Load(absl::string_view model, uint64_t version) {
  TERN_RETURN_IF_ERROR(ValidateModelName(model));
  const std::string name(model);
  std::lock_guard<std::mutex> gate(impl_->GateOf(name));
  TERN_RETURN_IF_ERROR(impl_->CheckOpen());
  impl_->Discover(name);
  const bool on_disk =
      version != 0 && version <= kLastVersion && IsRealFolder(impl_->FolderOf(name, version));
  {
    std::unique_lock<std::shared_mutex> lock(impl_->mutex);
    TERN_RETURN_IF_ERROR(impl_->FindModel(name).status());
    Model& known = impl_->models.at(name);
    if (on_disk && known.versions.count(version) == 0) {
      Entry& entry = known.versions[version];
      entry.info.model = name;
      entry.info.version = version;
      known.next_version = std::max(known.next_version, version + 1);
    }
    TERN_ASSIGN_OR_RETURN(const Entry* entry, impl_->FindEntry(name, version));
    version = entry->info.version;
  }
  TERN_RETURN_IF_ERROR(impl_->Activate(name, version));
  return impl_->SnapshotOf(name, version);
}

absl::StatusOr<VersionInfo> Repository::Impl::Drop(const std::string& name, uint64_t version) {
  std::shared_ptr<const LoadedModel> loaded;
  std::shared_ptr<Servable> servable;
  VersionInfo info;
  {
    std::unique_lock<std::shared_mutex> lock(mutex);
    TERN_RETURN_IF_ERROR(FindEntry(name, version).status());
    Entry& entry = models.at(name).versions.at(version);
    loaded = std::move(entry.loaded);
    servable = std::move(entry.servable);
    entry.loaded = nullptr;
    entry.servable = nullptr;
    entry.info.state = State::kUnloaded;
    entry.info.reason.clear();
    info = Snapshot(entry);
  }
  DrainAndDrop(std::move(servable));
  if (options.metrics != nullptr) options.metrics->ModelRemoved(LabelsOf(info));
  loaded = nullptr;
  ReturnFreedMemory();
  TERN_LOG_INFO("unloaded {} version {}", name, info.version);
  return info;
}

absl::StatusOr<VersionInfo> Repository::Unload(absl::string_view model, uint64_t version) {
  TERN_RETURN_IF_ERROR(ValidateModelName(model));
  const std::string name(model);
  std::lock_guard<std::mutex> gate(impl_->GateOf(name));
  TERN_RETURN_IF_ERROR(impl_->CheckOpen());
  {
    std::shared_lock<std::shared_mutex> lock(impl_->mutex);
    TERN_ASSIGN_OR_RETURN(const Entry* found, impl_->FindEntry(name, version));
    version = found->info.version;
    if (impl_->models.at(name).default_version == version) {
      return absl::FailedPreconditionError(absl::StrCat("version ", version, " is the default of '",
                                                        name,
                                                        "'; make another one the default first"));
    }
  }
  return impl_->Drop(name, version);
}

absl::Status Repository::UnloadAll(absl::string_view model) {
  TERN_RETURN_IF_ERROR(ValidateModelName(model));
  const std::string name(model);
  std::lock_guard<std::mutex> gate(impl_->GateOf(name));
  TERN_RETURN_IF_ERROR(impl_->CheckOpen());
  std::vector<uint64_t> versions;
  {
    std::shared_lock<std::shared_mutex> lock(impl_->mutex);
    TERN_ASSIGN_OR_RETURN(const Model* found, impl_->FindModel(name));
    for (const auto& [version, entry] : found->versions) versions.push_back(version);
  }
  for (uint64_t version : versions) TERN_RETURN_IF_ERROR(impl_->Drop(name, version).status());
  return absl::OkStatus();
}

absl::StatusOr<VersionInfo> Repository::SetDefault(absl::string_view model, uint64_t version) {
  TERN_RETURN_IF_ERROR(CheckWritable());
  TERN_RETURN_IF_ERROR(ValidateModelName(model));
  if (version == 0)
    return absl::InvalidArgumentError("version: got 0, want the version that becomes the default");
  const std::string name(model);
  std::lock_guard<std::mutex> gate(impl_->GateOf(name));
  TERN_RETURN_IF_ERROR(impl_->CheckOpen());
  {
    std::shared_lock<std::shared_mutex> lock(impl_->mutex);
    TERN_ASSIGN_OR_RETURN(const Entry* entry, impl_->FindEntry(name, version));
    if (entry->loaded == nullptr) {
      return absl::FailedPreconditionError(impl_->FindReady(name, version).status().message());
    }
  }
  TERN_RETURN_IF_ERROR(WriteDefault(impl_->FolderOf(name), version));
  uint64_t before = 0;
  {
    std::unique_lock<std::shared_mutex> lock(impl_->mutex);
    before = std::exchange(impl_->models.at(name).default_version, version);
  }
  impl_->TellDefault(name, before, version);
  TERN_LOG_INFO("default of {}: version {} (was {})", name, version, before);
  return impl_->SnapshotOf(name, version);
}

absl::StatusOr<uint64_t> Repository::Delete(absl::string_view model, uint64_t version) {
  TERN_RETURN_IF_ERROR(CheckWritable());
  TERN_RETURN_IF_ERROR(ValidateModelName(model));
  const std::string name(model);
  std::lock_guard<std::mutex> gate(impl_->GateOf(name));
  TERN_RETURN_IF_ERROR(impl_->CheckOpen());
  TERN_ASSIGN_OR_RETURN(const bool whole, impl_->RemovesWhole(name, version));
  if (whole && version != 0) {
    // What others copied there, and nobody has loaded yet, is not this version's.
    TERN_ASSIGN_OR_RETURN(const std::vector<std::string> others,
                          FoldersBeside(impl_->FolderOf(name), version));
    if (!others.empty()) {
      const auto shown = others.begin() + std::min<size_t>(others.size(), 10);
      return absl::FailedPreconditionError(absl::StrCat(
          "version ", version, " of '", name,
          "' is the last that the server knows, but the model's folder also holds ",
          absl::StrJoin(others.begin(), shown, ", "), shown == others.end() ? "" : ", ...",
          "; load another version and make it the default first, or delete the whole model"));
    }
  }
  const std::string folder = whole ? impl_->FolderOf(name) : impl_->FolderOf(name, version);
  // Not deleted, but out of reach: a file system that was unmounted leaves an empty folder behind.
  if (const std::string lock = absl::StrCat(impl_->options.root, "/.lock");
      IsGone(folder) && IsGone(lock)) {
    return absl::FailedPreconditionError(
        absl::StrCat("remove ", folder, ": the repository's folder is gone: no ", lock));
  }
  TERN_RETURN_IF_ERROR(RemoveFolder(folder));
  return impl_->Drop(name, version, whole, "deleted");
}

absl::StatusOr<bool> Repository::FollowDefault(absl::string_view model) {
  TERN_RETURN_IF_ERROR(ValidateModelName(model));
  const std::string name(model);
  std::lock_guard<std::mutex> gate(impl_->GateOf(name));
  TERN_RETURN_IF_ERROR(impl_->CheckOpen());
  TERN_ASSIGN_OR_RETURN(const uint64_t version, ReadDefault(impl_->FolderOf(name)));
  uint64_t before = 0;
  {
    std::unique_lock<std::shared_mutex> lock(impl_->mutex);
    const auto known = impl_->models.find(name);
    if (known == impl_->models.end()) return false;
    before = known->second.default_version;
    if (before == version) return false;
    const absl::Status ready = impl_->FindReady(name, version).status();
    if (!ready.ok()) return absl::FailedPreconditionError(ready.message());
    known->second.default_version = version;
  }
  impl_->TellDefault(name, before, version);
  TERN_LOG_INFO("default of {}: version {} (was {}), as its pointer says", name, version, before);
  return true;
}

absl::StatusOr<uint64_t> Repository::Forget(absl::string_view model, uint64_t version) {
  TERN_RETURN_IF_ERROR(ValidateModelName(model));
  const std::string name(model);
  std::lock_guard<std::mutex> gate(impl_->GateOf(name));
  TERN_RETURN_IF_ERROR(impl_->CheckOpen());
  const std::string folder = version == 0 ? impl_->FolderOf(name) : impl_->FolderOf(name, version);
  if (IsRealFolder(folder)) {
    return absl::FailedPreconditionError(absl::StrCat(folder, " exists"));
  }
  TERN_ASSIGN_OR_RETURN(const bool whole, impl_->RemovesWhole(name, version));
  return impl_->Drop(name, version, whole, "folder gone, unloaded");
}

absl::StatusOr<Repository::FloatSource> Repository::ReadFloatSource(absl::string_view model,
                                                                    uint64_t version) const {
  TERN_ASSIGN_OR_RETURN(const VersionInfo info, Info(model, version));
  TERN_ASSIGN_OR_RETURN(
      const VersionFile file,
      FindVersionFile(impl_->FolderOf(info.model, info.version), impl_->options.max_file_bytes));
  if (file.quantized) {
    return absl::FailedPreconditionError(absl::StrCat("model '", info.model, "' version ",
                                                      info.version, " is quantised (", info.scheme,
                                                      "), want a float version"));
  }
  TERN_ASSIGN_OR_RETURN(const std::string bytes,
                        ReadRegularFile(file.path, impl_->options.max_file_bytes));
  auto graph = onnx::ImportClassifier(bytes);
  if (!graph.ok()) return Annotate(graph.status(), file.path);
  if (IsQuantized(*graph)) {
    return absl::FailedPreconditionError(absl::StrCat("model '", info.model, "' version ",
                                                      info.version, " was imported quantised (",
                                                      info.scheme, "), want a float version"));
  }
  FloatSource source{*std::move(graph), Sha256Hex(bytes), info.version};
  graph::Optimize(source.graph);
  return source;
}

absl::StatusOr<std::string> Repository::FilePath(absl::string_view model, uint64_t version) const {
  TERN_ASSIGN_OR_RETURN(const VersionInfo info, Info(model, version));
  TERN_ASSIGN_OR_RETURN(
      const VersionFile file,
      FindVersionFile(impl_->FolderOf(info.model, info.version), impl_->options.max_file_bytes));
  return file.path;
}

absl::StatusOr<std::string> Repository::ReadAsOnnx(absl::string_view model,
                                                   uint64_t version) const {
  TERN_ASSIGN_OR_RETURN(const std::string path, FilePath(model, version));
  if (!absl::EndsWith(path, kQuantizedFile)) {
    return ReadRegularFile(path, impl_->options.max_file_bytes);
  }
  TERN_ASSIGN_OR_RETURN(const artifact::Artifact artifact, artifact::Read(path));
  auto bytes = onnx::Export(artifact.graph, MetadataOf(artifact));
  if (!bytes.ok()) return Annotate(bytes.status(), path);
  return bytes;
}

void Repository::Shutdown() {
  {
    std::unique_lock<std::shared_mutex> lock(impl_->mutex);
    impl_->shutdown = true;
  }
  // A change that began before sees no flag; once every gate has been held, all of those have
  // ended.
  for (std::mutex& gate : impl_->gates) std::lock_guard<std::mutex> pass(gate);
  std::vector<std::shared_ptr<Servable>> servables;
  {
    std::unique_lock<std::shared_mutex> lock(impl_->mutex);
    for (auto& model : impl_->models) {
      for (auto& item : model.second.versions) {
        if (item.second.servable != nullptr) servables.push_back(std::move(item.second.servable));
        item.second.servable = nullptr;
      }
    }
  }
  for (std::shared_ptr<Servable>& servable : servables) DrainAndDrop(std::move(servable));
}

}  // namespace tern::repository
