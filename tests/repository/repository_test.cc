#include "server/repository/repository.h"

#include <sys/stat.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <atomic>
#include <cerrno>
#include <functional>
#include <map>
#include <set>
#include <thread>

#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "server/base/file.h"
#include "tests/repository/folder_fixture.h"
#include "tests/repository/tiny_models.h"

namespace {
// Whether a folder cannot be synced now; empty: as the disk says.
std::function<bool()> folder_sync_fails;
}  // namespace

// In place of the C library's in this program.
extern "C" int fsync(int fd) {
  struct stat info;
  if (folder_sync_fails && ::fstat(fd, &info) == 0 && S_ISDIR(info.st_mode) &&
      folder_sync_fails()) {
    errno = EIO;
    return -1;
  }
  return static_cast<int>(::syscall(SYS_fsync, fd));
}

namespace tern::repository {
namespace {

namespace fs = std::filesystem;
using testing::Contract;
using ::testing::ElementsAre;
using ::testing::HasSubstr;
using ::testing::IsEmpty;
using testing::Labels;
using ::testing::Not;
using ::testing::StartsWith;
using testing::TinyArtifact;
using testing::TinyOnnx;

// Remembers what was done to it.
class FakeServable : public Servable {
 public:
  FakeServable(std::shared_ptr<const LoadedModel> model, std::atomic<int>* alive)
      : model(std::move(model)), alive_(alive) {
    ++*alive_;
  }
  ~FakeServable() override { --*alive_; }
  void Drain() override {
    drained = true;
    if (on_drain) on_drain();
  }
  const std::shared_ptr<const LoadedModel> model;
  std::atomic<bool> drained{false};
  std::function<void()> on_drain;

 private:
  std::atomic<int>* const alive_;
};

class RepositoryTest : public testing::FolderTest {
 protected:
  ~RepositoryTest() override {
    folder_sync_fails = nullptr;
    repository_.reset();
    EXPECT_EQ(alive_, 0) << "servables leaked";
  }

  RepositoryOptions Options() {
    RepositoryOptions options;
    options.root = root_;
    options.plan.max_batch = 4;
    options.metrics = &metrics_;
    options.make_servable =
        [this](
            std::shared_ptr<const LoadedModel> model) -> absl::StatusOr<std::shared_ptr<Servable>> {
      if (fail_servables_) return absl::InternalError("no servable today");
      return std::make_shared<FakeServable>(std::move(model), &alive_);
    };
    return options;
  }
  void Open() {
    repository_.reset();
    auto opened = Repository::Open(Options());
    ASSERT_TRUE(opened.ok()) << opened.status();
    repository_ = *std::move(opened);
  }
  // Opens and makes model "m": version 1 float, versions 2.. quantised.
  void OpenWith(int quantized) {
    Open();
    const auto first = repository_->Import("m", TinyOnnx(1), Contract(), Labels(), false);
    ASSERT_TRUE(first.ok()) << first.status();
    for (int i = 0; i < quantized; ++i) {
      const auto next = repository_->Publish("m", TinyArtifact(10 + i), false);
      ASSERT_TRUE(next.ok()) << next.status();
      ASSERT_EQ(next->version, i + 2u);
    }
  }
  void Damage(const std::string& relative) {
    std::string bytes = Read(relative);
    ASSERT_GT(bytes.size(), 100u);
    bytes[bytes.size() / 2] ^= 0x10;
    Write(relative, bytes);
  }
  State StateOf(const std::string& model, uint64_t version) {
    const auto info = repository_->Info(model, version);
    EXPECT_TRUE(info.ok()) << info.status();
    return info.ok() ? info->state : State::kUnavailable;
  }
  std::string ReasonOf(const std::string& model, uint64_t version) {
    return repository_->Info(model, version)->reason;
  }
  uint64_t DefaultOf(const std::string& model) {
    const auto info = repository_->Info(model, 0);
    return info.ok() ? info->version : 0;
  }
  std::vector<uint64_t> Versions(const std::string& model) {
    std::vector<uint64_t> versions;
    for (const VersionInfo& info : repository_->List(model)) versions.push_back(info.version);
    return versions;
  }
  std::shared_ptr<FakeServable> Serving(const std::string& model, uint64_t version) {
    auto servable = repository_->Acquire(model, version);
    EXPECT_TRUE(servable.ok()) << servable.status();
    return servable.ok() ? std::static_pointer_cast<FakeServable>(*servable) : nullptr;
  }

