#include "client/contract.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "tests/client/folder.h"

namespace tern::client {
namespace {

using testing::ElementsAre;
using testing::HasSubstr;

TEST(ContractTest, NamedContractsAreTorchvisionsTransforms) {
  for (const auto& [name, size] :
       {std::pair{"cifar10", 32u}, std::pair{"imagenet", 256u}, std::pair{"imagenet-299", 342u}}) {
    const auto contract = LoadPreprocessing(name);
    ASSERT_TRUE(contract.ok()) << contract.status();
    EXPECT_EQ(contract->resize(), v1::Preprocessing::SHORTER_SIDE);
    EXPECT_EQ(contract->resize_size(), size);
    EXPECT_EQ(contract->filter(), v1::Preprocessing::BILINEAR_ANTIALIAS);
    EXPECT_EQ(contract->color_order(), v1::Preprocessing::RGB);
    EXPECT_TRUE(contract->center_crop());
    EXPECT_FALSE(contract->ignore_exif_orientation());
    EXPECT_FLOAT_EQ(contract->scale(), 1.0f / 255);
    EXPECT_THAT(contract->mean(), ElementsAre(0.485f, 0.456f, 0.406f));
    EXPECT_THAT(contract->std(), ElementsAre(0.229f, 0.224f, 0.225f));
  }
}

TEST(ContractTest, ReadsATextFile) {
  Folder folder;
  const std::string file = folder.Write("squeezenet.textproto", R"(
      # centre crop 227 of BGR pixels
      color_order: BGR resize: NONE center_crop: true mean: [104, 117, 123])");
  const auto contract = LoadPreprocessing(file);
  ASSERT_TRUE(contract.ok()) << contract.status();
  EXPECT_EQ(contract->color_order(), v1::Preprocessing::BGR);
  EXPECT_THAT(contract->mean(), ElementsAre(104, 117, 123));
}

TEST(ContractTest, MistakesNameTheirPlace) {
  Folder folder;
  const absl::Status unknown = LoadPreprocessing("imagnet").status();
  EXPECT_TRUE(absl::IsNotFound(unknown));
  EXPECT_THAT(unknown.ToString(), HasSubstr("cifar10, imagenet"));
  const absl::Status bad =
      LoadPreprocessing(folder.Write("bad.textproto", "color_order: RGB\nresise: NONE\n")).status();
  EXPECT_TRUE(absl::IsInvalidArgument(bad));
  EXPECT_THAT(bad.ToString(), HasSubstr("bad.textproto:2:"));
}

TEST(LabelsTest, OneNamePerLine) {
  Folder folder;
  EXPECT_THAT(*LoadLabels(folder.Write("a", "cat\ndog, large\n")),
              ElementsAre("cat", "dog, large"));
  EXPECT_THAT(*LoadLabels(folder.Write("b", "cat\r\ndog")), ElementsAre("cat", "dog"));
  const absl::Status empty_line = LoadLabels(folder.Write("c", "cat\n\ndog\n")).status();
  EXPECT_TRUE(absl::IsInvalidArgument(empty_line));
  EXPECT_THAT(empty_line.ToString(), HasSubstr("c:2"));
  EXPECT_TRUE(absl::IsInvalidArgument(LoadLabels(folder.Write("d", "")).status()));
  EXPECT_TRUE(absl::IsNotFound(LoadLabels(folder.At("none")).status()));
}

TEST(ReadFileTest, GivesBytesOrSaysWhy) {
  Folder folder;
  const std::string bytes("\0\xff\n1", 4);
  EXPECT_EQ(*ReadFile(folder.Write("f", bytes)), bytes);
  EXPECT_TRUE(absl::IsResourceExhausted(ReadFile(folder.At("f"), 3).status()));
  EXPECT_TRUE(absl::IsNotFound(ReadFile(folder.At("none")).status()));
  EXPECT_TRUE(absl::IsNotFound(ReadFile(folder.path()).status()));
}

}  // namespace
}  // namespace tern::client
