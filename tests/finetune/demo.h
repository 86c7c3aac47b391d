// The demo network with images, and a small network with images to train on, as files and in
// memory.
#ifndef TERN_TESTS_FINETUNE_DEMO_H_
#define TERN_TESTS_FINETUNE_DEMO_H_

#include <gtest/gtest.h>

#include <algorithm>
#include <cstdlib>
#include <filesystem>
#include <random>
#include <string>
#include <vector>

#include "absl/strings/str_cat.h"
#include "server/artifact/artifact.h"
#include "server/base/file.h"
#include "server/graph/passes.h"
#include "server/image/image.h"
#include "server/onnx/import.h"
#include "server/quant/quantize.h"
#include "tests/serving/tiny_model.h"

namespace tern::finetune {

// A float network, images f32 [n, 3, h, w], and a version quantised with them.
struct Demo {
  graph::Graph source;
  Tensor images;
  artifact::Artifact start;
};

inline Tensor LoadImages(const std::vector<std::string>& paths, const v1::Preprocessing& contract,
                         const Shape& shape) {
  Tensor images(DType::kF32, shape.WithBatch(static_cast<int64_t>(paths.size())));
  float* to = images.data<float>().data();
  const int64_t plane = shape[1] * shape[2];
  std::vector<float> nhwc(plane * 3);
  for (const std::string& path : paths) {
    const auto decoded = image::Decode(ReadFile(path).value(), image::Limits{}, true);
    EXPECT_TRUE(decoded.ok()) << path << decoded.status();
    EXPECT_TRUE(image::Preprocess(*decoded, contract, static_cast<int>(shape[1]),
                                  static_cast<int>(shape[2]), absl::MakeSpan(nhwc))
                    .ok());
    for (int64_t c = 0; c < 3; ++c) {
      for (int64_t i = 0; i < plane; ++i) *to++ = nhwc[i * 3 + c];
    }
  }
  return images;
}

inline std::vector<std::string> FilesBelow(const std::string& folder) {
  std::vector<std::string> paths;
  for (const auto& entry : std::filesystem::recursive_directory_iterator(folder)) {
    const std::string extension = entry.path().extension().string();
    if (extension == ".jpg" || extension == ".bmp") paths.push_back(entry.path().string());
  }
  std::sort(paths.begin(), paths.end());
  return paths;
}

inline artifact::Artifact Quantise(const graph::Graph& source, const Tensor& images,
                                   v1::WeightType weights, uint32_t cluster, v1::Method method) {
  quant::QuantizeOptions options;
  options.recipe.set_weights(weights);
  options.recipe.set_cluster_size(cluster);
  options.recipe.set_method(method);
  auto result = quant::Quantize(source, images, options);
  EXPECT_TRUE(result.ok()) << result.status();
  artifact::Artifact artifact;
  artifact.graph = std::move(result->graph);
  artifact.report = std::move(result->report);
  return artifact;
}

// The demo model of the repository and 24 of its calibration images.
inline Demo LoadDemo(v1::WeightType weights, uint32_t cluster) {
  const std::string folder = absl::StrCat(std::getenv("TERN_SOURCE_DIR"), "/models/demo");
  Demo demo;
  demo.source = onnx::Import(ReadFile(folder + "/model.onnx").value()).value();
  graph::Optimize(demo.source);
  std::vector<std::string> paths = FilesBelow(folder + "/calibration");
  paths.resize(std::min<size_t>(paths.size(), 24));
  demo.images = LoadImages(paths, image::NamedPreprocessing("cifar10").value(), Shape{3, 32, 32});
  demo.start = Quantise(demo.source, demo.images, weights, cluster, v1::CORRECTED);
  return demo;
}

// An 8x8 image of noise around the class's colour: red, green or blue.
inline std::string NoisyBmp(int label, unsigned seed) {
  std::mt19937 random(seed);
  std::string bmp = testing::SolidBmp(8, 8, 0, 0, 0);
  for (size_t i = 54; i < bmp.size(); ++i) {
    const int channel = 2 - static_cast<int>((i - 54) % 3);  // stored blue, green, red
    bmp[i] = static_cast<char>(random() % 160 + (channel == label ? 60 : 0));
  }
  return bmp;
}

// In `folder`: float.onnx (colours to classes 0, 1, 2 = red, green, blue), start.tern (its middle
// layer ternary) and train/<class>/*.bmp.
inline void MakeJobFiles(const std::string& folder, int per_class) {
  namespace fs = std::filesystem;
  const std::vector<std::string> labels = {"red", "green", "blue"};
  for (int label = 0; label < 3; ++label) {
    fs::create_directories(absl::StrCat(folder, "/train/", labels[label]));
    for (int i = 0; i < per_class; ++i) {
      const std::string bmp = NoisyBmp(label, static_cast<unsigned>(label * 1000 + i));
      const absl::string_view parts[] = {bmp};
      ASSERT_TRUE(
          WriteFileAtomically(absl::StrCat(folder, "/train/", labels[label], "/", i, ".bmp"), parts)
              .ok());
    }
  }
  const std::string onnx = testing::TinyOnnx();
  const absl::string_view parts[] = {onnx};
  ASSERT_TRUE(WriteFileAtomically(folder + "/float.onnx", parts).ok());
  graph::Graph source = onnx::Import(onnx).value();
  graph::Optimize(source);
  const Tensor images =
      LoadImages(FilesBelow(folder + "/train"), testing::TinyPreprocessing(), Shape{3, 8, 8});
  artifact::Artifact start = Quantise(source, images, v1::TERNARY_CLUSTER, 0, v1::DIRECT);
  start.preprocessing = testing::TinyPreprocessing();
  start.labels = labels;
  start.source_sha256 = Sha256Hex(onnx);
  ASSERT_TRUE(artifact::Write(start, folder + "/start.tern").ok());
}

}  // namespace tern::finetune

#endif  // TERN_TESTS_FINETUNE_DEMO_H_
