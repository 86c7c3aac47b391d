#include "server/finetune/data.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <set>

#include "tests/image/encode_jpeg.h"
#include "tests/repository/folder_fixture.h"
#include "tests/serving/tiny_model.h"

namespace tern::finetune {
namespace {

using ::testing::ElementsAre;
using ::testing::HasSubstr;
using ::testing::SizeIs;

class DataTest : public repository::testing::FolderTest {
 protected:
  std::vector<int64_t> LabelsOf(const std::vector<std::string>& labels, int offset = 0) const {
    std::vector<int64_t> found;
    const auto images = ListLabelledImages(root_, labels, 3, offset);
    EXPECT_TRUE(images.ok()) << images.status();
    if (!images.ok()) return found;
    for (const LabelledImage& image : *images) found.push_back(image.label);
    return found;
  }
};

TEST_F(DataTest, SubFoldersNamedByTheLabelsAreThoseClasses) {
  Write("cat/a.jpg", "");
  Write("dog/deep/b.PNG", "");
  Write("dog/c.webp", "");
  Write("dog/notes.txt", "");
  Write("dog/.hidden.jpg", "");
  Write(".cache/d.jpg", "");
  EXPECT_THAT(LabelsOf({"dog", "bird", "cat"}), ElementsAre(0, 0, 2));
  EXPECT_THAT(LabelsOf({}), ElementsAre(0, 1, 1));
  EXPECT_THAT(LabelsOf({"x", "y", "z"}, 1), ElementsAre(1, 2, 2));
}

TEST_F(DataTest, FoldersThatFitNoModelAreRefused) {
  Write("cat/a.jpg", "");
  Write("dog/b.jpg", "");
  const auto code = [&](const std::vector<std::string>& labels, int64_t classes, int offset) {
    return ListLabelledImages(root_, labels, classes, offset).status().code();
  };
  EXPECT_EQ(code({"cat", "bird"}, 2, 0), absl::StatusCode::kInvalidArgument);  // dog is none
  EXPECT_EQ(code({}, 1, 0), absl::StatusCode::kInvalidArgument);
  EXPECT_EQ(code({}, 2, 1), absl::StatusCode::kInvalidArgument);
  EXPECT_EQ(ListLabelledImages(Path("none"), {}, 2, 0).status().code(),
            absl::StatusCode::kNotFound);
  std::filesystem::remove(Path("cat/a.jpg"));
  std::filesystem::remove(Path("dog/b.jpg"));
  EXPECT_EQ(code({}, 2, 0), absl::StatusCode::kInvalidArgument);  // no images
}

std::vector<LabelledImage> Many() {
  std::vector<LabelledImage> images;
  for (int64_t label = 0; label < 3; ++label) {
    for (int i = 0; i < 40; ++i) {
      images.push_back({std::to_string(label) + "/" + std::to_string(i), label});
    }
  }
  images.push_back({"3/only", 3});
  return images;
}

TEST(SplitTest, HoldsTheSameShareOfEveryClassOutAndNothingTwice) {
  const std::vector<LabelledImage> images = Many();
  const Split split = SplitImages(images, 0.1, 0, 7);
  EXPECT_THAT(split.held_out, SizeIs(12));
  EXPECT_THAT(split.training, SizeIs(109));
  std::set<std::string> seen;
  for (const auto* part : {&split.held_out, &split.training}) {
    for (const LabelledImage& image : *part) EXPECT_TRUE(seen.insert(image.path).second);
  }
  for (int64_t label = 0; label < 3; ++label) {
    EXPECT_EQ(std::count_if(split.held_out.begin(), split.held_out.end(),
                            [&](const auto& image) { return image.label == label; }),
              4);
  }
  EXPECT_EQ(split.held_out, SplitImages(images, 0.1, 0, 7).held_out);
  EXPECT_NE(split.held_out, SplitImages(images, 0.1, 0, 8).held_out);
}

TEST(SplitTest, ALimitTakesClassesInTurnAndLeavesTheHeldOutImages) {
  const Split all = SplitImages(Many(), 0.1, 0, 7);
  const Split few = SplitImages(Many(), 0.1, 10, 7);
  EXPECT_EQ(few.held_out, all.held_out);
  EXPECT_THAT(few.training, SizeIs(10));
  EXPECT_EQ(few.training[3].label, 3);
  EXPECT_EQ(few.training[9].label, 2);
}

TEST(EpochOrderTest, IsAPermutationOfItsOwnForEveryEpoch) {
  std::vector<int64_t> order = EpochOrder(100, 1, 1);
  EXPECT_EQ(order, EpochOrder(100, 1, 1));
  EXPECT_NE(order, EpochOrder(100, 1, 2));
  EXPECT_NE(order, EpochOrder(100, 2, 1));
  std::sort(order.begin(), order.end());
  for (int64_t i = 0; i < 100; ++i) EXPECT_EQ(order[i], i);
}

class LoaderTest : public repository::testing::FolderTest {
 protected:
  LoaderTest() {
    // Pixel (row, column) is red = 10 row + column.
    std::string bmp = testing::SolidBmp(8, 8, 0, 0, 0);
    for (int y = 0; y < 8; ++y) {
      for (int x = 0; x < 8; ++x)
        bmp[54 + (7 - y) * 24 + x * 3 + 2] = static_cast<char>(10 * y + x);
    }
    Write("0/a.bmp", bmp);
    images_ = {{Path("0/a.bmp"), 2}};
    contract_.set_scale(1);
  }
  Loader Make(bool flip, int crop, uint64_t seed = 1) {
    const auto loader = Loader::Create(&images_, contract_, Shape{3, 8, 8},
                                       {.flip = flip, .crop_padding = crop}, seed);
    EXPECT_TRUE(loader.ok()) << loader.status();
    return *loader;
  }
  static float Red(const Batch& batch, int y, int x) { return batch.pixels[(y * 8 + x) * 3]; }

