#include "server/kernels/choices_file.h"

#include <cstdio>
#include <string>

#include "gtest/gtest.h"
#include "server/base/file.h"

namespace tern::kernels {
namespace {

TEST(ChoicesFileTest, IsRefusedWhenDamagedOrOfAnotherVersion) {
  const std::string path = ::testing::TempDir() + "/tern-kernel-choices";
  std::remove(path.c_str());
  EXPECT_EQ(ReadChoices(path, "1.0").code(), absl::StatusCode::kNotFound);
  ASSERT_TRUE(WriteChoices(path, "1.0").ok());
  EXPECT_TRUE(ReadChoices(path, "1.0").ok());
  EXPECT_EQ(ReadChoices(path, "1.1").code(), absl::StatusCode::kFailedPrecondition);
  const std::string whole = *ReadFile(path);
  for (size_t i = 0; i < whole.size(); i += 7) {
    std::string damaged = whole;
    damaged[i] ^= 1;
    ASSERT_TRUE(WriteFileAtomically(path, {damaged}).ok());
    EXPECT_EQ(ReadChoices(path, "1.0").code(), absl::StatusCode::kDataLoss) << i;
  }
  for (size_t bytes : {size_t{0}, size_t{5}, whole.size() - 1}) {
    ASSERT_TRUE(WriteFileAtomically(path, {whole.substr(0, bytes)}).ok());
    EXPECT_EQ(ReadChoices(path, "1.0").code(), absl::StatusCode::kDataLoss) << bytes;
  }
}

}  // namespace
}  // namespace tern::kernels
