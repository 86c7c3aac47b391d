#include "server/base/file.h"

#include <fcntl.h>
#include <gtest/gtest.h>
#include <sys/stat.h>
#include <unistd.h>

#include <atomic>
#include <filesystem>
#include <fstream>
#include <thread>
#include <vector>

namespace tern {
namespace {

namespace fs = std::filesystem;
using absl::StatusCode;

class FileTest : public testing::Test {
 protected:
  void SetUp() override {
    std::string pattern = (fs::temp_directory_path() / "tern_file_XXXXXX").string();
    ASSERT_NE(::mkdtemp(pattern.data()), nullptr);
    folder_ = pattern;
  }
  void TearDown() override { fs::remove_all(folder_); }

  std::string Path(const std::string& name) const { return folder_ + "/" + name; }
  size_t Entries() const {
    return std::distance(fs::directory_iterator(folder_), fs::directory_iterator());
  }
  absl::Status WriteText(const std::string& path, absl::string_view text) {
    return WriteFileAtomically(path, {text});
  }

  std::string folder_;
};

TEST_F(FileTest, WritesThePartsInOrderAndReadsThemBack) {
  const std::string binary("\0\xff\n", 3);
  ASSERT_TRUE(WriteFileAtomically(Path("a"), {"one ", "", binary}).ok());
  EXPECT_EQ(*ReadFile(Path("a")), "one " + binary);
  EXPECT_EQ(Entries(), 1u);
  ASSERT_TRUE(WriteFileAtomically(Path("empty"), {}).ok());
  EXPECT_EQ(*ReadFile(Path("empty")), "");
}

TEST_F(FileTest, ReplacesAnExistingFile) {
  ASSERT_TRUE(WriteText(Path("a"), "a long old content").ok());
  ASSERT_TRUE(WriteText(Path("a"), "new").ok());
  EXPECT_EQ(*ReadFile(Path("a")), "new");
  EXPECT_EQ(Entries(), 1u);
}

TEST_F(FileTest, AFailingRenameLeavesTheTargetAndNoTemporaryFile) {
  // A folder with something in it cannot be renamed over.
  fs::create_directories(Path("target/inside"));
  const absl::Status status = WriteText(Path("target"), "text");
  EXPECT_FALSE(status.ok());
  EXPECT_NE(status.message().find("rename"), std::string::npos) << status;
  EXPECT_TRUE(fs::is_directory(Path("target/inside")));
  EXPECT_EQ(Entries(), 1u);
}

TEST_F(FileTest, AFailingWriteLeavesTheOldContentAndNoTemporaryFile) {
  const absl::Status missing = WriteText(Path("no/such/folder/a"), "x");
  EXPECT_EQ(missing.code(), StatusCode::kNotFound) << missing;
  EXPECT_EQ(Entries(), 0u);
}

TEST_F(FileTest, LeftoversOfAKilledProcessAreSteppedOver) {
  // A server that is always process 1 finds its own former names.
  for (int i = 0; i < 300; ++i) {
    std::ofstream(Path("a") + ".tmp." + std::to_string(::getpid()) + "." + std::to_string(i))
        << "half";
  }
  ASSERT_TRUE(WriteText(Path("a"), "whole").ok());
  EXPECT_EQ(*ReadFile(Path("a")), "whole");
  EXPECT_EQ(Entries(), 301u);
}

TEST_F(FileTest, ReadersNeverSeeAPart) {
  const std::string a(200'000, 'a'), b(300'000, 'b');
  ASSERT_TRUE(WriteText(Path("f"), a).ok());
  std::atomic<bool> stop{false};
  std::atomic<int> bad{0};
  std::thread reader([&] {
    while (!stop) {
      const auto text = ReadFile(Path("f"));
      if (!text.ok() || (*text != a && *text != b)) ++bad;
    }
  });
  std::vector<std::thread> writers;
  for (int t = 0; t < 2; ++t) {
    writers.emplace_back([&, t] {
      for (int i = 0; i < 10; ++i) {
        if (!WriteText(Path("f"), (i + t) % 2 ? a : b).ok()) ++bad;
      }
    });
  }
  for (auto& writer : writers) writer.join();
  stop = true;
  reader.join();
  EXPECT_EQ(bad, 0);
  EXPECT_EQ(Entries(), 1u);
}

TEST_F(FileTest, ReadErrorsSayWhat) {
  EXPECT_EQ(ReadFile(Path("missing")).status().code(), StatusCode::kNotFound);
  EXPECT_EQ(ReadFile(folder_).status().code(), StatusCode::kInvalidArgument);
  ASSERT_TRUE(WriteText(Path("a"), "12345").ok());
  const auto large = ReadFile(Path("a"), 4);
  EXPECT_EQ(large.status().code(), StatusCode::kResourceExhausted);
  EXPECT_NE(large.status().message().find("5 bytes, the limit is 4"), std::string::npos)
      << large.status();
  EXPECT_TRUE(ReadFile(Path("a"), 5).ok());
}

TEST_F(FileTest, APipeIsRefusedInsteadOfWaitedFor) {
  ASSERT_EQ(::mkfifo(Path("pipe").c_str(), 0600), 0);
  EXPECT_EQ(ReadFile(Path("pipe")).status().code(), StatusCode::kInvalidArgument);
}

TEST_F(FileTest, SyncDirectoryNeedsADirectory) {
  EXPECT_TRUE(SyncDirectory(folder_).ok());
  EXPECT_FALSE(SyncDirectory(Path("missing")).ok());
}

// RFC 3720, appendix B.4, and the check value of the CRC catalogue.
TEST(Crc32cTest, HasThePublishedValues) {
  EXPECT_EQ(Crc32c(""), 0u);
  EXPECT_EQ(Crc32c("123456789"), 0xe3069283u);
  EXPECT_EQ(Crc32c(std::string(32, '\0')), 0x8a9136aau);
  EXPECT_EQ(Crc32c(std::string(32, '\xff')), 0x62a8ab43u);
  std::string rising, falling;
  for (int i = 0; i < 32; ++i) {
    rising.push_back(static_cast<char>(i));
    falling.push_back(static_cast<char>(31 - i));
  }
  EXPECT_EQ(Crc32c(rising), 0x46dd794eu);
  EXPECT_EQ(Crc32c(falling), 0x113fdb5cu);
}

// FIPS 180-4 examples.
TEST(Sha256Test, HasThePublishedValues) {
  EXPECT_EQ(Sha256Hex(""), "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855");
  EXPECT_EQ(Sha256Hex("abc"), "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad");
  EXPECT_EQ(Sha256Hex("abcdbcdecdefdefgefghfghighijhijkijkljklmklmnlmnomnopnopq"),
            "248d6a61d20638b8e5c026930c3e6039a33ce45964ff2167f6ecedd419db06c1");
}

}  // namespace
}  // namespace tern
