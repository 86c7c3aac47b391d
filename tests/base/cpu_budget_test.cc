#include "server/base/cpu_budget.h"

#include <gtest/gtest.h>
#include <unistd.h>

#include <filesystem>
#include <fstream>
#include <string>

namespace tern {
namespace {

namespace fs = std::filesystem;

// A folder that plays the file system's root.
class CpuBudgetTest : public testing::Test {
 protected:
  void SetUp() override {
    std::string pattern = (fs::temp_directory_path() / "tern_cpu_XXXXXX").string();
    ASSERT_NE(::mkdtemp(pattern.data()), nullptr);
    root_ = pattern;
    affinity_ = ReadCpuBudget(root_).affinity;
  }
  void TearDown() override { fs::remove_all(root_); }

  void Put(const std::string& path, const std::string& text) {
    fs::create_directories(fs::path(root_ + path).parent_path());
    std::ofstream(root_ + path) << text;
  }

  std::string root_;
  int affinity_ = 0;
};

TEST_F(CpuBudgetTest, WithoutCgroupsTheAffinityCounts) {
  const CpuBudget budget = ReadCpuBudget(root_);
  EXPECT_GE(budget.affinity, 1);
  EXPECT_EQ(budget.threads, budget.affinity);
  EXPECT_EQ(budget.quota_cpus, 0);
  EXPECT_NE(budget.ToString().find("no cgroup quota"), std::string::npos) << budget.ToString();
}

TEST_F(CpuBudgetTest, AV2QuotaRoundsDownButNotBelowOne) {
  Put("/proc/self/cgroup", "0::/\n");
  Put("/sys/fs/cgroup/cpu.max", "50000 100000\n");
  CpuBudget budget = ReadCpuBudget(root_);
  EXPECT_DOUBLE_EQ(budget.quota_cpus, 0.5);
  EXPECT_EQ(budget.threads, 1);
  EXPECT_EQ(budget.ToString(),
            "1 thread (affinity " + std::to_string(affinity_) + ", cgroup quota 0.50)");
  Put("/sys/fs/cgroup/cpu.max", "190000 100000\n");
  EXPECT_EQ(ReadCpuBudget(root_).threads, 1);
}

TEST_F(CpuBudgetTest, AQuotaAboveTheAffinityDoesNotRaiseTheBudget) {
  Put("/proc/self/cgroup", "0::/\n");
  Put("/sys/fs/cgroup/cpu.max", "100000000 100000\n");
  const CpuBudget budget = ReadCpuBudget(root_);
  EXPECT_DOUBLE_EQ(budget.quota_cpus, 1000);
  EXPECT_EQ(budget.threads, affinity_);
}

TEST_F(CpuBudgetTest, TheTightestV2AncestorCounts) {
  Put("/proc/self/cgroup", "0::/kubepods/pod1/server\n");
  Put("/sys/fs/cgroup/kubepods/pod1/server/cpu.max", "max 100000\n");
  Put("/sys/fs/cgroup/kubepods/pod1/cpu.max", "75000 50000\n");
  Put("/sys/fs/cgroup/kubepods/cpu.max", "800000 100000\n");
  EXPECT_DOUBLE_EQ(ReadCpuBudget(root_).quota_cpus, 1.5);
}

TEST_F(CpuBudgetTest, InsideAContainerOnlyTheRootOfTheMountIsThere) {
  Put("/proc/self/cgroup", "0::/host/path/that/is/not/mounted\n");
  Put("/sys/fs/cgroup/cpu.max", "100000 100000\n");
  EXPECT_DOUBLE_EQ(ReadCpuBudget(root_).quota_cpus, 1);
}

TEST_F(CpuBudgetTest, V1QuotasAreFoundUnderBothMountNames) {
  Put("/proc/self/cgroup", "4:memory:/\n2:cpu,cpuacct:/docker/abc\n1:name=systemd:/\n0::/\n");
  for (const char* mount : {"/sys/fs/cgroup/cpu", "/sys/fs/cgroup/cpu,cpuacct"}) {
    Put(std::string(mount) + "/docker/abc/cpu.cfs_quota_us", "250000\n");
    Put(std::string(mount) + "/docker/abc/cpu.cfs_period_us", "100000\n");
    EXPECT_DOUBLE_EQ(ReadCpuBudget(root_).quota_cpus, 2.5) << mount;
    fs::remove_all(root_ + mount);
    Put(std::string(mount) + "/cpu.cfs_quota_us", "150000\n");
    Put(std::string(mount) + "/cpu.cfs_period_us", "100000\n");
    EXPECT_DOUBLE_EQ(ReadCpuBudget(root_).quota_cpus, 1.5) << mount;
    fs::remove_all(root_ + mount);
  }
}

TEST_F(CpuBudgetTest, AnUnlimitedV1GroupDoesNotLimit) {
  Put("/proc/self/cgroup", "2:cpu:/\n");
  Put("/sys/fs/cgroup/cpu/cpu.cfs_quota_us", "-1\n");
  Put("/sys/fs/cgroup/cpu/cpu.cfs_period_us", "100000\n");
  EXPECT_EQ(ReadCpuBudget(root_).quota_cpus, 0);
}

TEST_F(CpuBudgetTest, NonsenseDoesNotLimit) {
  for (const char* text : {"", "max", "abc def", "0 100000", "-5 100000", "100000 0", "100000"}) {
    Put("/proc/self/cgroup", "0::no/leading/slash\nnonsense\n:\n");
    Put("/sys/fs/cgroup/cpu.max", text);
    EXPECT_EQ(ReadCpuBudget(root_).quota_cpus, 0) << text;
  }
}

TEST_F(CpuBudgetTest, ThrottlingComesFromTheOwnGroupInBothVersions) {
  EXPECT_EQ(ReadCpuThrottling(root_).periods, 0);
  Put("/sys/fs/cgroup/cpu/cpu.stat", "nr_periods 9\nnr_throttled 4\nthrottled_time 1500000000\n");
  CpuThrottling throttling = ReadCpuThrottling(root_);
  EXPECT_EQ(throttling.periods, 9);
  EXPECT_EQ(throttling.throttled_periods, 4);
  EXPECT_DOUBLE_EQ(throttling.throttled_seconds, 1.5);
  Put("/proc/self/cgroup", "0::/a\n");
  Put("/sys/fs/cgroup/a/cpu.stat",
      "usage_usec 1\nnr_periods 10\nnr_throttled 7\nthrottled_usec 2500000\n");
  throttling = ReadCpuThrottling(root_);
  EXPECT_EQ(throttling.periods, 10);
  EXPECT_EQ(throttling.throttled_periods, 7);
  EXPECT_DOUBLE_EQ(throttling.throttled_seconds, 2.5);
}

TEST(CpuBudgetOfThisMachineTest, IsAtLeastOneThread) {
  const CpuBudget budget = ReadCpuBudget();
  EXPECT_GE(budget.threads, 1);
  EXPECT_LE(budget.threads, budget.affinity);
}

}  // namespace
}  // namespace tern
