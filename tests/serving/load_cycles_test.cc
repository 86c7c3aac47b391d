// Memory, descriptors, threads and metrics return after versions leave, however often they come.
#include <unistd.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <future>
#include <iterator>
#include <string>

#include "server/base/allocator.h"
#include "server/serving/shadow.h"
#include "tests/serving/server_fixture.h"

namespace tern::serving {
namespace {

struct Usage {
  double resident_mib = 0;
  long descriptors = 0;
  long threads = 0;
  long series = 0;
};

class LoadCyclesTest : public testing::PipelineTest {
 protected:
  Usage Now() {
    ReturnFreedMemory();
    Usage usage;
    uint64_t total = 0, resident = 0;
    std::ifstream("/proc/self/statm") >> total >> resident;
    usage.resident_mib = static_cast<double>(resident) * sysconf(_SC_PAGESIZE) / (1 << 20);
    const auto count = [](const char* folder) {
      return static_cast<long>(std::distance(std::filesystem::directory_iterator(folder), {}));
    };
    usage.descriptors = count("/proc/self/fd");
    usage.threads = count("/proc/self/task");
    const std::string text = metrics_.Render();
    usage.series = std::count(text.begin(), text.end(), '\n');
    return usage;
  }
  void Ask(uint64_t version) {
    ClassifyInput input;
    input.image = testing::SolidBmp(8, 8, 255, 0, 0);
    input.request_id = "the same one";
    std::promise<absl::Status> answered;
    classifier_->Classify(
        "tiny", version, std::move(input),
        [&](absl::StatusOr<ClassifyOutput> output) { answered.set_value(output.status()); });
    const absl::Status status = answered.get_future().get();
    ASSERT_TRUE(status.ok()) << status;
  }
};

// TERN_LOAD_CYCLES: how many, 1000 unless set. Each is a new version that is published, asked,
// unloaded, loaded, asked and deleted, under a number that was never used before.
TEST_F(LoadCyclesTest, NothingGrows) {
  const char* set = std::getenv("TERN_LOAD_CYCLES");
  const int cycles = set != nullptr ? std::atoi(set) : 1000;
  Usage early;
  for (int cycle = 0; cycle < cycles; ++cycle) {
    // Caches (oneDNN's kernels, the allocator's arenas, removed versions' names) are full by then.
    if (cycle == cycles / 2) early = Now();
    const auto info = repository_->Import("tiny", testing::TinyOnnx(), testing::TinyPreprocessing(),
                                          {"red", "green", "blue"}, false);
    ASSERT_TRUE(info.ok()) << info.status();
    Ask(info->version);
    ASSERT_TRUE(repository_->Unload("tiny", info->version).ok());
    ASSERT_TRUE(repository_->Load("tiny", info->version).ok());
    Ask(info->version);
    ASSERT_TRUE(repository_->Delete("tiny", info->version).ok());
    if ((cycle + 1) % std::max(1, cycles / 20) == 0) {
      const Usage now = Now();
      std::printf("cycle %6d: resident %.1f MiB, %ld descriptors, %ld threads, %ld series\n",
                  cycle + 1, now.resident_mib, now.descriptors, now.threads, now.series);
    }
  }
  const Usage late = Now();
  // Two per cent are the allocator's to play with.
  EXPECT_LT(late.resident_mib, early.resident_mib * 1.02 + 1);
  EXPECT_LE(late.descriptors, early.descriptors);
  EXPECT_LE(late.threads, early.threads + 1);  // one may be about to end
  EXPECT_LE(late.series, early.series);
}

}  // namespace
}  // namespace tern::serving