  v1::Preprocessing contract_;
  std::vector<LabelledImage> images_;
};

TEST_F(LoaderTest, EpochZeroLeavesImagesAsTheyAre) {
  const Batch batch = Make(true, 3).Load({0}, 0);
  ASSERT_THAT(batch.labels, ElementsAre(2));
  EXPECT_EQ(Red(batch, 0, 0), 0);
  EXPECT_EQ(Red(batch, 5, 3), 53);
}

TEST_F(LoaderTest, HalfOfTheEpochsMirrorAnImage) {
  const Loader loader = Make(true, 0);
  int mirrored = 0;
  for (int epoch = 1; epoch <= 64; ++epoch) {
    const Batch batch = loader.Load({0}, epoch);
    if (Red(batch, 5, 0) == 57) {
      ++mirrored;
      EXPECT_EQ(Red(batch, 5, 7), 50);
    } else {
      EXPECT_EQ(Red(batch, 5, 0), 50);
    }
  }
  EXPECT_GT(mirrored, 16);
  EXPECT_LT(mirrored, 48);
}

TEST_F(LoaderTest, CropsMoveAndReflectAtTheBorder) {
  const Loader loader = Make(false, 2);
  std::set<std::pair<int, int>> moves;
  for (int epoch = 1; epoch <= 200; ++epoch) {
    const Batch batch = loader.Load({0}, epoch);
    const int centre = static_cast<int>(Red(batch, 4, 4));  // away from any border
    const int down = centre / 10 - 4, right = centre % 10 - 4;
    moves.insert({down, right});
    const auto reflected = [](int i) { return i < 0 ? -i : i > 7 ? 14 - i : i; };
    for (int y : {0, 7}) {
      for (int x : {0, 7}) {
        EXPECT_EQ(Red(batch, y, x), 10 * reflected(y + down) + reflected(x + right));
      }
    }
  }
  EXPECT_THAT(moves, SizeIs(25));
}

TEST_F(LoaderTest, AugmentationDependsOnSeedEpochAndImageOnly) {
  const Loader a = Make(true, 3), b = Make(true, 3), other = Make(true, 3, 2);
  int different = 0;
  for (int epoch = 1; epoch <= 20; ++epoch) {
    EXPECT_EQ(a.Load({0}, epoch).pixels, b.Load({0}, epoch).pixels);
    different += a.Load({0}, epoch).pixels != other.Load({0}, epoch).pixels;
  }
  EXPECT_GT(different, 10);
}

TEST_F(LoaderTest, AJpegIsReducedWhereTheContractSaysSo) {
  Write("0/stripes.jpg", image::testing::StripedJpeg());
  images_ = {{Path("0/stripes.jpg"), 0}};
  contract_.set_resize(v1::Preprocessing::EXACT);
  contract_.set_filter(v1::Preprocessing::BILINEAR);
  for (const bool scaling : {false, true}) {
    contract_.set_jpeg_scaling(scaling);
    const Batch batch = Make(false, 0).Load({0}, 0);
    ASSERT_THAT(batch.labels, SizeIs(1));
    EXPECT_NEAR(Red(batch, 4, 4), scaling ? 64 : 255, 4);
  }
}

TEST_F(LoaderTest, UnreadableImagesAreLeftOutAndNamed) {
  Write("0/b.bmp", "junk");
  images_ = {{Path("0/b.bmp"), 0}, {Path("0/a.bmp"), 1}, {Path("0/none.bmp"), 2}};
  const Batch batch = Make(false, 0).Load({0, 1, 2}, 0);
  EXPECT_THAT(batch.labels, ElementsAre(1));
  EXPECT_THAT(batch.pixels, SizeIs(8 * 8 * 3));
  ASSERT_THAT(batch.unreadable, SizeIs(2));
  EXPECT_THAT(batch.unreadable[0], HasSubstr("b.bmp"));
}

TEST_F(LoaderTest, APaddingAsWideAsTheImageIsRefused) {
  EXPECT_EQ(
      Loader::Create(&images_, contract_, Shape{3, 8, 8}, {.crop_padding = 8}, 1).status().code(),
      absl::StatusCode::kInvalidArgument);
}

}  // namespace
}  // namespace tern::finetune
