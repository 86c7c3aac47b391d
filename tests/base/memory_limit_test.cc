#include "server/base/memory_limit.h"

#include <gtest/gtest.h>
#include <unistd.h>

#include <filesystem>
#include <fstream>
#include <string>

namespace tern {
namespace {

namespace fs = std::filesystem;

// A folder that plays the file system's root, on a machine of 8 GiB.
class MemoryLimitTest : public testing::Test {
 protected:
  void SetUp() override {
    std::string pattern = (fs::temp_directory_path() / "tern_memory_XXXXXX").string();
    ASSERT_NE(::mkdtemp(pattern.data()), nullptr);
    root_ = pattern;
    Put("/proc/meminfo", "MemFree:   100 kB\nHugePages_Total:       0\nMemTotal:  8388608 kB\n");
  }
  void TearDown() override { fs::remove_all(root_); }

  void Put(const std::string& path, const std::string& text) {
    fs::create_directories(fs::path(root_ + path).parent_path());
    std::ofstream(root_ + path) << text;
  }

  std::string root_;
};

constexpr uint64_t kGiB = uint64_t{1} << 30;

TEST_F(MemoryLimitTest, WithoutCgroupsTheMachineLimits) {
  EXPECT_EQ(ReadMemoryLimit(root_), 8 * kGiB);
}

TEST_F(MemoryLimitTest, TheTightestV2AncestorCounts) {
  Put("/proc/self/cgroup", "0::/pods/one\n");
  Put("/sys/fs/cgroup/pods/one/memory.max", "max\n");
  Put("/sys/fs/cgroup/pods/memory.max", "1073741824\n");
  Put("/sys/fs/cgroup/memory.max", "2147483648\n");
  EXPECT_EQ(ReadMemoryLimit(root_), kGiB);
}

TEST_F(MemoryLimitTest, InsideAContainerOnlyTheRootOfTheMountIsThere) {
  Put("/proc/self/cgroup", "0::/host/path/that/is/not/mounted\n");
  Put("/sys/fs/cgroup/memory.max", "2147483648\n");
  EXPECT_EQ(ReadMemoryLimit(root_), 2 * kGiB);
}

TEST_F(MemoryLimitTest, V1LimitsCountAndItsWordForNoneDoesNot) {
  Put("/proc/self/cgroup", "5:memory:/docker/abc\n0::/\n");
  Put("/sys/fs/cgroup/memory/memory.limit_in_bytes", "9223372036854771712\n");
  EXPECT_EQ(ReadMemoryLimit(root_), 8 * kGiB);
  Put("/sys/fs/cgroup/memory/docker/abc/memory.limit_in_bytes", "1073741824\n");
  EXPECT_EQ(ReadMemoryLimit(root_), kGiB);
}

TEST_F(MemoryLimitTest, NonsenseDoesNotLimit) {
  for (const char* text : {"", "0", "-1", "many", "12 13"}) {
    Put("/sys/fs/cgroup/memory.max", text);
    EXPECT_EQ(ReadMemoryLimit(root_), 8 * kGiB) << text;
  }
  fs::remove(root_ + "/proc/meminfo");
  EXPECT_EQ(ReadMemoryLimit(root_), 0u);
}

TEST(MemoryLimitOfThisMachineTest, IsThere) { EXPECT_GT(ReadMemoryLimit(), uint64_t{1} << 24); }

}  // namespace
}  // namespace tern
