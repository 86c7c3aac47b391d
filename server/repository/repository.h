// Models and versions, on disk and in memory.
//
//   <root>/<model>/config.textproto          v1::ModelConfig
//   <root>/<model>/labels.txt                one class per line (name from the config)
//   <root>/<model>/default                   the default version, decimal
//   <root>/<model>/<version>/model.onnx      a network as it was imported (float, or int8 in QDQ
//                                            form), or
//   <root>/<model>/<version>/model.tern      one that Tern quantised
// Names starting with '.' are the repository's own: .tmp-* is unfinished work of a process that
// died, removed at Open; .trash-* is a deletion in progress, finished at Open. Everything is
// published by one rename of a complete, fsynced folder or file, so a crash at any moment leaves
// each version whole or absent.
#ifndef TERN_SERVER_REPOSITORY_REPOSITORY_H_
#define TERN_SERVER_REPOSITORY_REPOSITORY_H_

#include <cstdint>
#include <functional>
#include <limits>
#include <memory>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"
#include "server/artifact/artifact.h"
#include "server/engine/plan.h"
#include "server/graph/graph.h"
#include "server/metrics/metrics.h"
#include "tern/v1/model.pb.h"

namespace tern::repository {

enum class State { kLoading, kReady, kUnavailable, kUnloaded };

// What is known of a version without its weights. A value type.
struct VersionInfo {
  std::string model;
  uint64_t version = 0;
  bool is_default = false;  // in a LoadedModel: when it was loaded
  State state = State::kLoading;
  std::string reason;  // of kUnavailable
  std::string
      scheme;  // fp32, int8, int4-cluster, int3-cluster, ternary-cluster; "" until first read
  uint32_t cluster_size = 0;
  uint64_t file_bytes = 0;
  int64_t classes = 0;
  Shape input_shape;  // c, h, w
  double bits_per_weight = 32;
};

// A version in memory, immutable once built.
struct LoadedModel {
  VersionInfo info;
  v1::ModelConfig config;
  v1::Preprocessing preprocessing;  // the artifact's own, or the config's
  std::vector<std::string> labels;
  v1::QuantizationReport report;  // empty for versions that Tern did not quantise
  std::shared_ptr<const engine::Plan> plan;
  std::string isa;           // of the plan: scalar, avx2, avx512vnni
  bool self_tested = false;  // its stored images gave the stored answers; false: it stores none
  metrics::ModelLabels metric_labels;
};

// What the layer above attaches to a loaded version (its batcher and sessions). Destroyed when the
// version is unloaded and the last user is done.
class Servable {
 public:
  virtual ~Servable() = default;
  // No new work after this returns; called before the repository lets go of it.
  virtual void Drain() = 0;
};

struct RepositoryOptions {
  std::string root;
  // Nothing in `root` is ever written, not even the lock: any number of processes may have it open,
  // and whatever would store, delete or move a default is FAILED_PRECONDITION.
  bool read_only = false;
  engine::PlanOptions plan;
  metrics::Metrics* metrics = nullptr;  // not owned; may be null in tests
  // Makes what serves a version. Called outside the lookup lock; must not change the repository.
  // May be null (tests): Acquire then returns null.
  std::function<absl::StatusOr<std::shared_ptr<Servable>>(std::shared_ptr<const LoadedModel>)>
      make_servable;
  uint64_t max_file_bytes = 2ull << 30;
};

// Thread safe. Loading happens on the calling thread, outside the lock that lookups take. Changes
// of one model exclude each other; those of different models rarely wait for each other.
class Repository {
 public:
  // Creates `root` if needed, cleans up after a crash, and loads every version found. A version
  // that cannot be loaded is kept as kUnavailable with the reason; the others serve. Where the
  // default pointer is absent or damaged, the lowest usable version is the default; where it names
  // a version that does not exist, the highest usable one below, or if there is none the lowest.
  // PERMISSION_DENIED / INTERNAL if `root` cannot be used; FAILED_PRECONDITION if another process
  // has it open (flock on <root>/.lock). Read-only: nothing is created or cleaned up, and NOT_FOUND
  // if there is no `root`.
  static absl::StatusOr<std::unique_ptr<Repository>> Open(RepositoryOptions options);
  ~Repository();

  // FAILED_PRECONDITION naming the folder if the repository is read-only: what Import,
  // ImportArtifact, Publish, SetDefault and Delete answer then.
  absl::Status CheckWritable() const;

  // version 0 = default. NOT_FOUND naming model or version and what exists; UNAVAILABLE with the
  // reason if it is not ready.
  absl::StatusOr<std::shared_ptr<Servable>> Acquire(absl::string_view model,
                                                    uint64_t version) const;
  absl::StatusOr<std::shared_ptr<const LoadedModel>> Find(absl::string_view model,
                                                          uint64_t version) const;
  // Also versions that are not ready.
  absl::StatusOr<VersionInfo> Info(absl::string_view model, uint64_t version) const;
  std::vector<VersionInfo> List(
      absl::string_view model) const;  // "" = all; ordered by name, version

