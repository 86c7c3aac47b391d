// Our decoding and preprocessing beside torchvision's, on photographs (make_parity.py).
#include <gtest/gtest.h>

#include <cmath>
#include <cstdlib>
#include <cstring>
#include <map>
#include <sstream>
#include <string>
#include <vector>

#include "server/base/file.h"
#include "server/image/image.h"

namespace tern::image {
namespace {

TEST(PreprocessParityTest, DiffersFromTorchvisionByLessThanOneLevelOnPhotographs) {
  const char* folder = std::getenv("TERN_PARITY_FIXTURES");
  if (folder == nullptr) {
    GTEST_SKIP() << "TERN_PARITY_FIXTURES is not set: run tests/interop/preprocess/make_parity.py "
                    "and point it at its "
                    "output";
  }
  const auto index = ReadFile(std::string(folder) + "/index.txt");
  ASSERT_TRUE(index.ok()) << index.status();
  const double deviation[] = {0.229, 0.224, 0.225};
  struct Totals {
    int photographs = 0;
    double sum = 0;    // of the photographs' mean absolute differences, in pixel values 0..1
    double worst = 0;  // the largest of those means
    double worst_pixel = 0;
  };
  std::map<std::string, Totals> totals;
  std::istringstream lines(*index);
  std::string contract_name, file, path;
  int side = 0;
  while (lines >> contract_name >> side >> file && std::getline(lines >> std::ws, path)) {
    SCOPED_TRACE(path + " " + contract_name);
    const auto contract = NamedPreprocessing(contract_name);
    ASSERT_TRUE(contract.ok()) << contract.status();
    const auto bytes = ReadFile(path);
    ASSERT_TRUE(bytes.ok()) << bytes.status();
    const auto image = Decode(*bytes, Limits{}, !contract->ignore_exif_orientation());
    ASSERT_TRUE(image.ok()) << image.status();
    std::vector<float> ours(static_cast<size_t>(side) * side * 3);
    ASSERT_TRUE(Preprocess(*image, *contract, side, side, absl::MakeSpan(ours)).ok());

    const auto raw = ReadFile(std::string(folder) + "/" + file);
    ASSERT_TRUE(raw.ok()) << raw.status();
    ASSERT_EQ(raw->size(), ours.size() * sizeof(float));
    std::vector<float> theirs(ours.size());
    std::memcpy(theirs.data(), raw->data(), raw->size());
    double sum = 0;
    Totals& total = totals[contract_name];
    for (size_t i = 0; i < ours.size(); ++i) {
      const double difference = std::fabs(ours[i] - theirs[i]) * deviation[i % 3];
      sum += difference;
      total.worst_pixel = std::max(total.worst_pixel, difference);
    }
    const double mean = sum / static_cast<double>(ours.size());
    EXPECT_LE(mean, 1.0 / 255);
    total.photographs += 1;
    total.sum += mean;
    total.worst = std::max(total.worst, mean);
  }
  ASSERT_EQ(totals.size(), 2u);
  for (const auto& [name, total] : totals) {
    EXPECT_GE(total.photographs, 50) << name;
    std::printf(
        "%s: %d photographs, mean absolute difference %.2g/255, worst photograph %.2g/255, worst "
        "pixel %.2g/255\n",
        name.c_str(), total.photographs, 255 * total.sum / total.photographs, 255 * total.worst,
        255 * total.worst_pixel);
  }
}

}  // namespace
}  // namespace tern::image
