#include "server/repository/storage.h"

#include <sys/stat.h>
#include <unistd.h>

#include <cstdlib>
#include <thread>

#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "server/base/file.h"
#include "tests/repository/folder_fixture.h"

namespace tern::repository {
namespace {

namespace fs = std::filesystem;
using ::testing::ElementsAre;
using ::testing::HasSubstr;
using ::testing::IsEmpty;

class StorageTest : public testing::FolderTest {};

TEST(ParseVersionTest, TakesPlainPositiveNumbersOnly) {
  EXPECT_EQ(ParseVersion("1"), 1u);
  EXPECT_EQ(ParseVersion("999999999999999999"), 999999999999999999u);
  for (const char* bad : {"", "0", "01", "-1", "+1", "1 ", " 1", "1a", "0x1", "1000000000000000000",
                          "v1", ".", ".."}) {
    EXPECT_FALSE(ParseVersion(bad).has_value()) << bad;
  }
}

TEST_F(StorageTest, ASecondLockOnTheSameFolderIsRefusedUntilTheFirstGoes) {
  {
    const auto first = RootLock::Acquire(Path("new/deep"));
    ASSERT_TRUE(first.ok()) << first.status();
    EXPECT_EQ(RootLock::Acquire(Path("new/deep")).status().code(),
              absl::StatusCode::kFailedPrecondition);
  }
  EXPECT_TRUE(RootLock::Acquire(Path("new/deep")).ok());
}

TEST_F(StorageTest, ALockOnAFileIsRefused) {
  Write("file", "x");
  EXPECT_FALSE(RootLock::Acquire(Path("file")).ok());
}

TEST_F(StorageTest, AnUnpublishedTemporaryFolderVanishes) {
  {
    auto temp = TempFolder::Create(root_);
    ASSERT_TRUE(temp.ok());
    ASSERT_TRUE(MakeFolder(temp->path() + "/inside").ok());
    EXPECT_EQ(Leftovers().size(), 1u);
  }
  EXPECT_THAT(Leftovers(), IsEmpty());
}

TEST_F(StorageTest, PublishMovesTheWholeFolder) {
  auto temp = TempFolder::Create(root_);
  ASSERT_TRUE(temp.ok());
  std::ofstream(temp->path() + "/file") << "content";
  ASSERT_TRUE(temp->Publish(Path("7")).ok());
  EXPECT_EQ(Read("7/file"), "content");
  EXPECT_THAT(Leftovers(), IsEmpty());
}

TEST_F(StorageTest, PublishNeverReplacesEvenAnEmptyFolder) {
  ASSERT_TRUE(MakeFolder(Path("7")).ok());
  auto temp = TempFolder::Create(root_);
  ASSERT_TRUE(temp.ok());
  EXPECT_EQ(temp->Publish(Path("7")).code(), absl::StatusCode::kAlreadyExists);
}

TEST_F(StorageTest, RemoveFolderTakesEverythingAndToleratesAbsence) {
  Write("7/a/b", "x");
  ASSERT_TRUE(RemoveFolder(Path("7")).ok());
  EXPECT_FALSE(Exists("7"));
  EXPECT_THAT(Leftovers(), IsEmpty());
  EXPECT_TRUE(RemoveFolder(Path("7")).ok());
}

TEST_F(StorageTest, AFolderThatIsGoneWithWhatWasAroundItIsNotRemoved) {
  const absl::Status status = RemoveFolder(Path("model/7"));
  EXPECT_EQ(status.code(), absl::StatusCode::kFailedPrecondition);
  EXPECT_THAT(std::string(status.message()), HasSubstr(Path("model")));
}

TEST_F(StorageTest, RemovingALinkLeavesItsTargetAlone) {
  Write("elsewhere/file", "keep");
  fs::create_directory_symlink(Path("elsewhere"), Path("7"));
  ASSERT_TRUE(RemoveFolder(Path("7")).ok());
  EXPECT_FALSE(Exists("7"));
  EXPECT_EQ(Read("elsewhere/file"), "keep");
}

TEST_F(StorageTest, CleanUpRemovesOnlyWhatTheRepositoryLeft) {
  Write(".tmp-1-0/1/model.onnx", "half");
  Write(".trash-1-0/1/model.onnx", "gone");
  Write("default.tmp.12.0", "3");
  Write("default", "2");
  Write(".hidden/file", "not ours");
  Write("1/model.onnx", "whole");
  CleanUp(root_);
  EXPECT_FALSE(Exists(".tmp-1-0"));
  EXPECT_FALSE(Exists(".trash-1-0"));
  EXPECT_FALSE(Exists("default.tmp.12.0"));
  EXPECT_TRUE(Exists("default"));
  EXPECT_TRUE(Exists(".hidden/file"));
  EXPECT_TRUE(Exists("1/model.onnx"));
}

TEST_F(StorageTest, VersionsAreSortedAsNumbers) {
  for (const char* name : {"10", "9", "2", "latest", ".tmp-1", "007"})
    ASSERT_TRUE(MakeFolder(Path(name)).ok());
  EXPECT_THAT(VersionsOnDisk(root_), ElementsAre(2, 9, 10));
  EXPECT_THAT(VersionsOnDisk(Path("absent")), IsEmpty());
}

TEST_F(StorageTest, BesideAVersionAreOtherFoldersAndWhateverIsNamedAsOne) {
  for (const char* name : {"1", "10", "v3.part", ".snapshot", ".tmp-1-0", ".trash-1-0"})
    ASSERT_TRUE(MakeFolder(Path(name)).ok());
  for (const char* name : {"config.textproto", "default", "2"}) Write(name, "a file");
  fs::create_directory_symlink(Path("1"), Path("4"));
  fs::create_directory_symlink(Path("1"), Path("latest"));
  EXPECT_THAT(*FoldersBeside(root_, 1), ElementsAre(".snapshot", "10", "2", "4", "v3.part"));
  EXPECT_THAT(*FoldersBeside(Path("absent"), 1), IsEmpty());
  EXPECT_FALSE(FoldersBeside(Path("default"), 1).ok());
}

TEST_F(StorageTest, FindsTheOneNetworkOfAVersion) {
  Write("1/model.onnx", "12345");
  Write("2/model.tern", "123");
  const auto onnx = FindVersionFile(Path("1"), 100);
  ASSERT_TRUE(onnx.ok()) << onnx.status();
  EXPECT_FALSE(onnx->quantized);
  EXPECT_EQ(onnx->bytes, 5u);
  EXPECT_EQ(onnx->path, Path("1/model.onnx"));
  EXPECT_TRUE(FindVersionFile(Path("2"), 100)->quantized);
}

TEST_F(StorageTest, SaysWhyAVersionHasNoUsableFile) {
  Write("both/model.onnx", "1");
  Write("both/model.tern", "1");
  Write("big/model.onnx", std::string(101, 'x'));
  Write("plain", "a file");
  Write("elsewhere/model.onnx", "1");
  ASSERT_TRUE(MakeFolder(Path("empty")).ok());
  fs::create_directory_symlink(Path("elsewhere"), Path("linked_folder"));
  ASSERT_TRUE(MakeFolder(Path("linked_file")).ok());
  fs::create_symlink(Path("elsewhere/model.onnx"), Path("linked_file/model.onnx"));
  ASSERT_TRUE(MakeFolder(Path("pipe")).ok());
  ASSERT_EQ(::mkfifo(Path("pipe/model.tern").c_str(), 0644), 0);
  const auto code = [&](const char* folder) {
    return FindVersionFile(Path(folder), 100).status().code();
  };
  EXPECT_EQ(code("both"), absl::StatusCode::kFailedPrecondition);
  EXPECT_EQ(code("big"), absl::StatusCode::kResourceExhausted);
  EXPECT_EQ(code("plain"), absl::StatusCode::kInvalidArgument);
  EXPECT_EQ(code("empty"), absl::StatusCode::kNotFound);
  EXPECT_EQ(code("absent"), absl::StatusCode::kNotFound);
  EXPECT_EQ(code("linked_folder"), absl::StatusCode::kInvalidArgument);
  EXPECT_EQ(code("linked_file"), absl::StatusCode::kInvalidArgument);
  EXPECT_EQ(code("pipe"), absl::StatusCode::kInvalidArgument);  // opening it would block for ever
}

TEST_F(StorageTest, ConfigErrorsNameLineAndField) {
  Write("config.textproto", "preprocessing { scale: 1 }\nnonsense: 3\n");
  const absl::Status status = ReadConfig(root_).status();
  EXPECT_EQ(status.code(), absl::StatusCode::kInvalidArgument);
  EXPECT_THAT(std::string(status.message()), HasSubstr("line 2"));
  EXPECT_THAT(std::string(status.message()), HasSubstr("nonsense"));
  Write("config.textproto", "batching { max_queue: 4000000000 }");
  EXPECT_THAT(std::string(ReadConfig(root_).status().message()),
              HasSubstr("batching.max_queue: got 4000000000"));
  Write("config.textproto", "");
  EXPECT_TRUE(ReadConfig(root_).ok());
  fs::remove(Path("config.textproto"));
  EXPECT_EQ(ReadConfig(root_).status().code(), absl::StatusCode::kNotFound);
}

TEST(ValidateConfigTest, LabelsFileStaysInsideTheModelsFolder) {
  v1::ModelConfig config;
  for (const char* bad : {"../labels.txt", "/etc/passwd", "sub/labels.txt", "..", ".hidden"}) {
    config.set_labels_file(bad);
    EXPECT_EQ(ValidateConfig(config).code(), absl::StatusCode::kInvalidArgument) << bad;
  }
  config.set_labels_file(std::string("a\0b", 3));
  EXPECT_FALSE(ValidateConfig(config).ok());
  config.set_labels_file("labels.txt");
  EXPECT_TRUE(ValidateConfig(config).ok());
}

TEST_F(StorageTest, ReadsLabelsAndChecksTheirNumber) {
  Write("names", "cat\ndog\n");
  v1::ModelConfig config;
  EXPECT_THAT(*ReadLabels(root_, config, 2), IsEmpty());
  config.set_labels_file("names");
  EXPECT_THAT(*ReadLabels(root_, config, 2), ElementsAre("cat", "dog"));
  EXPECT_EQ(ReadLabels(root_, config, 3).status().code(), absl::StatusCode::kInvalidArgument);
  config.set_labels_file("absent");
  EXPECT_EQ(ReadLabels(root_, config, 2).status().code(), absl::StatusCode::kNotFound);
}

TEST_F(StorageTest, TheDefaultPointerRoundTripsAndDamageIsSeen) {
  EXPECT_EQ(ReadDefault(root_).status().code(), absl::StatusCode::kNotFound);
  ASSERT_TRUE(WriteDefault(root_, 42).ok());
  EXPECT_EQ(*ReadDefault(root_), 42u);
  for (const char* bad : {"", "x", "0", "4 2", "-1"}) {
    Write("default", bad);
    EXPECT_EQ(ReadDefault(root_).status().code(), absl::StatusCode::kDataLoss) << bad;
  }
}

TEST_F(StorageTest, ADefaultPointerThatIsALinkOrAPipeIsReplaced) {
  Write("elsewhere", "keep");
  fs::create_symlink(Path("elsewhere"), Path("default"));
  ASSERT_TRUE(WriteDefault(root_, 2).ok());
  EXPECT_EQ(Read("elsewhere"), "keep");
  EXPECT_EQ(*ReadDefault(root_), 2u);
  fs::remove(Path("default"));
  ASSERT_EQ(::mkfifo(Path("default").c_str(), 0644), 0);
  ASSERT_TRUE(WriteDefault(root_, 3).ok());  // opening it would block for ever
  EXPECT_EQ(*ReadDefault(root_), 3u);
}

TEST_F(StorageTest, AFileOfTheUsersChoiceIsWrittenThroughLinksAndIntoPipes) {
  Write("target", "old");
  fs::create_symlink("target", Path("link"));
  fs::create_symlink("new", Path("dangling"));
  ASSERT_TRUE(WriteFileAtomically(Path("link"), {"te", "xt"}).ok());
  ASSERT_TRUE(WriteFileAtomically(Path("dangling"), {"more"}).ok());
  EXPECT_EQ(Read("target"), "text");
  EXPECT_EQ(Read("new"), "more");
  EXPECT_TRUE(fs::is_symlink(Path("link")));
  EXPECT_TRUE(fs::is_symlink(Path("dangling")));
  ASSERT_EQ(::mkfifo(Path("pipe").c_str(), 0644), 0);
  std::string got;
  std::thread reader([&] { got = Read("pipe"); });
  ASSERT_TRUE(WriteFileAtomically(Path("pipe"), {"te", "xt"}).ok());
  // Where it was replaced, the reader would wait for ever.
  if (!fs::is_fifo(Path("pipe"))) std::abort();
  reader.join();
  EXPECT_EQ(got, "text");
  EXPECT_THAT(Leftovers(), IsEmpty());
  fs::create_symlink("circle", Path("circle"));
  EXPECT_FALSE(WriteFileAtomically(Path("circle"), {"x"}).ok());
}

}  // namespace
}  // namespace tern::repository