  // Stores the ONNX bytes as a new version (the first creates the model with this contract and
  // labels; later ones must have the same contract, input shape and number of classes, and the same
  // labels or none) and loads it. The first becomes default. A version's number is one more than
  // any that the model had. INVALID_ARGUMENT: name, contract, labels, ONNX; UNIMPLEMENTED:
  // operator; RESOURCE_EXHAUSTED: too large, or the disk is full. Nothing is stored on failure.
  absl::StatusOr<VersionInfo> Import(absl::string_view model, absl::string_view onnx,
                                     const v1::Preprocessing& preprocessing,
                                     const std::vector<std::string>& labels, bool set_default);
  // The same with the bytes of a .tern artifact, which brings its own contract and labels. Stored
  // as it is, after every check that a load makes. DATA_LOSS: damaged, or it fails its self-test;
  // INVALID_ARGUMENT: not a valid network, or it does not fit the model as above; UNIMPLEMENTED: a
  // newer format.
  absl::StatusOr<VersionInfo> ImportArtifact(absl::string_view model, absl::string_view bytes,
                                             bool set_default);
  // Stores a quantised version and loads it. NOT_FOUND if the model does not exist;
  // INVALID_ARGUMENT if the artifact has another input shape or number of classes. Nothing is
  // stored on failure. The self-test must pass before it is published. With a `source_version`,
  // FAILED_PRECONDITION unless the model has it and its file is the one of artifact.source_sha256:
  // the model may have been deleted and made anew since the source was read.
  absl::StatusOr<VersionInfo> Publish(absl::string_view model, const artifact::Artifact& artifact,
                                      bool set_default, uint64_t source_version = 0);

  // Loads from disk what is not loaded, also folders that were put there since Open. A version that
  // serves is replaced without a gap; if that fails, the old one goes on serving and the error is
  // returned. Version 0 = default. NOT_FOUND.
  absl::StatusOr<VersionInfo> Load(absl::string_view model, uint64_t version);
  // FAILED_PRECONDITION for the default version; NOT_FOUND. Returns when its last batch is done.
  absl::StatusOr<VersionInfo> Unload(absl::string_view model, uint64_t version);
  // Every version, the default one too, which stays the default. NOT_FOUND.
  absl::Status UnloadAll(absl::string_view model);
  // FAILED_PRECONDITION if the version is not ready; NOT_FOUND; INVALID_ARGUMENT for version 0.
  absl::StatusOr<VersionInfo> SetDefault(absl::string_view model, uint64_t version);
  // version 0 = the whole model; so is the last version. FAILED_PRECONDITION for the default
  // version while others exist, and for the last one while the model's folder holds versions that
  // are not known here, or other folders, or if the repository's folder itself is gone; NOT_FOUND.
  // Returns how many versions were removed.
  absl::StatusOr<uint64_t> Delete(absl::string_view model, uint64_t version);

  // For a watcher of the folder, which others change.
  //
  // Reads the default pointer again and makes the version that it names the default. False if it is
  // already, or the model is not known. NOT_FOUND if there is no pointer; DATA_LOSS if it is not a
  // number; FAILED_PRECONDITION if the version is not ready. The default stays where it is then.
  absl::StatusOr<bool> FollowDefault(absl::string_view model);
  // Lets go of a version (0 = the model with all of them) whose folder is gone; touches nothing on
  // disk. Returns how many versions left. FAILED_PRECONDITION if the folder exists, or for the
  // default version while others exist; NOT_FOUND.
  absl::StatusOr<uint64_t> Forget(absl::string_view model, uint64_t version);

  // The optimised float graph of a float version, read from disk, and the SHA-256 of its file.
  // FAILED_PRECONDITION if the version is quantised.
  struct FloatSource {
    graph::Graph graph;
    std::string sha256;
    uint64_t version = 0;
  };
  absl::StatusOr<FloatSource> ReadFloatSource(absl::string_view model, uint64_t version) const;
  // Path of the stored file, for export.
  absl::StatusOr<std::string> FilePath(absl::string_view model, uint64_t version) const;
  // The version as ONNX: the stored file if it is one, else onnx::Export of the artifact, with
  // scheme, preprocessing and the report's main figures as metadata. DATA_LOSS if the artifact is
  // damaged; NOT_FOUND.
  absl::StatusOr<std::string> ReadAsOnnx(absl::string_view model, uint64_t version) const;

  // Drains every servable; afterwards Acquire answers UNAVAILABLE. Idempotent.
  void Shutdown();

 private:
  struct Impl;
  explicit Repository(std::unique_ptr<Impl> impl);
  // `file` is the name under which the bytes are stored, which says what they are.
  absl::StatusOr<VersionInfo> ImportFile(absl::string_view model, const char* file,
                                         absl::string_view bytes,
                                         const v1::Preprocessing& preprocessing,
                                         const std::vector<std::string>& labels, bool set_default);
  std::unique_ptr<Impl> impl_;
};

// [a-z0-9][a-z0-9._-]{0,63}. INVALID_ARGUMENT otherwise.
absl::Status ValidateModelName(absl::string_view name);

// Runs the artifact's stored inputs through `plan`, one at a time: every top-1 must match and no
// logit may differ by more than 5 % of the largest stored magnitude (oneDNN's int8 layers may round
// one code differently between CPUs; Tern's own kernels do not). DATA_LOSS with the figures
// otherwise. OK if nothing is stored.
struct SelfTestOptions {
  int threads = 1;  // shared among as many sessions as there are images
  // Images beyond this much work are left out, but one runs.
  int64_t most_macs = std::numeric_limits<int64_t>::max();
};
absl::Status SelfTest(const artifact::Artifact& artifact, const engine::Plan& plan,
                      const SelfTestOptions& options = {});

}  // namespace tern::repository

#endif  // TERN_SERVER_REPOSITORY_REPOSITORY_H_