  metrics::Metrics metrics_;
  std::atomic<int> alive_{0};
  std::atomic<bool> fail_servables_{false};
  std::unique_ptr<Repository> repository_;
};

TEST(ValidateModelNameTest, RejectsPathsAndOddities) {
  for (const char* good : {"a", "0", "resnet50", "r56.v2_x-y", "a..b"})
    EXPECT_TRUE(ValidateModelName(good).ok()) << good;
  for (const char* bad : {"", ".", "..", ".tmp-1", "../m", "a/b", "/a", "A", "-a", "_a", "a b",
                          "a\n", "\xc3\xa4", "a\\b"}) {
    EXPECT_EQ(ValidateModelName(bad).code(), absl::StatusCode::kInvalidArgument) << bad;
  }
  EXPECT_TRUE(ValidateModelName(std::string(64, 'a')).ok());
  EXPECT_FALSE(ValidateModelName(std::string(65, 'a')).ok());
  EXPECT_FALSE(ValidateModelName(std::string("a\0b", 3)).ok());
  EXPECT_LT(ValidateModelName(std::string(1 << 20, 'A')).message().size(), 300u);
}

TEST_F(RepositoryTest, ImportStoresAndServesANewModel) {
  Open();
  const auto info = repository_->Import("m", TinyOnnx(1), Contract(), Labels(), false);
  ASSERT_TRUE(info.ok()) << info.status();
  EXPECT_EQ(info->model, "m");
  EXPECT_EQ(info->version, 1u);
  EXPECT_TRUE(info->is_default);
  EXPECT_EQ(info->state, State::kReady);
  EXPECT_EQ(info->scheme, "fp32");
  EXPECT_EQ(info->classes, 4);
  EXPECT_EQ(info->input_shape, Shape({3, 8, 8}));
  EXPECT_EQ(info->bits_per_weight, 32);
  EXPECT_EQ(info->file_bytes, TinyOnnx(1).size());
  EXPECT_EQ(Read("m/1/model.onnx"), TinyOnnx(1));
  EXPECT_EQ(Read("m/default"), "1\n");
  EXPECT_EQ(Read("m/labels.txt"), "class 0\nclass 1\nclass 2\nclass 3\n");
  EXPECT_THAT(Leftovers(), IsEmpty());
  const auto serving = Serving("m", 0);
  ASSERT_NE(serving, nullptr);
  EXPECT_EQ(serving->model->labels, Labels());
  EXPECT_EQ(serving->model->metric_labels.version, 1u);
  EXPECT_EQ(serving->model->preprocessing.scale(), Contract().scale());
}

TEST_F(RepositoryTest, EverythingIsThereAgainAfterReopening) {
  OpenWith(2);
  ASSERT_TRUE(repository_->SetDefault("m", 3).ok());
  ASSERT_TRUE(repository_->Import("other", TinyOnnx(5), Contract(), {}, false).ok());
  std::vector<VersionInfo> before = repository_->List("");
  Open();
  const std::vector<VersionInfo> after = repository_->List("");
  ASSERT_EQ(after.size(), 4u);
  for (size_t i = 0; i < after.size(); ++i) {
    EXPECT_EQ(after[i].model, before[i].model);
    EXPECT_EQ(after[i].version, before[i].version);
    EXPECT_EQ(after[i].is_default, before[i].is_default);
    EXPECT_EQ(after[i].state, State::kReady) << after[i].reason;
    EXPECT_EQ(after[i].scheme, before[i].scheme);
    EXPECT_EQ(after[i].file_bytes, before[i].file_bytes);
    EXPECT_EQ(after[i].bits_per_weight, before[i].bits_per_weight);
  }
  EXPECT_EQ(DefaultOf("m"), 3u);
  EXPECT_EQ(Serving("m", 3)->model->labels, Labels());
}

TEST_F(RepositoryTest, QuantisedVersionsSayHowTheirWeightsAreStored) {
  Open();
  ASSERT_TRUE(repository_->Import("m", TinyOnnx(1), Contract(), Labels(), false).ok());
  EXPECT_EQ(repository_->Publish("m", TinyArtifact(1, WeightScheme::kInt8), false)->scheme, "int8");
  EXPECT_EQ(repository_->Publish("m", TinyArtifact(2, WeightScheme::kInt4Cluster), false)->scheme,
            "int4-cluster");
  const auto ternary =
      repository_->Publish("m", TinyArtifact(3, WeightScheme::kTernaryCluster), false);
  ASSERT_TRUE(ternary.ok()) << ternary.status();
  EXPECT_EQ(ternary->scheme, "ternary-cluster");
  EXPECT_EQ(ternary->cluster_size, 4u);
  // 216 ternary codes, five to a byte, with 8 scales of 7 bits; 32 int8 codes of 7 bits.
  EXPECT_DOUBLE_EQ(ternary->bits_per_weight, (44 * 8 + 8 * 7 + 32 * 7) / 248.0);
}

TEST_F(RepositoryTest, ASecondProcessCannotOpenTheSameFolder) {
  Open();
  EXPECT_EQ(Repository::Open(Options()).status().code(), absl::StatusCode::kFailedPrecondition);
}

TEST_F(RepositoryTest, AReadOnlyRepositoryServesAndRefusesEveryChange) {
  OpenWith(1);
  repository_.reset();
  Write(".tmp-left/x", "of a process that died");
  const auto files = [this] {
    std::vector<std::string> names;
    for (const auto& entry : std::filesystem::recursive_directory_iterator(root_)) {
      names.push_back(entry.path().string());
    }
    std::sort(names.begin(), names.end());
    return names;
  };
  std::filesystem::remove(Path(".lock"));
  const std::vector<std::string> before = files();
  RepositoryOptions options = Options();
  options.read_only = true;
  auto opened = Repository::Open(options);
  ASSERT_TRUE(opened.ok()) << opened.status();
  repository_ = *std::move(opened);
  EXPECT_EQ(Versions("m"), (std::vector<uint64_t>{1, 2}));
  EXPECT_NE(Serving("m", 2), nullptr);
  for (const absl::Status& status :
       {repository_->Import("n", TinyOnnx(1), Contract(), {}, true).status(),
        repository_->ImportArtifact("m", Read("m/2/model.tern"), false).status(),
        repository_->Publish("m", TinyArtifact(10), false).status(),
        repository_->SetDefault("m", 2).status(), repository_->Delete("m", 2).status()}) {
    EXPECT_EQ(status.code(), absl::StatusCode::kFailedPrecondition) << status;
    EXPECT_THAT(std::string(status.message()), HasSubstr(root_));
  }
  EXPECT_TRUE(repository_->Unload("m", 2).ok());
  EXPECT_TRUE(repository_->Load("m", 2).ok());
  EXPECT_EQ(files(), before);
}

TEST_F(RepositoryTest, SeveralProcessesShareAReadOnlyRepositoryWithOneThatWrites) {
  OpenWith(0);
  RepositoryOptions options = Options();
  options.read_only = true;
  for (int i = 0; i < 2; ++i) {
    auto reader = Repository::Open(options);
    ASSERT_TRUE(reader.ok()) << reader.status();
    EXPECT_EQ((*reader)->Info("m", 0)->version, 1u);
  }
}

TEST_F(RepositoryTest, AReadOnlyRepositoryIsNotMade) {
  RepositoryOptions options = Options();
  options.root = Path("absent");
  options.read_only = true;
  EXPECT_EQ(Repository::Open(options).status().code(), absl::StatusCode::kNotFound);
  EXPECT_FALSE(Exists("absent"));
}

TEST_F(RepositoryTest, NothingIsStoredWhenAnImportFails) {
  Open();
  const auto code = [&](absl::string_view name, const std::string& onnx,
                        const v1::Preprocessing& contract, const std::vector<std::string>& labels) {
    return repository_->Import(name, onnx, contract, labels, false).status().code();
  };
  v1::Preprocessing bad_contract = Contract();
  bad_contract.add_std(0.5f);  // one value, three wanted
  EXPECT_EQ(code("../m", TinyOnnx(1), Contract(), {}), absl::StatusCode::kInvalidArgument);
  EXPECT_EQ(code("m", "not a network", Contract(), {}), absl::StatusCode::kInvalidArgument);
  EXPECT_EQ(code("m", "", Contract(), {}), absl::StatusCode::kInvalidArgument);
  EXPECT_EQ(code("m", TinyOnnx(1, 4, 3, "Frobnicate"), Contract(), {}),
            absl::StatusCode::kUnimplemented);
  EXPECT_EQ(code("m", TinyOnnx(1, 4, 1), Contract(), {}),
            absl::StatusCode::kInvalidArgument);  // one channel
  EXPECT_EQ(code("m", TinyOnnx(1), bad_contract, {}), absl::StatusCode::kInvalidArgument);
  EXPECT_EQ(code("m", TinyOnnx(1), Contract(), Labels(3)), absl::StatusCode::kInvalidArgument);
  EXPECT_EQ(code("m", TinyOnnx(1), Contract(), {"a", "b\nc", "d"}),
            absl::StatusCode::kInvalidArgument);
  EXPECT_EQ(code("m", TinyOnnx(1), Contract(), {"a", "b", "\xff", "d"}),
            absl::StatusCode::kInvalidArgument);
  fail_servables_ = true;
  EXPECT_EQ(code("m", TinyOnnx(1), Contract(), {}), absl::StatusCode::kInternal);
  EXPECT_THAT(repository_->List(""), IsEmpty());
  EXPECT_FALSE(Exists("m"));
  EXPECT_THAT(Leftovers(), IsEmpty());
}

TEST_F(RepositoryTest, ErrorsOfAnImportNameItsPartsAndNoPathOfTheServer) {
  Open();
  const auto message = [&](const std::string& onnx, const v1::Preprocessing& contract,
                           const std::vector<std::string>& labels) {
    return std::string(repository_->Import("m", onnx, contract, labels, false).status().message());
  };
  v1::Preprocessing bad_contract = Contract();
  bad_contract.add_std(0.5f);
  EXPECT_THAT(message("not a network", Contract(), {}), StartsWith("the network: "));
  EXPECT_THAT(message(TinyOnnx(1), bad_contract, {}), StartsWith("the contract: "));
  EXPECT_EQ(message(TinyOnnx(1), Contract(), Labels(3)), "labels.txt: labels: got 3 names, want 4");
  // Of an artifact that was read whole.
  artifact::Artifact liar = TinyArtifact(2);
  for (float& logit : liar.self_test_logits.data<float>()) logit = -logit;
  EXPECT_THAT(
      std::string(
          repository_->ImportArtifact("m", artifact::Serialize(liar), false).status().message()),
      StartsWith("the network: "));
}

TEST_F(RepositoryTest, LabelsForAModelWithoutAnyAreRefusedWithTheWayToAddThem) {
  Open();
  ASSERT_TRUE(repository_->Import("m", TinyOnnx(1), Contract(), {}, false).ok());
  const absl::Status status =
      repository_->Import("m", TinyOnnx(2), Contract(), Labels(), false).status();
  EXPECT_EQ(status.code(), absl::StatusCode::kInvalidArgument);
  EXPECT_THAT(std::string(status.message()), HasSubstr("model 'm' has none; to add them"));
  // The way works.
  Write("m/names", "a\nb\nc\nd\n");
  Write("m/config.textproto", Read("m/config.textproto") + "labels_file: \"names\"\n");
  ASSERT_TRUE(repository_->Load("m", 1).ok());
  EXPECT_EQ(Serving("m", 1)->model->labels, (std::vector<std::string>{"a", "b", "c", "d"}));
}

TEST_F(RepositoryTest, FilesBeyondTheLimitAreRefused) {
  RepositoryOptions options = Options();
  options.max_file_bytes = TinyOnnx(1).size() - 1;
  repository_ = *Repository::Open(options);
  EXPECT_EQ(repository_->Import("m", TinyOnnx(1), Contract(), {}, false).status().code(),
            absl::StatusCode::kResourceExhausted);
  repository_.reset();
  OpenWith(0);
  repository_.reset();
  repository_ = *Repository::Open(options);
  EXPECT_EQ(StateOf("m", 1), State::kUnavailable);
  EXPECT_THAT(ReasonOf("m", 1), HasSubstr("the limit is"));
}

TEST_F(RepositoryTest, LaterVersionsMustFitTheModel) {
  OpenWith(0);
  v1::Preprocessing other = Contract();
  other.set_color_order(v1::Preprocessing::BGR);
  EXPECT_EQ(repository_->Import("m", TinyOnnx(2), other, {}, false).status().code(),
            absl::StatusCode::kInvalidArgument);
  EXPECT_EQ(
      repository_->Import("m", TinyOnnx(2), Contract(), {"other", "names", "than", "before"}, false)
          .status()
          .code(),
      absl::StatusCode::kInvalidArgument);
  EXPECT_EQ(repository_->Import("m", TinyOnnx(2, 5), Contract(), {}, false).status().code(),
            absl::StatusCode::kInvalidArgument);
  EXPECT_EQ(
      repository_->Publish("m", TinyArtifact(2, WeightScheme::kInt8, 5), false).status().code(),
      absl::StatusCode::kInvalidArgument);
  EXPECT_THAT(Versions("m"), ElementsAre(1));
  const auto second = repository_->Import("m", TinyOnnx(2), Contract(), Labels(), true);
  ASSERT_TRUE(second.ok()) << second.status();
  EXPECT_EQ(second->version, 2u);
  EXPECT_TRUE(second->is_default);
  EXPECT_EQ(Read("m/default"), "2\n");
  EXPECT_THAT(Leftovers(), IsEmpty());
}

TEST_F(RepositoryTest, AnImportedArtifactMakesAModelWithItsOwnContractAndLabels) {
  Open();
  const std::string bytes = artifact::Serialize(TinyArtifact(1));
  const auto info = repository_->ImportArtifact("m", bytes, false);
  ASSERT_TRUE(info.ok()) << info.status();
  EXPECT_EQ(info->version, 1u);
  EXPECT_TRUE(info->is_default);
  EXPECT_EQ(info->scheme, "ternary-cluster");
  EXPECT_TRUE(Read("m/1/model.tern") == bytes);
  EXPECT_EQ(Read("m/labels.txt"), "class 0\nclass 1\nclass 2\nclass 3\n");
  EXPECT_THAT(Leftovers(), IsEmpty());
  ASSERT_NE(Serving("m", 0), nullptr);
  EXPECT_EQ(Serving("m", 0)->model->preprocessing.scale(), Contract().scale());
  Open();
  EXPECT_EQ(StateOf("m", 1), State::kReady);
  // A float version of the same contract fits beside it.
  EXPECT_TRUE(repository_->Import("m", TinyOnnx(1), Contract(), Labels(), false).ok());
}

TEST_F(RepositoryTest, AnArtifactMovesFromOneServerToAnotherUnchanged) {
  OpenWith(2);
  const std::string exported = Read("m/3/model.tern");
  const auto back = repository_->ImportArtifact("m", exported, true);
  ASSERT_TRUE(back.ok()) << back.status();
  EXPECT_EQ(back->version, 4u);
  EXPECT_EQ(Read("m/default"), "4\n");
  const auto elsewhere = repository_->ImportArtifact("copy", exported, false);
  ASSERT_TRUE(elsewhere.ok()) << elsewhere.status();
  EXPECT_TRUE(Read("m/4/model.tern") == exported);
  EXPECT_TRUE(Read("copy/1/model.tern") == exported);
  EXPECT_EQ(Serving("copy", 1)->model->labels, Labels());
}

TEST_F(RepositoryTest, ImportedArtifactsMustFitTheModel) {
  OpenWith(0);
  const auto status = [&](const artifact::Artifact& artifact) {
    return repository_->ImportArtifact("m", artifact::Serialize(artifact), false).status();
  };
  EXPECT_EQ(status(TinyArtifact(2, WeightScheme::kInt8, 5)).code(),
            absl::StatusCode::kInvalidArgument);
  artifact::Artifact other = TinyArtifact(2);
  other.labels[1] = "somebody";
  EXPECT_EQ(status(other).code(), absl::StatusCode::kInvalidArgument);
  other = TinyArtifact(2);
  other.preprocessing.set_color_order(v1::Preprocessing::BGR);
  EXPECT_EQ(status(other).code(), absl::StatusCode::kInvalidArgument);
  EXPECT_THAT(std::string(status(other).message()), HasSubstr("another contract"));
  other = TinyArtifact(2);
  other.labels.clear();
  EXPECT_TRUE(status(other).ok()) << status(other);
  EXPECT_EQ(repository_->ImportArtifact("../m", artifact::Serialize(other), false).status().code(),
            absl::StatusCode::kInvalidArgument);
}

TEST_F(RepositoryTest, NothingOfADamagedArtifactIsStored) {
  OpenWith(0);
  const std::string bytes = artifact::Serialize(TinyArtifact(2));
  for (const char* name : {"m", "new"}) {
    for (size_t at = 0; at < bytes.size(); at += 97) {
      std::string damaged = bytes;
      damaged[at] ^= 0x20;
      EXPECT_EQ(repository_->ImportArtifact(name, damaged, true).status().code(),
                absl::StatusCode::kDataLoss)
          << at;
    }
    EXPECT_EQ(
        repository_->ImportArtifact(name, bytes.substr(0, bytes.size() - 1), true).status().code(),
        absl::StatusCode::kDataLoss);
    EXPECT_EQ(repository_->ImportArtifact(name, TinyOnnx(1), true).status().code(),
              absl::StatusCode::kDataLoss);
    // Whole, but it does not compute what it says.
    artifact::Artifact liar = TinyArtifact(2);
    for (float& logit : liar.self_test_logits.data<float>()) logit = -logit;
    EXPECT_EQ(repository_->ImportArtifact(name, artifact::Serialize(liar), true).status().code(),
              absl::StatusCode::kDataLoss);
  }
  EXPECT_THAT(Versions("m"), ElementsAre(1));
  EXPECT_EQ(DefaultOf("m"), 1u);
  EXPECT_FALSE(Exists("new"));
  EXPECT_THAT(Leftovers(), IsEmpty());
}

TEST_F(RepositoryTest, PublishNeedsAModel) {
  Open();
  EXPECT_EQ(repository_->Publish("m", TinyArtifact(1), false).status().code(),
            absl::StatusCode::kNotFound);
  EXPECT_FALSE(Exists("m"));
}

TEST_F(RepositoryTest, NothingIsPublishedWhoseSourceIsGone) {
  OpenWith(0);
  artifact::Artifact artifact = TinyArtifact(2);
  artifact.source_sha256 = Sha256Hex(TinyOnnx(1));
  ASSERT_TRUE(repository_->Publish("m", artifact, false, 1).ok());
  const auto refusal = [&] {
    const absl::Status status = repository_->Publish("m", artifact, true, 1).status();
    EXPECT_EQ(status.code(), absl::StatusCode::kFailedPrecondition) << status;
    return std::string(status.message());
  };
  Write("m/1/model.onnx", TinyOnnx(3));
  EXPECT_EQ(refusal(), "the source version 1 of 'm' was replaced meanwhile");
  fs::remove(Path("m/1/model.onnx"));
  EXPECT_THAT(refusal(), HasSubstr("the source version 1 of 'm' is not there any more"));
  ASSERT_TRUE(repository_->Delete("m", 0).ok());
  EXPECT_EQ(refusal(), "the source version 1 of 'm' was deleted meanwhile");
  ASSERT_TRUE(repository_->Import("m", TinyOnnx(4), Contract(), Labels(), false).ok());
  EXPECT_EQ(refusal(), "the source version 1 of 'm' was deleted meanwhile");
  EXPECT_THAT(Versions("m"), ElementsAre(3));
  EXPECT_THAT(Leftovers(), IsEmpty());
}

TEST_F(RepositoryTest, AnArtifactThatFailsItsSelfTestIsNotPublished) {
  OpenWith(0);
  artifact::Artifact artifact = TinyArtifact(2);
  auto logits = artifact.self_test_logits.data<float>();
  float largest = 0;
  for (float logit : logits) largest = std::max(largest, std::abs(logit));
  logits[0] += 0.06f * largest;
  const absl::Status status = repository_->Publish("m", artifact, false).status();
  EXPECT_EQ(status.code(), absl::StatusCode::kDataLoss);
  EXPECT_THAT(std::string(status.message()), HasSubstr("self-test"));
  EXPECT_THAT(Versions("m"), ElementsAre(1));
  EXPECT_FALSE(Exists("m/2"));
  EXPECT_THAT(Leftovers(), IsEmpty());
}

TEST_F(RepositoryTest, DamagedVersionsAreUnavailableAndOthersServe) {
  OpenWith(4);
  repository_.reset();
  Damage("m/2/model.tern");
  fs::resize_file(Path("m/3/model.tern"), fs::file_size(Path("m/3/model.tern")) / 2);
  Write("m/4/model.onnx", TinyOnnx(3));  // beside model.tern
  fs::create_directory(Path("m/6"));
  fs::create_directory(Path("m/7"));
  ASSERT_EQ(::mkfifo(Path("m/7/model.onnx").c_str(), 0644), 0);
  Write("m/8/model.onnx", TinyOnnx(3).substr(0, 400));
  fs::create_directory_symlink(Path("m/1"), Path("m/9"));
  Open();
  EXPECT_THAT(Versions("m"), ElementsAre(1, 2, 3, 4, 5, 6, 7, 8, 9));
  for (uint64_t good : {1, 5}) EXPECT_EQ(StateOf("m", good), State::kReady) << good;
  for (uint64_t bad : {2, 3, 4, 6, 7, 8, 9}) {
    EXPECT_EQ(StateOf("m", bad), State::kUnavailable) << bad;
    EXPECT_THAT(ReasonOf("m", bad), Not(IsEmpty())) << bad;
    const absl::Status status = repository_->Acquire("m", bad).status();
    EXPECT_EQ(status.code(), absl::StatusCode::kUnavailable);
    EXPECT_THAT(std::string(status.message()), HasSubstr("cannot be served"));
    EXPECT_THAT(std::string(status.message()), Not(HasSubstr(root_)));
  }
  EXPECT_THAT(ReasonOf("m", 2), HasSubstr("damaged"));
  EXPECT_THAT(ReasonOf("m", 4), HasSubstr("both"));
  EXPECT_THAT(ReasonOf("m", 6), HasSubstr("neither"));
  EXPECT_THAT(metrics_.Render(), HasSubstr(R"(tern_model_ready{model="m",version="2"} 0)"));
  EXPECT_THAT(metrics_.Render(), HasSubstr(R"(tern_model_ready{model="m",version="5"} 1)"));
  EXPECT_EQ(repository_->Publish("m", TinyArtifact(50), false)->version,
            10u);  // after the unavailable ones
}

TEST_F(RepositoryTest, AFailedSelfTestIsTold) {
  OpenWith(2);
  const std::string isa = Serving("m", 2)->model->isa;
  const auto self_test = [&](int version, int value) {
    return absl::StrCat("tern_model_self_test{isa=\"", isa, "\",model=\"m\",version=\"", version,
                        "\"} ", value);
  };
  EXPECT_THAT(metrics_.Render(), HasSubstr(self_test(2, 1)));
  // Float versions store no answers.
  EXPECT_THAT(metrics_.Render(), Not(HasSubstr("tern_model_self_test{isa=\"" + isa +
                                               "\",model=\"m\",version=\"1\"}")));
  // Whole, but not what it computes here.
  artifact::Artifact liar = TinyArtifact(10);
  for (float& logit : liar.self_test_logits.data<float>()) logit = -logit;
  Write("m/2/model.tern", artifact::Serialize(liar));
  EXPECT_EQ(repository_->Load("m", 2).status().code(), absl::StatusCode::kDataLoss);
  EXPECT_THAT(metrics_.Render(), HasSubstr(self_test(2, 0)));
  EXPECT_EQ(StateOf("m", 2), State::kReady) << "the one in memory goes on serving";
  // A file that cannot be read at all says nothing of the CPU.
  Damage("m/3/model.tern");
  Open();
  EXPECT_THAT(metrics_.Render(), HasSubstr(self_test(2, 0)));
  EXPECT_EQ(StateOf("m", 2), State::kUnavailable);
  EXPECT_THAT(metrics_.Render(), Not(HasSubstr("tern_model_self_test{isa=\"" + isa +
                                               "\",model=\"m\",version=\"3\"}")));
}

TEST_F(RepositoryTest, EveryDamagedByteOfAnArtifactIsNoticed) {
  OpenWith(1);
  repository_.reset();
  const std::string whole = Read("m/2/model.tern");
  std::mt19937 random(7);
  for (int round = 0; round < 20; ++round) {
    std::string damaged = whole;
    damaged[random() % damaged.size()] ^= static_cast<char>(1 << (random() % 8));
    Write("m/2/model.tern", damaged);
    Open();
    EXPECT_EQ(StateOf("m", 2), State::kUnavailable);
    EXPECT_EQ(StateOf("m", 1), State::kReady);
  }
}

TEST_F(RepositoryTest, AnUnreadableConfigMakesItsModelUnavailableAndNoOther) {
  OpenWith(1);
  ASSERT_TRUE(repository_->Import("other", TinyOnnx(5), Contract(), {}, false).ok());
  const std::string config = Read("m/config.textproto");
  repository_.reset();
  Write("m/config.textproto", config + "}");
  Open();
  for (uint64_t version : {1, 2}) {
    EXPECT_EQ(StateOf("m", version), State::kUnavailable);
    EXPECT_THAT(ReasonOf("m", version), HasSubstr("config.textproto"));
  }
  EXPECT_EQ(StateOf("other", 1), State::kReady);
  EXPECT_EQ(repository_->Import("m", TinyOnnx(2), Contract(), {}, false).status().code(),
            absl::StatusCode::kFailedPrecondition);
  Write("m/config.textproto", config);
  EXPECT_TRUE(repository_->Load("m", 2).ok());  // repaired while the server runs
  EXPECT_NE(Serving("m", 2), nullptr);
}

TEST_F(RepositoryTest, LabelsOfTheWrongNumberMakeFloatVersionsUnavailable) {
  OpenWith(0);
  repository_.reset();
  Write("m/labels.txt", "only\ntwo\n");
  Open();
  EXPECT_EQ(StateOf("m", 1), State::kUnavailable);
  EXPECT_THAT(ReasonOf("m", 1), HasSubstr("labels.txt"));
}

TEST_F(RepositoryTest, ForeignFilesAndUnfinishedWorkAreLeftOutAtOpen) {
  OpenWith(0);
  repository_.reset();
  Write("README", "x");
  Write("Upper/1/model.onnx", TinyOnnx(1));
  Write(".tmp-99-0/1/model.onnx", "half");
  Write(".trash-99-0/1/model.onnx", "half");
  Write("m/.tmp-99-1/model.tern", "half");
  Write("m/.trash-99-1/model.tern", "half");
  Write("m/default.tmp.99.0", "7");
  Write("m/latest/model.onnx", TinyOnnx(1));
  fs::create_directory_symlink(Path("m"), Path("alias"));
  Open();
  ASSERT_EQ(repository_->List("").size(), 1u);
  EXPECT_EQ(StateOf("m", 1), State::kReady);
  EXPECT_THAT(Leftovers(), IsEmpty());
  EXPECT_TRUE(Exists("README"));
  EXPECT_TRUE(Exists("m/latest/model.onnx"));
}

TEST_F(RepositoryTest, TheDefaultIsTheLowestUsableVersionWhereThePointerIsNoUse) {
  OpenWith(2);
  for (const char* pointer : {"", "nonsense", "0"}) {
    repository_.reset();
    Write("m/default", pointer);
    Open();
    EXPECT_EQ(DefaultOf("m"), 1u) << pointer;
  }
  EXPECT_THAT(metrics_.Render(), HasSubstr(R"(tern_fallbacks_total{reason="default_pointer"} 3)"));
  repository_.reset();
  fs::remove(Path("m/default"));
  Damage("m/1/model.onnx");
  Write("m/1/model.onnx", "x");
  Open();
  EXPECT_EQ(DefaultOf("m"), 2u);
  EXPECT_TRUE(Serving("m", 2)->model->info.is_default);
  EXPECT_THAT(metrics_.Render(), HasSubstr(R"(tern_fallbacks_total{reason="default_pointer"} 3)"));
}

TEST_F(RepositoryTest, TheDefaultIsTheHighestUsableVersionBelowOneThatIsGone) {
  OpenWith(4);
  repository_.reset();
  fs::remove_all(Path("m/4"));
  Damage("m/3/model.tern");
  const auto default_if_the_pointer_says = [&](const char* pointer) {
    repository_.reset();
    Write("m/default", pointer);
    Open();
    return DefaultOf("m");
  };
  EXPECT_EQ(default_if_the_pointer_says("4"), 2u);
  EXPECT_EQ(default_if_the_pointer_says("77"), 5u);
  EXPECT_THAT(Versions("m"), ElementsAre(1, 2, 3, 5));
  EXPECT_THAT(metrics_.Render(), HasSubstr(R"(tern_fallbacks_total{reason="default_pointer"} 2)"));
  // None below can be used.
  Write("m/1/model.onnx", "x");
  fs::remove_all(Path("m/2"));
  EXPECT_EQ(default_if_the_pointer_says("2"), 5u);
}

TEST_F(RepositoryTest, APointerThatCannotBeSyncedStaysWhereItWas) {
  OpenWith(1);
  // The rename of the new pointer is done, and not known to be on disk.
  folder_sync_fails = [this] { return Read("m/default") != "1\n"; };
  EXPECT_EQ(repository_->Publish("m", TinyArtifact(9), true).status().code(),
            absl::StatusCode::kInternal);
  EXPECT_EQ(repository_->Import("m", TinyOnnx(2), Contract(), {}, true).status().code(),
            absl::StatusCode::kInternal);
  EXPECT_EQ(repository_->SetDefault("m", 2).status().code(), absl::StatusCode::kInternal);
  EXPECT_EQ(Read("m/default"), "1\n");
  EXPECT_EQ(DefaultOf("m"), 1u);
  EXPECT_FALSE(Exists("m/3"));
  EXPECT_THAT(Leftovers(), IsEmpty());

  fs::remove(Path("m/default"));
  folder_sync_fails = [this] { return Exists("m/default"); };
  EXPECT_EQ(repository_->Publish("m", TinyArtifact(9), true).status().code(),
            absl::StatusCode::kInternal);
  EXPECT_FALSE(Exists("m/default"));
  EXPECT_THAT(Versions("m"), ElementsAre(1, 2));
}

TEST_F(RepositoryTest, ADamagedDefaultIsNotReplacedSilently) {
  OpenWith(1);
  ASSERT_TRUE(repository_->SetDefault("m", 2).ok());
  repository_.reset();
  Damage("m/2/model.tern");
  Open();
  EXPECT_EQ(repository_->Acquire("m", 0).status().code(), absl::StatusCode::kUnavailable);
  EXPECT_TRUE(repository_->Acquire("m", 1).ok());
  ASSERT_TRUE(repository_->SetDefault("m", 1).ok());
  EXPECT_TRUE(repository_->Acquire("m", 0).ok());
}

TEST_F(RepositoryTest, AModelWithoutUsableVersionsSaysWhy) {
  OpenWith(0);
  repository_.reset();
  Write("m/1/model.onnx", "x");
  fs::remove(Path("m/default"));
  Open();
  const absl::Status status = repository_->Acquire("m", 0).status();
  EXPECT_EQ(status.code(), absl::StatusCode::kUnavailable);
  EXPECT_THAT(std::string(status.message()), HasSubstr("cannot be served"));
  EXPECT_THAT(ReasonOf("m", 0), HasSubstr("model.onnx"));
  const auto next = repository_->Import("m", TinyOnnx(2), Contract(), {}, false);
  ASSERT_TRUE(next.ok()) << next.status();
  EXPECT_EQ(next->version, 2u);
  EXPECT_TRUE(next->is_default);
}

TEST_F(RepositoryTest, UnknownNamesSayWhatExists) {
  OpenWith(1);
  const absl::Status model = repository_->Acquire("nobody", 0).status();
  EXPECT_EQ(model.code(), absl::StatusCode::kNotFound);
  EXPECT_THAT(std::string(model.message()), HasSubstr("models: m"));
  const absl::Status version = repository_->Find("m", 9).status();
  EXPECT_EQ(version.code(), absl::StatusCode::kNotFound);
  EXPECT_THAT(std::string(version.message()), HasSubstr("versions: 1, 2"));
  EXPECT_EQ(repository_->Load("m", 9).status().code(), absl::StatusCode::kNotFound);
  EXPECT_EQ(repository_->Load("nobody", 1).status().code(), absl::StatusCode::kNotFound);
  EXPECT_EQ(repository_->Unload("m", 9).status().code(), absl::StatusCode::kNotFound);
  EXPECT_EQ(repository_->SetDefault("nobody", 1).status().code(), absl::StatusCode::kNotFound);
  EXPECT_EQ(repository_->Delete("nobody", 0).status().code(), absl::StatusCode::kNotFound);
  EXPECT_EQ(repository_->Delete("m", 9).status().code(), absl::StatusCode::kNotFound);
  EXPECT_EQ(repository_->Load("../m", 1).status().code(), absl::StatusCode::kInvalidArgument);
  EXPECT_THAT(repository_->List("nobody"), IsEmpty());
}

TEST_F(RepositoryTest, UnloadTakesAVersionOutAndLoadBringsItBack) {
  OpenWith(1);
  auto serving = Serving("m", 2);
  const auto unloaded = repository_->Unload("m", 2);
  ASSERT_TRUE(unloaded.ok()) << unloaded.status();
  EXPECT_EQ(unloaded->state, State::kUnloaded);
  EXPECT_TRUE(serving->drained);
  EXPECT_EQ(repository_->Acquire("m", 2).status().code(), absl::StatusCode::kUnavailable);
  EXPECT_THAT(metrics_.Render(), Not(HasSubstr(R"(tern_model_ready{model="m",version="2"})")));
  EXPECT_EQ(alive_, 2) << "a user still holds the servable";
  serving.reset();
  EXPECT_EQ(alive_, 1);
  EXPECT_TRUE(repository_->Unload("m", 2).ok());
  const auto loaded = repository_->Load("m", 2);
  ASSERT_TRUE(loaded.ok()) << loaded.status();
  EXPECT_EQ(loaded->state, State::kReady);
  EXPECT_NE(Serving("m", 2), nullptr);
}

TEST_F(RepositoryTest, TheDefaultCannotBeUnloadedOrDeletedWhileOthersExist) {
  OpenWith(1);
  EXPECT_EQ(repository_->Unload("m", 1).status().code(), absl::StatusCode::kFailedPrecondition);
  EXPECT_EQ(repository_->Unload("m", 0).status().code(), absl::StatusCode::kFailedPrecondition);
  EXPECT_EQ(repository_->Delete("m", 1).status().code(), absl::StatusCode::kFailedPrecondition);
  EXPECT_NE(Serving("m", 1), nullptr);
}

TEST_F(RepositoryTest, SetDefaultMovesThePointerForGood) {
  OpenWith(1);
  EXPECT_EQ(repository_->SetDefault("m", 0).status().code(), absl::StatusCode::kInvalidArgument);
  const auto info = repository_->SetDefault("m", 2);
  ASSERT_TRUE(info.ok()) << info.status();
  EXPECT_TRUE(info->is_default);
  EXPECT_FALSE(repository_->Info("m", 1)->is_default);
  EXPECT_EQ(Serving("m", 0)->model->info.version, 2u);
  EXPECT_THAT(metrics_.Render(), HasSubstr(R"(tern_model_info{default="true",isa=)"));
  ASSERT_TRUE(repository_->Unload("m", 1).ok());
  EXPECT_EQ(repository_->SetDefault("m", 1).status().code(), absl::StatusCode::kFailedPrecondition);
  Open();
  EXPECT_EQ(DefaultOf("m"), 2u);
}

TEST_F(RepositoryTest, DeleteRemovesAVersionFromDiskAndItsNumberIsNotUsedAgain) {
  OpenWith(2);
  auto serving = Serving("m", 3);
  const auto removed = repository_->Delete("m", 3);
  ASSERT_TRUE(removed.ok()) << removed.status();
  EXPECT_EQ(*removed, 1u);
  EXPECT_TRUE(serving->drained);
  EXPECT_FALSE(Exists("m/3"));
  EXPECT_THAT(Leftovers(), IsEmpty());
  EXPECT_EQ(repository_->Publish("m", TinyArtifact(9), false)->version, 4u);
  Open();
  EXPECT_THAT(Versions("m"), ElementsAre(1, 2, 4));
}

TEST_F(RepositoryTest, DeletingAWholeModelRemovesItsFolder) {
  OpenWith(2);
  EXPECT_EQ(*repository_->Delete("m", 0), 3u);
  EXPECT_FALSE(Exists("m"));
  EXPECT_THAT(repository_->List(""), IsEmpty());
  EXPECT_EQ(alive_, 0);
  EXPECT_THAT(metrics_.Render(), Not(HasSubstr(R"(model="m")")));
  // The name is free for another contract; its numbers go on.
  v1::Preprocessing other = Contract();
  other.set_color_order(v1::Preprocessing::BGR);
  const auto again = repository_->Import("m", TinyOnnx(4), other, {}, false);
  ASSERT_TRUE(again.ok()) << again.status();
  EXPECT_EQ(again->version, 4u);
  EXPECT_TRUE(again->is_default);
}

TEST_F(RepositoryTest, DeletingTheLastVersionDeletesTheModel) {
  OpenWith(0);
  EXPECT_EQ(*repository_->Delete("m", 1), 1u);
  EXPECT_FALSE(Exists("m"));
  EXPECT_EQ(repository_->Info("m", 0).status().code(), absl::StatusCode::kNotFound);
}

TEST_F(RepositoryTest, NothingIsDeletedWhileTheRepositorysFolderIsGoneOrAnother) {
  OpenWith(0);
  const std::string away = root_ + ".away";
  fs::rename(root_, away);
  for (int i = 0; i < 2; ++i) {
    const absl::Status status = repository_->Delete("m", 0).status();
    EXPECT_EQ(status.code(), absl::StatusCode::kFailedPrecondition) << status;
    EXPECT_THAT(std::string(status.message()), HasSubstr("the repository's folder is gone"));
    fs::create_directory(root_);  // as an unmounted file system leaves it
  }
  fs::remove(root_);
  fs::rename(away, root_);
  // A model whose folder alone is gone is deleted already.
  fs::remove_all(Path("m"));
  EXPECT_EQ(*repository_->Delete("m", 0), 1u);
}

TEST_F(RepositoryTest, TheLastVersionTakesNoFolderWithItThatIsNotItsOwn) {
  OpenWith(0);
  for (const char* other : {"m/2", "m/v3.part"}) {
    Write(absl::StrCat(other, "/model.onnx"), TinyOnnx(2));
    const absl::Status status = repository_->Delete("m", 1).status();
    EXPECT_EQ(status.code(), absl::StatusCode::kFailedPrecondition);
    EXPECT_THAT(std::string(status.message()), HasSubstr(absl::StrCat("holds ", other + 2, ";")));
    EXPECT_TRUE(Exists(absl::StrCat(other, "/model.onnx")));
    EXPECT_NE(Serving("m", 0), nullptr);
    fs::rename(Path(other), Path("aside"));
    fs::remove_all(Path("aside"));
  }
  Write("m/2/model.onnx", TinyOnnx(2));
  ASSERT_TRUE(repository_->Load("m", 2).ok());
  ASSERT_TRUE(repository_->SetDefault("m", 2).ok());
  EXPECT_EQ(*repository_->Delete("m", 1), 1u);
  EXPECT_EQ(Read("m/default"), "2\n");
  // The whole model is all that is there.
  Write("m/3/model.onnx", TinyOnnx(3));
  EXPECT_EQ(*repository_->Delete("m", 0), 1u);
  EXPECT_FALSE(Exists("m"));
}

TEST_F(RepositoryTest, AVersionPutOnDiskByHandCanBeLoaded) {
  OpenWith(1);
  fs::create_directory(Path("m/8"));
  fs::copy_file(Path("m/2/model.tern"), Path("m/8/model.tern"));
  const auto loaded = repository_->Load("m", 8);
  ASSERT_TRUE(loaded.ok()) << loaded.status();
  EXPECT_EQ(repository_->Publish("m", TinyArtifact(9), false)->version, 9u);
  fs::copy(Path("m"), Path("copy"), fs::copy_options::recursive);
  ASSERT_TRUE(repository_->Load("copy", 2).ok());
  EXPECT_EQ(StateOf("copy", 1), State::kUnloaded);
}

TEST_F(RepositoryTest, ReloadingReplacesWithoutAGap) {
  OpenWith(1);
  const auto old = Serving("m", 2);
  std::shared_ptr<Servable> during;
  old->on_drain = [&] { during = *repository_->Acquire("m", 2); };
  ASSERT_TRUE(repository_->Load("m", 2).ok());
  EXPECT_TRUE(old->drained);
  ASSERT_NE(during, nullptr);
  EXPECT_NE(during.get(), old.get()) << "drained before the new one served";
}

TEST_F(RepositoryTest, AFailingReloadKeepsTheOldVersionServing) {
  OpenWith(1);
  const auto old = Serving("m", 2);
  const std::string whole = Read("m/2/model.tern");
  Damage("m/2/model.tern");
  EXPECT_EQ(repository_->Load("m", 2).status().code(), absl::StatusCode::kDataLoss);
  EXPECT_EQ(StateOf("m", 2), State::kReady);
  EXPECT_EQ(Serving("m", 2), old);
  EXPECT_FALSE(old->drained);
  Write("m/2/model.tern", whole);
  fail_servables_ = true;
  EXPECT_EQ(repository_->Load("m", 2).status().code(), absl::StatusCode::kInternal);
  EXPECT_EQ(Serving("m", 2), old);
}

TEST_F(RepositoryTest, AVersionWhoseServableCannotBeMadeIsUnavailable) {
  OpenWith(0);
  repository_.reset();
  fail_servables_ = true;
  Open();
  EXPECT_EQ(StateOf("m", 1), State::kUnavailable);
  EXPECT_THAT(ReasonOf("m", 1), HasSubstr("no servable today"));
  fail_servables_ = false;
  EXPECT_TRUE(repository_->Load("m", 1).ok());
}

TEST_F(RepositoryTest, ReadFloatSourceGivesTheOptimisedGraphAndItsFilesChecksum) {
  OpenWith(1);
  const auto source = repository_->ReadFloatSource("m", 0);
  ASSERT_TRUE(source.ok()) << source.status();
  EXPECT_EQ(source->version, 1u);
  EXPECT_EQ(source->sha256, Sha256Hex(TinyOnnx(1)));
  EXPECT_TRUE(graph::Validate(source->graph).ok());
  for (const graph::Node& node : source->graph.nodes)
    EXPECT_NE(node.op, graph::OpType::kRelu) << "not optimised";
  EXPECT_EQ(repository_->ReadFloatSource("m", 2).status().code(),
            absl::StatusCode::kFailedPrecondition);
  EXPECT_EQ(repository_->ReadFloatSource("m", 7).status().code(), absl::StatusCode::kNotFound);
  EXPECT_EQ(*repository_->FilePath("m", 1), Path("m/1/model.onnx"));
  EXPECT_EQ(*repository_->FilePath("m", 2), Path("m/2/model.tern"));
}

TEST_F(RepositoryTest, AnyVersionIsReadAsOnnxAndAQuantisedOneServesAgainAsInt8) {
  OpenWith(1);
  EXPECT_EQ(*repository_->ReadAsOnnx("m", 1), TinyOnnx(1));
  const auto onnx = repository_->ReadAsOnnx("m", 2);
  ASSERT_TRUE(onnx.ok()) << onnx.status();
  ::onnx::ModelProto model;
  ASSERT_TRUE(model.ParseFromString(*onnx));
  std::map<std::string, std::string> metadata;
  for (const auto& entry : model.metadata_props()) metadata[entry.key()] = entry.value();
  EXPECT_EQ(metadata["tern.scheme"], "ternary-cluster N=4");
  EXPECT_EQ(metadata["tern.source_sha256"], std::string(64, 'a'));
  EXPECT_EQ(metadata.count("tern.report"), 1u);
  EXPECT_EQ(metadata.count("tern.preprocessing"), 1u);

  const auto again = repository_->Import("m", *onnx, Contract(), {}, false);
  ASSERT_TRUE(again.ok()) << again.status();
  EXPECT_EQ(again->version, 3u);
  EXPECT_EQ(again->scheme, "int8");
  EXPECT_LT(again->bits_per_weight, 8.5);
  const absl::Status refused = repository_->ReadFloatSource("m", 3).status();
  EXPECT_EQ(refused.code(), absl::StatusCode::kFailedPrecondition);
  EXPECT_THAT(std::string(refused.message()), HasSubstr("was imported quantised (int8)"));
  EXPECT_EQ(*repository_->ReadAsOnnx("m", 3), *onnx);

  // The same logits from the artifact and from its ONNX form.
  const artifact::Artifact artifact = TinyArtifact(10);  // version 2
  const auto loaded = repository_->Find("m", 3);
  ASSERT_TRUE(loaded.ok()) << loaded.status();
  EXPECT_EQ((*loaded)->report.ByteSizeLong(), 0u);
  EXPECT_EQ(SelfTest(artifact, *(*loaded)->plan), absl::OkStatus());
  EXPECT_EQ(repository_->ReadAsOnnx("m", 9).status().code(), absl::StatusCode::kNotFound);
}

TEST_F(RepositoryTest, TheReportReachesTheGaugesAgainAfterReopening) {
  OpenWith(0);
  artifact::Artifact artifact = TinyArtifact(3);
  v1::QuantizationReport& report = artifact.report;
  report.mutable_recipe()->set_weights(v1::TERNARY_CLUSTER);
  report.mutable_recipe()->set_cluster_size(4);
  report.set_bits_per_weight(3.25);
  report.mutable_float_top1()->set_value(0.8);
  report.mutable_top1()->set_value(0.6);
  report.mutable_top1()->set_total(100);
  v1::LayerReport* layer = report.add_layers();
  layer->set_name("conv");
  layer->set_output_sqnr_db(21.5);
  ASSERT_TRUE(repository_->Publish("m", artifact, false).ok());
  Open();
  EXPECT_EQ(repository_->Info("m", 2)->bits_per_weight, 3.25);
  EXPECT_THAT(
      metrics_.Render(),
      HasSubstr(R"(tern_quantization_sqnr_db{layer="conv",model="m",scheme="ternary-cluster",)"
                R"(version="2"} 21.5)"));
  EXPECT_THAT(metrics_.Render(), HasSubstr("tern_quantization_top1_ratio{"));
  EXPECT_THAT(metrics_.Render(), Not(HasSubstr("tern_quantization_top1_agreement{")));
}

TEST_F(RepositoryTest, ShutdownDrainsEverythingAndRefusesFurtherWork) {
  OpenWith(1);
  const auto first = Serving("m", 1), second = Serving("m", 2);
  repository_->Shutdown();
  EXPECT_TRUE(first->drained);
  EXPECT_TRUE(second->drained);
  EXPECT_EQ(repository_->Acquire("m", 1).status().code(), absl::StatusCode::kUnavailable);
  EXPECT_EQ(repository_->Load("m", 1).status().code(), absl::StatusCode::kUnavailable);
  EXPECT_EQ(repository_->Publish("m", TinyArtifact(3), false).status().code(),
            absl::StatusCode::kUnavailable);
  EXPECT_EQ(repository_->Import("x", TinyOnnx(3), Contract(), {}, false).status().code(),
            absl::StatusCode::kUnavailable);
  EXPECT_EQ(repository_->Delete("m", 0).status().code(), absl::StatusCode::kUnavailable);
  repository_->Shutdown();
}

// Readers never see a gap in the default, a drained servable of a version that nobody unloaded, or
// a wrong version, while publications, loads, unloads, default moves and deletions go on beside
// them.
TEST_F(RepositoryTest, LookupsStayRightWhileEverythingChanges) {
  OpenWith(2);
  const artifact::Artifact artifact = TinyArtifact(3);
  std::atomic<bool> stop{false};
  std::atomic<int> wrong{0}, lookups{0};
  std::vector<std::thread> threads;
  for (int t = 0; t < 2; ++t) {
    threads.emplace_back([&, t] {
      std::mt19937 random(t);
      while (!stop) {
        const uint64_t version = random() % 5;
        const auto servable = repository_->Acquire("m", version);
        ++lookups;
        if (servable.ok()) {
          const auto& fake = static_cast<const FakeServable&>(**servable);
          wrong += version != 0 && fake.model->info.version != version;
        } else if (version == 0 || version == 1) {
          ++wrong;  // 1 is never touched, and the default always serves
        } else {
          wrong += servable.status().code() != absl::StatusCode::kUnavailable &&
                   servable.status().code() != absl::StatusCode::kNotFound;
        }
        repository_->List("");
      }
    });
  }
  for (int t = 0; t < 2; ++t) {
    threads.emplace_back([&, t] {
      std::mt19937 random(100 + t);
      for (int i = 0; i < 40; ++i) {
        const uint64_t version = 2 + random() % 2;
        absl::Status status;
        switch (random() % 5) {
          case 0:
            status = repository_->Publish("m", artifact, false).status();
            break;
          case 1:
            status = repository_->Load("m", version).status();
            break;
          case 2:
            status = repository_->Unload("m", version).status();
            break;
          case 3:
            status = repository_->SetDefault("m", 1 + random() % 3).status();
            break;
          case 4:
            status = repository_->Delete("m", 4 + random() % 20).status();
            break;
        }
        wrong += !status.ok() && status.code() != absl::StatusCode::kFailedPrecondition &&
                 status.code() != absl::StatusCode::kNotFound;
      }
    });
  }
  threads[2].join();
  threads[3].join();
  stop = true;
  threads[0].join();
  threads[1].join();
  EXPECT_EQ(wrong, 0);
  EXPECT_GT(lookups, 0);
  EXPECT_THAT(Leftovers(), IsEmpty());
  const std::vector<uint64_t> before = Versions("m");
  const uint64_t default_before = DefaultOf("m");
  Open();
  EXPECT_EQ(Versions("m"), before);
  EXPECT_EQ(DefaultOf("m"), default_before);
}

TEST_F(RepositoryTest, SimultaneousImportsOfOneNewNameMakeTwoVersions) {
  Open();
  std::vector<std::thread> threads;
  std::atomic<int> imported{0};
  for (int t = 0; t < 3; ++t) {
    threads.emplace_back([&, t] {
      imported += repository_->Import("m", TinyOnnx(t), Contract(), Labels(), false).ok();
    });
  }
  for (std::thread& thread : threads) thread.join();
  EXPECT_EQ(imported, 3);
  EXPECT_THAT(Versions("m"), ElementsAre(1, 2, 3));
  EXPECT_EQ(DefaultOf("m"), 1u);
}

class SelfTestTest : public ::testing::Test {
 protected:
  absl::Status Run() {
    const auto plan =
        engine::Plan::Create(artifact_.graph, {.max_batch = 2});  // three images: two batches
    EXPECT_TRUE(plan.ok()) << plan.status();
    return SelfTest(artifact_, **plan);
  }
  absl::Span<float> logits() { return artifact_.self_test_logits.data<float>(); }

