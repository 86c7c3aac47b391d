#include "server/repository/watch.h"

#include <sys/stat.h>

#include <filesystem>
#include <memory>
#include <string>
#include <utility>

#include "absl/strings/str_cat.h"
#include "gmock/gmock.h"
#include "server/repository/storage.h"
#include "tests/repository/folder_fixture.h"
#include "tests/repository/tiny_models.h"

namespace tern::repository {
namespace {

using testing::Contract;
using testing::TinyOnnx;

namespace fs = std::filesystem;

// A repository with version 1 of "tiny", and one with all hands on the folder.
class WatcherTest : public testing::FolderTest {
 protected:
  void SetUp() override {
    RepositoryOptions options;
    options.root = root_;
    options.metrics = &metrics_;
    auto opened = Repository::Open(std::move(options));
    ASSERT_TRUE(opened.ok()) << opened.status();
    repository_ = *std::move(opened);
    ASSERT_TRUE(repository_->Import("tiny", TinyOnnx(1), Contract(), {}, true).ok());
    watcher_ =
        std::make_unique<Watcher>(repository_.get(), root_, &metrics_, [this] { ++changes_; });
  }
  void Polls(int count) {
    for (int i = 0; i < count; ++i) watcher_->Poll();
  }
  // "ready", "unavailable", "unloaded" or "" if the repository does not know it.
  std::string StateOf(uint64_t version, const std::string& model = "tiny") {
    const auto info = repository_->Info(model, version);
    if (!info.ok()) return "";
    switch (info->state) {
      case State::kReady:
        return "ready";
      case State::kUnavailable:
        return "unavailable";
      case State::kUnloaded:
        return "unloaded";
      default:
        return "loading";
    }
  }
  uint64_t Default() { return repository_->Info("tiny", 0)->version; }
  // Which network answers, by its address.
  const void* InMemory(uint64_t version) { return (*repository_->Find("tiny", version)).get(); }
  int Events(const std::string& event) {
    const std::string text = metrics_.Render();
    const std::string series = absl::StrCat("tern_watch_events_total{event=\"", event, "\"} ");
    return std::atoi(text.c_str() + text.find(series) + series.size());
  }

