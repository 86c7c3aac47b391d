// kill -9 at random moments of a process that imports, publishes, moves the default and deletes:
// whatever it had reported as done is there afterwards, and nothing is there in part.
#include <signal.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cstdlib>
#include <random>
#include <set>

#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "server/repository/repository.h"
#include "tests/repository/folder_fixture.h"
#include "tests/repository/tiny_models.h"

namespace tern::repository {
namespace {

using testing::Contract;
using ::testing::IsEmpty;
using testing::Labels;
using testing::TinyArtifact;
using testing::TinyOnnx;

constexpr char kRootVariable[] = "TERN_CRASH_TEST_ROOT";
constexpr char kPipeVariable[] = "TERN_CRASH_TEST_PIPE";
constexpr char kSeedVariable[] = "TERN_CRASH_TEST_SEED";

// What the child reports through its pipe; written whole (shorter than PIPE_BUF).
struct Event {
  enum Kind { kPublished, kMovingDefault, kDefault, kDeleting, kDeleted } kind;
  uint64_t version;
};

RepositoryOptions Options(const std::string& root) {
  RepositoryOptions options;
  options.root = root;
  options.plan.max_batch = 1;
  return options;
}

// The victim: only run by CrashKillTest, as a process of its own (a forked copy of a threaded
// process is not one that a server ever is).
TEST(CrashTest, DISABLED_Victim) {
  const char* root = std::getenv(kRootVariable);
  if (root == nullptr) GTEST_SKIP() << "started by CrashKillTest only";
  const int pipe = std::atoi(std::getenv(kPipeVariable));
  std::mt19937 random(std::atoi(std::getenv(kSeedVariable)));
  auto repository = *Repository::Open(Options(root));
  const auto tell = [pipe](Event::Kind kind, uint64_t version) {
    const Event event{kind, version};
    ASSERT_EQ(::write(pipe, &event, sizeof(event)), static_cast<ssize_t>(sizeof(event)));
  };
  const artifact::Artifact artifact = TinyArtifact(1);
  if (repository->List("m").empty()) {
    const auto first = repository->Import("m", TinyOnnx(1), Contract(), Labels(), false);
    ASSERT_TRUE(first.ok()) << first.status();
    tell(Event::kPublished, first->version);
    tell(Event::kDefault, first->version);
  }
  for (;;) {
    const std::vector<VersionInfo> versions = repository->List("m");
    const VersionInfo& some = versions[random() % versions.size()];
    switch (versions.size() > 8 ? 3 : random() % 4) {
      case 0: {
        const auto info = repository->Import("m", TinyOnnx(2), Contract(), Labels(), false);
        if (info.ok()) tell(Event::kPublished, info->version);
        break;
      }
      case 1: {
        const auto info = repository->Publish("m", artifact, false);
        if (info.ok()) tell(Event::kPublished, info->version);
        break;
      }
      case 2:
        tell(Event::kMovingDefault, some.version);
        if (repository->SetDefault("m", some.version).ok()) tell(Event::kDefault, some.version);
        break;
      case 3:
        if (some.is_default) break;
        tell(Event::kDeleting, some.version);
        if (repository->Delete("m", some.version).ok()) tell(Event::kDeleted, some.version);
        break;
    }
  }
}

class CrashKillTest : public testing::FolderTest {
 protected:
  // Runs the victim until it has reported `events` events and a little longer, kills it, and
  // returns all it reported.
  std::vector<Event> RunAndKill(int seed, int events, int spin) {
    int ends[2];
    EXPECT_EQ(::pipe(ends), 0);
    const pid_t child = ::fork();
    if (child == 0) {
      ::close(ends[0]);
      ::setenv(kRootVariable, root_.c_str(), 1);
      ::setenv(kPipeVariable, std::to_string(ends[1]).c_str(), 1);
      ::setenv(kSeedVariable, std::to_string(seed).c_str(), 1);
      ::execl("/proc/self/exe", "crash_test", "--gtest_filter=CrashTest.DISABLED_Victim",
              "--gtest_also_run_disabled_tests", "--gtest_brief=1", nullptr);
      ::_exit(127);
    }
    ::close(ends[1]);
    std::vector<Event> reported;
    Event event;
    while (static_cast<int>(reported.size()) < events &&
           ::read(ends[0], &event, sizeof(event)) == sizeof(event)) {
      reported.push_back(event);
    }
    volatile unsigned work = 0;
    for (int i = 0; i < spin; ++i)
      work = work + 1;  // lands the signal somewhere inside the next change
    ::kill(child, SIGKILL);
    while (::read(ends[0], &event, sizeof(event)) == sizeof(event)) reported.push_back(event);
    ::close(ends[0]);
    int status = 0;
    EXPECT_EQ(::waitpid(child, &status, 0), child);
    EXPECT_TRUE(WIFSIGNALED(status)) << "the victim ended by itself";
    return reported;
  }
};

TEST_F(CrashKillTest, WhatWasPublishedSurvivesAndNothingIsPartial) {
  std::mt19937 random(3);
  std::set<uint64_t> expected;   // reported as published, not deleted
  std::set<uint64_t> uncertain;  // a deletion had begun
  std::set<uint64_t> defaults;   // the reported one, and one that a cut-off change may have set
  for (int round = 0; round < 12; ++round) {
    for (const Event& event : RunAndKill(round, 1 + random() % 12, random() % 20000000)) {
      switch (event.kind) {
        case Event::kPublished:
          expected.insert(event.version);
          break;
        case Event::kMovingDefault:
          defaults.insert(event.version);
          break;
        case Event::kDefault:
          defaults = {event.version};
          break;
        case Event::kDeleting:
          expected.erase(event.version);
          uncertain.insert(event.version);
          break;
        case Event::kDeleted:
          uncertain.erase(event.version);
          break;
      }
    }
    auto repository = Repository::Open(Options(root_));
    ASSERT_TRUE(repository.ok()) << repository.status();
    EXPECT_THAT(Leftovers(), IsEmpty());
    std::set<uint64_t> present;
    for (const VersionInfo& info : (*repository)->List("m")) {
      present.insert(info.version);
      EXPECT_EQ(info.state, State::kReady) << "version " << info.version << ": " << info.reason;
    }
    for (uint64_t version : expected) {
      EXPECT_EQ(present.count(version), 1u)
          << "round " << round << ": version " << version << " is lost";
    }
    // At most one publication was cut off after its rename.
    int extra = 0;
    for (uint64_t version : present)
      extra += expected.count(version) == 0 && uncertain.count(version) == 0;
    EXPECT_LE(extra, 1) << "round " << round;
    const auto now = (*repository)->Info("m", 0);
    if (!expected.empty()) {
      ASSERT_TRUE(now.ok()) << now.status();
      EXPECT_EQ(defaults.count(now->version), 1u)
          << "round " << round << ": default " << now->version;
      EXPECT_TRUE((*repository)->Acquire("m", 0).ok());
    }
    // The next round begins with what is really there.
    expected = present;
    uncertain.clear();
    defaults.clear();
    if (now.ok()) defaults.insert(now->version);
  }
  EXPECT_FALSE(expected.empty());
}

}  // namespace
}  // namespace tern::repository