  artifact::Artifact artifact_ = TinyArtifact(1);
};

TEST_F(SelfTestTest, PassesOnTheStoredLogits) { EXPECT_TRUE(Run().ok()) << Run(); }

TEST_F(SelfTestTest, PassesIfNothingIsStored) {
  artifact_.self_test_input = Tensor();
  artifact_.self_test_logits = Tensor();
  EXPECT_TRUE(Run().ok());
}

TEST_F(SelfTestTest, FailsIfALogitOfTheLastImageIsOff) {
  float largest = 0;
  for (float logit : logits()) largest = std::max(largest, std::abs(logit));
  // The best class stays the best: only the difference is wrong.
  const auto last = logits().subspan(8, 4);
  const auto least = std::min_element(last.begin(), last.end());
  *least -= 0.04f * largest;
  EXPECT_TRUE(Run().ok()) << Run();
  *least -= 0.03f * largest;
  EXPECT_EQ(Run().code(), absl::StatusCode::kDataLoss);
}

TEST_F(SelfTestTest, FailsIfTheBestClassDiffersByLittle) {
  const auto first = logits().subspan(0, 4);
  const auto best = std::max_element(first.begin(), first.end());
  // Two classes within the tolerance of each other, stored in the other order.
  float second = -1e9f;
  for (float& logit : first) {
    if (&logit != &*best) second = std::max(second, logit);
  }
  const float gap = *best - second;
  for (float& logit : logits())
    logit = logit;  // the tolerance below is relative to the largest of all
  artifact_.graph.nodes.back().bias.data<float>()[best - first.begin()] -= gap - 1e-4f;
  const auto plan = engine::Plan::Create(artifact_.graph, {.max_batch = 3});
  auto session = (*plan)->NewSession(1);
  engine::NchwToNhwc(artifact_.self_test_input.data<float>().data(), 3, 3, 8, 8,
                     session->input().data());
  const auto fresh = session->Run(3);
  std::copy(fresh->begin(), fresh->begin() + 12, logits().begin());
  ASSERT_TRUE(Run().ok()) << Run();
  *best -= 2e-4f;
  const absl::Status status = Run();
  EXPECT_EQ(status.code(), absl::StatusCode::kDataLoss);
  EXPECT_THAT(std::string(status.message()), HasSubstr("class"));
}

TEST_F(SelfTestTest, FailsIfTheStoredTensorsDoNotFitOrAreNotFinite) {
  logits()[5] = std::nanf("");
  EXPECT_EQ(Run().code(), absl::StatusCode::kDataLoss);
  artifact_ = TinyArtifact(1);
  artifact_.self_test_logits = Tensor(DType::kF32, {2, 4});
  EXPECT_EQ(Run().code(), absl::StatusCode::kDataLoss);
  artifact_ = TinyArtifact(1);
  artifact_.self_test_input = Tensor();
  EXPECT_EQ(Run().code(), absl::StatusCode::kDataLoss);
}

}  // namespace
}  // namespace tern::repository