  metrics::Metrics metrics_;
  std::unique_ptr<Repository> repository_;
  std::unique_ptr<Watcher> watcher_;
  int changes_ = 0;
};

TEST_F(WatcherTest, AnUntouchedFolderIsLeftAlone) {
  const void* before = InMemory(1);
  Polls(5);
  EXPECT_EQ(InMemory(1), before);
  EXPECT_EQ(Events("loaded"), 0);
  EXPECT_EQ(changes_, 0);
}

TEST_F(WatcherTest, ANewVersionIsLoadedOnceItWasTheSameForTwoPolls) {
  Write("tiny/2/model.onnx", TinyOnnx(2));
  Polls(1);
  EXPECT_EQ(StateOf(2), "");
  Polls(1);
  EXPECT_EQ(StateOf(2), "ready");
  EXPECT_EQ(Default(), 1u);
  EXPECT_EQ(Events("loaded"), 1);
  Polls(3);
  EXPECT_EQ(Events("loaded"), 1);
  EXPECT_EQ(changes_, 1);
}

TEST_F(WatcherTest, ACopyInProgressWaitsUntilItStandsStill) {
  const std::string onnx = TinyOnnx(2);
  fs::create_directories(Path("tiny/2"));
  Polls(3);  // an empty folder is nothing to load
  for (size_t part = 1; part <= 4; ++part) {
    Write("tiny/2/model.onnx", onnx.substr(0, onnx.size() * part / 4));
    Polls(1);
    EXPECT_EQ(StateOf(2), "") << part;
  }
  Polls(1);
  EXPECT_EQ(StateOf(2), "ready");
  EXPECT_EQ(Events("load_failed"), 0);
}

TEST_F(WatcherTest, AHalfCopyThatPausesFailsOnceAndLoadsWhenItIsComplete) {
  const std::string onnx = TinyOnnx(2);
  Write("tiny/2/model.onnx", onnx.substr(0, onnx.size() / 2));
  Polls(6);
  EXPECT_EQ(StateOf(2), "unavailable");
  EXPECT_EQ(Events("load_failed"), 1);
  Write("tiny/2/model.onnx", onnx);
  Polls(2);
  EXPECT_EQ(StateOf(2), "ready");
}

TEST_F(WatcherTest, AChangedVersionReplacesTheOneInMemoryAndABrokenOneDoesNot) {
  const void* before = InMemory(1);
  Write("tiny/1/model.onnx", "no network");
  Polls(4);
  EXPECT_EQ(InMemory(1), before);
  EXPECT_EQ(Events("load_failed"), 1);
  Write("tiny/1/model.onnx", TinyOnnx(7));
  Polls(2);
  EXPECT_NE(InMemory(1), before);
  EXPECT_EQ(StateOf(1), "ready");
}

TEST_F(WatcherTest, AChangedConfigReloadsTheVersionsOfItsModel) {
  Write("tiny/config.textproto", Read("tiny/config.textproto") + "instances: 1\n");
  Polls(2);
  EXPECT_EQ((*repository_->Find("tiny", 1))->config.instances(), 1u);
}

TEST_F(WatcherTest, ANewModelAppearsWithItsDefault) {
  fs::create_directories(Path("other"));
  Write("other/config.textproto", Read("tiny/config.textproto"));
  Write("other/default", "2\n");
  Write("other/1/model.onnx", TinyOnnx(3));
  Write("other/2/model.onnx", TinyOnnx(4));
  Polls(2);
  EXPECT_EQ(StateOf(1, "other"), "ready");
  EXPECT_EQ(StateOf(2, "other"), "ready");
  EXPECT_EQ(repository_->Info("other", 0)->version, 2u);
}

TEST_F(WatcherTest, WhatTheServerPublishedOrUnloadedItselfIsNotLoadedAgain) {
  ASSERT_TRUE(repository_->Import("tiny", TinyOnnx(2), Contract(), {}, false).ok());
  const void* before = InMemory(2);
  Polls(3);
  EXPECT_EQ(InMemory(2), before);
  ASSERT_TRUE(repository_->Unload("tiny", 2).ok());
  Polls(3);
  EXPECT_EQ(StateOf(2), "unloaded");
  EXPECT_EQ(Events("loaded"), 0);
}

TEST_F(WatcherTest, ARemovedVersionIsUnloadedAfterTwoPollsWithoutIt) {
  ASSERT_TRUE(repository_->Import("tiny", TinyOnnx(2), Contract(), {}, false).ok());
  fs::remove_all(Path("tiny/2"));
  Polls(1);
  EXPECT_EQ(StateOf(2), "ready");
  Polls(1);
  EXPECT_EQ(StateOf(2), "");
  EXPECT_EQ(Events("removed"), 1);
  EXPECT_EQ(metrics_.Render().find("model=\"tiny\",version=\"2\""), std::string::npos);
}

TEST_F(WatcherTest, ARemovedDefaultStaysUntilAnotherIsTheDefault) {
  ASSERT_TRUE(repository_->Import("tiny", TinyOnnx(2), Contract(), {}, false).ok());
  fs::remove_all(Path("tiny/1"));
  Polls(5);
  EXPECT_EQ(StateOf(1), "ready");
  EXPECT_EQ(Events("remove_refused"), 1);
  Write("tiny/default", "2\n");
  Polls(1);
  EXPECT_EQ(Default(), 2u);
  EXPECT_EQ(StateOf(1), "");
}

TEST_F(WatcherTest, AModelLeavesWithItsFolderAndMayComeBack) {
  fs::rename(Path("tiny"), Path(".elsewhere"));
  Polls(2);
  EXPECT_TRUE(repository_->List("").empty());
  fs::rename(Path(".elsewhere"), Path("tiny"));
  Polls(2);
  EXPECT_EQ(StateOf(1), "ready");
}

TEST_F(WatcherTest, ThePointerMovesTheDefaultOnceItsVersionIsReady) {
  Write("tiny/default", "2\n");
  Polls(3);
  EXPECT_EQ(Default(), 1u);
  EXPECT_EQ(Events("default_refused"), 1);
  Write("tiny/2/model.onnx", "no network");
  Polls(3);
  EXPECT_EQ(Default(), 1u);
  Write("tiny/2/model.onnx", TinyOnnx(2));
  Polls(2);
  EXPECT_EQ(Default(), 2u);
  EXPECT_EQ(Events("default_moved"), 1);
  EXPECT_NE(
      metrics_.Render().find("default=\"true\",isa=\"" + (*repository_->Find("tiny", 2))->isa +
                             "\",model=\"tiny\",scheme=\"fp32\",version=\"2\""),
      std::string::npos);
}

TEST_F(WatcherTest, ADamagedOrRemovedPointerLeavesTheDefaultWhereItIs) {
  Write("tiny/default", "two");
  Polls(3);
  EXPECT_EQ(Default(), 1u);
  EXPECT_EQ(Events("default_refused"), 1);
  fs::remove(Path("tiny/default"));
  Polls(3);
  EXPECT_EQ(Default(), 1u);
  EXPECT_EQ(Events("default_refused"), 1);
}

TEST_F(WatcherTest, AModelWithoutAVersionIsWarnedOfOnceUntilItsFolderGoes) {
  const auto put = [&] {
    Write("other/config.textproto", Read("tiny/config.textproto"));
    Write("other/default", "two");
  };
  put();
  Polls(4);
  EXPECT_EQ(Events("default_refused"), 1);
  fs::remove_all(Path("other"));
  Polls(2);
  put();
  Polls(4);
  EXPECT_EQ(Events("default_refused"), 2);
}

TEST_F(WatcherTest, AReadOnlyServerFollowsTheFolderAndKeepsWhatItHasWhenItIsUnmounted) {
  repository_.reset();
  RepositoryOptions options;
  options.root = root_;
  options.metrics = &metrics_;
  options.read_only = true;
  auto opened = Repository::Open(std::move(options));
  ASSERT_TRUE(opened.ok()) << opened.status();
  repository_ = *std::move(opened);
  watcher_ = std::make_unique<Watcher>(repository_.get(), root_, &metrics_);
  fs::remove(Path(".lock"));
  Write("tiny/2/model.onnx", TinyOnnx(2));
  Write("tiny/default", "2\n");
  Polls(2);
  EXPECT_EQ(StateOf(2), "ready");
  EXPECT_EQ(Default(), 2u);

  const std::string away = root_ + "-away";
  fs::rename(Path("tiny"), away);
  Polls(3);
  EXPECT_EQ(StateOf(2), "ready");
  EXPECT_EQ(Events("unreadable"), 3);
  fs::rename(away, Path("tiny"));
  Polls(2);
  EXPECT_EQ(Default(), 2u);
}

TEST_F(WatcherTest, SetDefaultByRequestIsNotTakenBack) {
  ASSERT_TRUE(repository_->Import("tiny", TinyOnnx(2), Contract(), {}, false).ok());
  Polls(2);
  ASSERT_TRUE(repository_->SetDefault("tiny", 2).ok());
  Polls(3);
  EXPECT_EQ(Default(), 2u);
  EXPECT_EQ(Events("default_moved"), 0);
}

TEST_F(WatcherTest, NothingIsUnloadedWhileTheRootIsAwayOrAnother) {
  fs::rename(root_, root_ + ".away");
  Polls(3);
  EXPECT_EQ(StateOf(1), "ready");
  fs::create_directories(root_);  // as an unmounted file system leaves it
  Polls(3);
  EXPECT_EQ(StateOf(1), "ready");
  EXPECT_EQ(Events("unreadable"), 6);
  fs::remove_all(root_);
  fs::rename(root_ + ".away", root_);
  Polls(3);
  EXPECT_EQ(StateOf(1), "ready");
}

TEST_F(WatcherTest, PollsByItselfUntilItIsDestroyed) {
  watcher_->Start(absl::Milliseconds(1));
  Write("tiny/2/model.onnx", TinyOnnx(2));
  for (int i = 0; i < 10000 && StateOf(2) != "ready"; ++i) {
    std::this_thread::sleep_for(std::chrono::milliseconds(1));
  }
  EXPECT_EQ(StateOf(2), "ready");
  watcher_.reset();
}

}  // namespace
}  // namespace tern::repository
