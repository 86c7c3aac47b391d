// Whole runs on a network of three layers and generated images.
#include "server/finetune/job.h"

#include <fcntl.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <signal.h>
#include <stdio.h>
#include <sys/wait.h>
#include <unistd.h>

#include <atomic>

#include "server/artifact/artifact.h"
#include "server/base/file.h"
#include "server/repository/repository.h"
#include "tests/finetune/demo.h"
#include "tests/repository/folder_fixture.h"

namespace tern::finetune {
namespace {

using ::testing::HasSubstr;

class JobTest : public repository::testing::FolderTest {
 protected:
  void SetUp() override { ASSERT_NO_FATAL_FAILURE(MakeJobFiles(root_, 20)); }

  JobOptions Options(const std::string& output = "out.tern") const {
    JobOptions options;
    options.float_model = Path("float.onnx");
    options.start = Path("start.tern");
    options.data = Path("train");
    options.output = Path(output);
    options.held_out = 0.2;
    options.augmentation.crop_padding = 1;
    options.train.epochs = 4;
    options.train.batch = 8;
    options.train.learning_rate = 0.01;
    options.train.scale_rate = 0.02;
    options.train.checkpoint = Path(output + ".checkpoint");
    return options;
  }
  // Stops after `steps` steps in all.
  absl::Status RunAndStop(JobOptions options, int64_t steps) {
    std::atomic<bool> stop{false};
    options.train.stop = &stop;
    int64_t done = 0;
    return RunJob(options,
                  [&](const Progress& p) {
                    if (p.finished == nullptr && ++done == steps) stop = true;
                  })
        .status();
  }
  std::string GraphOf(const std::string& name) const {
    const auto read = artifact::Read(Path(name));
    EXPECT_TRUE(read.ok()) << read.status();
    artifact::Artifact only;
    if (read.ok()) only.graph = read->graph;
    return artifact::Serialize(only);
  }
};

TEST_F(JobTest, TrainingLowersTheLossAndWritesALoadableArtifact) {
  int64_t steps = 0;
  JobOptions options = Options();
  options.train.distil_weight = 0;  // the float network's own answers are not sure ones
  const auto report = RunJob(options, [&](const Progress& p) {
    if (p.finished != nullptr) return;
    ++steps;
    EXPECT_EQ(p.steps, 6);
    EXPECT_GT(p.images_per_second, 0);
  });
  ASSERT_TRUE(report.ok()) << report.status();
  EXPECT_EQ(steps, 4 * 6);
  const v1::FineTuningReport& tuning = report->fine_tuning();
  ASSERT_EQ(tuning.epochs_size(), 5);
  EXPECT_LT(tuning.epochs(4).loss(), 0.7 * tuning.epochs(1).loss());
  EXPECT_EQ(tuning.training_images(), 48u);
  EXPECT_EQ(tuning.held_out_images(), 12u);
  EXPECT_GE(tuning.top1().hits(), tuning.start_top1().hits());

  const auto artifact = artifact::Read(Path("out.tern"));
  ASSERT_TRUE(artifact.ok()) << artifact.status();
  EXPECT_EQ(artifact->labels, (std::vector<std::string>{"red", "green", "blue"}));
  EXPECT_EQ(artifact->report.fine_tuning().best_epoch(), tuning.best_epoch());
  EXPECT_EQ(artifact->report.bytes(), std::filesystem::file_size(Path("out.tern")));
  EXPECT_FALSE(artifact->self_test_input.empty());
  const auto plan = engine::Plan::Create(artifact->graph, {});
  ASSERT_TRUE(plan.ok()) << plan.status();
  EXPECT_TRUE(repository::SelfTest(*artifact, **plan).ok());
}

TEST_F(JobTest, AResumedRunEndsAsAnUninterruptedOne) {
  ASSERT_TRUE(RunJob(Options("whole.tern"), nullptr).ok());
  // In the middle of an epoch, at the end of one, and twice.
  for (const std::vector<int64_t>& stops :
       {std::vector<int64_t>{9}, std::vector<int64_t>{6}, std::vector<int64_t>{2, 11}}) {
    JobOptions options = Options("parts.tern");
    for (int64_t steps : stops) {
      ASSERT_EQ(RunAndStop(options, steps).code(), absl::StatusCode::kCancelled);
      options.train.resume = true;
    }
    const auto report = RunJob(options, nullptr);
    ASSERT_TRUE(report.ok()) << report.status();
    EXPECT_TRUE(GraphOf("parts.tern") == GraphOf("whole.tern")) << stops[0];
  }
}

TEST_F(JobTest, ARunIsNotResumedWithOtherSettings) {
  ASSERT_EQ(RunAndStop(Options(), 3).code(), absl::StatusCode::kCancelled);
  JobOptions options = Options();
  options.train.resume = true;
  options.train.batch = 4;
  options.augmentation.flip = false;
  const absl::Status status = RunJob(options, nullptr).status();
  EXPECT_EQ(status.code(), absl::StatusCode::kFailedPrecondition);
  EXPECT_THAT(std::string(status.message()), HasSubstr("batch was 8, is 4"));
  EXPECT_THAT(std::string(status.message()), HasSubstr("flip was yes, is no"));
  EXPECT_FALSE(Exists("out.tern"));
}

TEST_F(JobTest, DamagedAndMissingCheckpointsAreTold) {
  JobOptions options = Options();
  options.train.resume = true;
  EXPECT_EQ(RunJob(options, nullptr).status().code(), absl::StatusCode::kNotFound);
  ASSERT_EQ(RunAndStop(Options(), 3).code(), absl::StatusCode::kCancelled);
  const std::string whole = Read("out.tern.checkpoint");
  for (size_t at : {size_t{0}, size_t{9}, size_t{40}, whole.size() / 2, whole.size() - 1}) {
    std::string damaged = whole;
    damaged[at] ^= 4;
    Write("out.tern.checkpoint", damaged);
    EXPECT_EQ(RunJob(options, nullptr).status().code(), absl::StatusCode::kDataLoss) << at;
  }
  for (size_t size : {size_t{0}, size_t{10}, whole.size() / 2, whole.size() - 1}) {
    Write("out.tern.checkpoint", whole.substr(0, size));
    EXPECT_EQ(RunJob(options, nullptr).status().code(), absl::StatusCode::kDataLoss) << size;
  }
  Write("out.tern.checkpoint", whole);
  EXPECT_TRUE(RunJob(options, nullptr).ok());
}

TEST_F(JobTest, AStartFromAnotherFloatNetworkIsRefused) {
  auto start = artifact::Read(Path("start.tern"));
  ASSERT_TRUE(start.ok());
  start->source_sha256 = std::string(64, 'a');
  ASSERT_TRUE(artifact::Write(*start, Path("start.tern")).ok());
  const absl::Status status = RunJob(Options(), nullptr).status();
  EXPECT_EQ(status.code(), absl::StatusCode::kInvalidArgument);
  EXPECT_THAT(std::string(status.message()), HasSubstr("another float network"));
}

TEST_F(JobTest, OptionsOutOfRangeAreNamed) {
  const auto message = [&](const std::function<void(JobOptions&)>& change) {
    JobOptions options = Options();
    change(options);
    const absl::Status status = RunJob(options, nullptr).status();
    EXPECT_EQ(status.code(), absl::StatusCode::kInvalidArgument) << status;
    return std::string(status.message());
  };
  EXPECT_THAT(message([](JobOptions& o) { o.train.batch = 0; }), HasSubstr("batch: got 0"));
  EXPECT_THAT(message([](JobOptions& o) { o.train.learning_rate = -1; }), HasSubstr("got -1"));
  EXPECT_THAT(message([](JobOptions& o) { o.train.epochs = 0; }), HasSubstr("epochs"));
  EXPECT_THAT(message([](JobOptions& o) { o.held_out = 1; }), HasSubstr("held-out"));
  EXPECT_THAT(message([](JobOptions& o) { o.held_out = 1e-6; }), HasSubstr("holds none out"));
}

TEST_F(JobTest, UnreadableImagesAreLeftOutAndCounted) {
  Write("train/red/junk.bmp", "junk");
  JobOptions options = Options();
  options.held_out = 0.05;
  options.train.seed = 3;
  const auto report = RunJob(options, nullptr);
  ASSERT_TRUE(report.ok()) << report.status();
  ASSERT_EQ(report->warnings_size(), 1);
  EXPECT_THAT(report->warnings(0), HasSubstr("4 times an image that cannot be read"));
}

TEST_F(JobTest, TheSlowestRateKeepsTheStartVersion) {
  JobOptions options = Options();
  options.train.learning_rate = options.train.scale_rate = 0;
  ASSERT_TRUE(RunJob(options, nullptr).ok());
  EXPECT_TRUE(GraphOf("out.tern") == GraphOf("start.tern"));
}

// The program itself, started and interrupted as from a terminal.
TEST_F(JobTest, InterruptingTheProgramLeavesACheckpointToResumeFrom) {
  for (const bool resume : {false, true}) {
    int fds[2];
    ASSERT_EQ(pipe(fds), 0);
    const pid_t pid = fork();
    ASSERT_GE(pid, 0);
    if (pid == 0) {
      dup2(fds[1], STDERR_FILENO);
      close(fds[0]);
      close(fds[1]);
      const std::string network = Path("float.onnx"), start = Path("start.tern"),
                        data = Path("train"), output = Path("out.tern");
      std::vector<const char*> arguments = {TERN_FINETUNE_PATH,
                                            "--float",
                                            network.c_str(),
                                            "--start",
                                            start.c_str(),
                                            "--data",
                                            data.c_str(),
                                            "--output",
                                            output.c_str(),
                                            "--epochs",
                                            "9999",
                                            "--threads",
                                            "1"};
      if (resume) arguments.push_back("--resume");
      arguments.push_back(nullptr);
      execv(arguments[0], const_cast<char**>(arguments.data()));
      _exit(127);
    }
    close(fds[1]);
    FILE* err = fdopen(fds[0], "r");
    ASSERT_NE(err, nullptr);
    std::string log;
    char line[1000];
    bool interrupted = false;
    while (fgets(line, sizeof(line), err) != nullptr) {
      log += line;
      if (!interrupted && std::string(line).find("of the training images") != std::string::npos) {
        interrupted = true;
        kill(pid, SIGINT);
      }
    }
    fclose(err);
    int status = 0;
    ASSERT_EQ(waitpid(pid, &status, 0), pid);
    EXPECT_TRUE(WIFEXITED(status) && WEXITSTATUS(status) == 128 + SIGINT) << log;
    EXPECT_TRUE(ReadCheckpoint(Path("out.tern.checkpoint")).ok());
    EXPECT_FALSE(Exists("out.tern"));
    EXPECT_EQ(log.find("resumed in epoch") != std::string::npos, resume) << log;
  }
}

}  // namespace
}  // namespace tern::finetune
