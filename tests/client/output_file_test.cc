#include "client/output_file.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <sys/stat.h>

#include <csignal>
#include <filesystem>
#include <thread>

#include "tests/client/folder.h"

namespace tern::client {
namespace {

namespace fs = std::filesystem;

size_t Entries(const Folder& folder) {
  return std::distance(fs::directory_iterator(folder.path()), fs::directory_iterator());
}

TEST(OutputFileTest, TheTargetChangesWhenTheFileIsKept) {
  const Folder folder;
  const std::string path = folder.Write("a", "old");
  {
    const auto file = OutputFile::Open(path);
    ASSERT_TRUE(file.ok()) << file.status();
    (*file)->stream() << "new";
    EXPECT_EQ(folder.Read("a"), "old");
    ASSERT_TRUE((*file)->Keep().ok());
    EXPECT_EQ(folder.Read("a"), "new");
  }
  {
    const auto file = OutputFile::Open(path);
    (*file)->stream() << "half";
  }
  EXPECT_EQ(folder.Read("a"), "new");
  EXPECT_EQ(Entries(folder), 1u);
}

TEST(OutputFileTest, LinksAreFollowedAlsoToWhereNothingIs) {
  const Folder folder;
  folder.Write("target", "old");
  fs::create_symlink("target", folder.At("link"));
  fs::create_symlink(folder.At("link"), folder.At("link-to-link"));
  fs::create_symlink("new", folder.At("dangling"));
  ASSERT_TRUE(WriteFile(folder.At("link-to-link"), "text").ok());
  EXPECT_EQ(folder.Read("target"), "text");
  ASSERT_TRUE(WriteFile(folder.At("dangling"), "more").ok());
  EXPECT_EQ(folder.Read("new"), "more");
  for (const char* link : {"link", "link-to-link", "dangling"}) {
    EXPECT_TRUE(fs::is_symlink(folder.At(link))) << link;
  }
}

TEST(OutputFileTest, APipeIsWrittenAndStaysAPipe) {
  const Folder folder;
  ASSERT_EQ(::mkfifo(folder.At("pipe").c_str(), 0600), 0);
  fs::create_symlink("pipe", folder.At("link"));
  std::string got;
  std::thread reader([&] { got = folder.Read("pipe"); });
  EXPECT_TRUE(WriteFile(folder.At("link"), "text").ok());
  // Where it was replaced, the reader would wait for ever.
  if (!fs::is_fifo(folder.At("pipe"))) std::abort();
  reader.join();
  EXPECT_EQ(got, "text");
  EXPECT_TRUE(fs::is_fifo(folder.At("pipe")));
  EXPECT_EQ(Entries(folder), 2u);
}

TEST(OutputFileTest, WhatCannotBeWrittenIsNamed) {
  const Folder folder;
  EXPECT_TRUE(absl::IsNotFound(WriteFile(folder.At("no/such/folder"), "")));
  EXPECT_TRUE(absl::IsNotFound(WriteFile(folder.path(), "")));
  fs::create_symlink("b", folder.At("a"));
  fs::create_symlink("a", folder.At("b"));
  EXPECT_FALSE(WriteFile(folder.At("a"), "").ok());
  EXPECT_EQ(Entries(folder), 2u);
}

TEST(OutputFileDeathTest, AnEndBySignalLeavesTheTargetAndNoHalfFile) {
  const Folder folder;
  const std::string path = folder.Write("a", "old");
  for (const int signal : {SIGINT, SIGTERM, SIGHUP}) {
    EXPECT_EXIT(
        {
          const auto file = OutputFile::Open(path);
          (*file)->stream() << "half" << std::flush;
          if (Entries(folder) == 2) ::raise(signal);
        },
        testing::KilledBySignal(signal), "");
    EXPECT_EQ(folder.Read("a"), "old");
    EXPECT_EQ(Entries(folder), 1u);
  }
}

TEST(OutputFileTest, SignalsAreAfterwardsWhatTheyWereAndIgnoredOnesStayIgnored) {
  const Folder folder;
  ::signal(SIGINT, SIG_IGN);
  {
    const auto file = OutputFile::Open(folder.At("a"));
    ::raise(SIGINT);
    EXPECT_TRUE((*file)->Keep().ok());
  }
  EXPECT_EQ(::signal(SIGINT, SIG_DFL), SIG_IGN);
  EXPECT_EQ(::signal(SIGTERM, SIG_DFL), SIG_DFL);
}

}  // namespace
}  // namespace tern::client
