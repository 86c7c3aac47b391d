// Writes what overhead_bench.py needs, from nothing but this program:
//
//     overhead_inputs FOLDER
//
// empty.onnx: a network that costs next to nothing, 3x32x32 -> mean -> 10 classes.
// resnet50.onnx: ResNet-50 with random weights, 3x224x224 -> 1000 classes; as fast as the real one.
// photo.jpg: 640x480, about 100 kB; small.jpg: 224x224, about 12 kB.
#include <cmath>
#include <fstream>
#include <iostream>
#include <random>
#include <string>
#include <vector>

#include "tests/image/encode_jpeg.h"
#include "tests/onnx/model_builder.h"

namespace tern {
namespace {

using testing::Dims;
using testing::Floats;
using testing::ModelBuilder;

void Write(const std::string& path, const std::string& bytes) {
  std::ofstream out(path, std::ios::binary);
  out << bytes;
  if (!out.flush()) {
    std::cerr << "overhead_inputs: cannot write " << path << "\n";
    std::exit(1);
  }
  std::cout << path << ": " << bytes.size() << " bytes\n";
}

std::string EmptyNetwork() {
  ModelBuilder m(13, {3, 32, 32});
  m.Weight("w", Floats({10, 3}, std::vector<float>(30, 0.1f)));
  m.Node("GlobalAveragePool", {"input"}, {"mean"}).Node("Flatten", {"mean"}, {"flat"});
  m.Node("Gemm", {"flat", "w"}, {"y"}, {{"transB", 1}});
  return m.Finish("y");
}

class ResNet {
 public:
  ResNet() : model_(13, {3, 224, 224}) {}

  std::string Build() {
    std::string x = Conv("input", 3, 64, 7, 2, true);
    model_.Node("MaxPool", {x}, {"pool"},
                {{"kernel_shape", {3, 3}}, {"strides", {2, 2}}, {"pads", {1, 1, 1, 1}}});
    x = "pool";
    int64_t channels = 64;
    const int blocks[] = {3, 4, 6, 3};
    for (int stage = 0; stage < 4; ++stage) {
      const int64_t width = 64 << stage;
      for (int block = 0; block < blocks[stage]; ++block) {
        const int stride = block == 0 && stage > 0 ? 2 : 1;
        std::string y = Conv(x, channels, width, 1, 1, true);
        y = Conv(y, width, width, 3, stride, true);
        y = Conv(y, width, 4 * width, 1, 1, false);
        if (block == 0) x = Conv(x, channels, 4 * width, 1, stride, false);
        channels = 4 * width;
        const std::string sum = Name();
        model_.Node("Add", {y, x}, {sum}).Node("Relu", {sum}, {sum + "r"});
        x = sum + "r";
      }
    }
    model_.Weight("fc", Random({1000, channels}, channels));
    model_.Node("GlobalAveragePool", {x}, {"mean"}).Node("Flatten", {"mean"}, {"flat"});
    model_.Node("Gemm", {"flat", "fc"}, {"y"}, {{"transB", 1}});
    return model_.Finish("y");
  }

 private:
  std::string Name() { return "v" + std::to_string(names_++); }

  // Keeps the variance of its input.
  ::onnx::TensorProto Random(const Dims& dims, int64_t inputs) {
    int64_t elements = 1;
    for (int64_t dim : dims) elements *= dim;
    std::normal_distribution<float> normal(0.0f, std::sqrt(1.0f / static_cast<float>(inputs)));
    std::vector<float> values(elements);
    for (float& value : values) value = normal(random_);
    return Floats(dims, values);
  }

  std::string Conv(const std::string& x, int64_t from, int64_t to, int64_t kernel, int64_t stride,
                   bool relu) {
    const std::string y = Name();
    const int64_t pad = kernel / 2;
    model_.Weight(y + "w", Random({to, from, kernel, kernel}, from * kernel * kernel));
    model_.Weight(y + "b", Floats({to}, std::vector<float>(to, 0.01f)));
    model_.Node("Conv", {x, y + "w", y + "b"}, {y},
                {{"kernel_shape", {kernel, kernel}},
                 {"strides", {stride, stride}},
                 {"pads", {pad, pad, pad, pad}}});
    if (!relu) return y;
    model_.Node("Relu", {y}, {y + "r"});
    return y + "r";
  }

  ModelBuilder model_;
  std::mt19937 random_{1};
  int names_ = 0;
};

// Smooth shapes and noise: compresses like a photograph.
std::string Photo(int width, int height, int quality) {
  std::mt19937 random(1);
  std::normal_distribution<float> noise(0.0f, 12.0f);
  std::vector<uint8_t> pixels(static_cast<size_t>(width) * height * 3);
  for (int y = 0; y < height; ++y) {
    for (int x = 0; x < width; ++x) {
      for (int c = 0; c < 3; ++c) {
        const float value =
            128 + 60 * std::sin(0.021f * x + c) + 50 * std::cos(0.017f * y - c) + noise(random);
        pixels[(static_cast<size_t>(y) * width + x) * 3 + c] =
            static_cast<uint8_t>(std::min(255.0f, std::max(0.0f, value)));
      }
    }
  }
  return image::testing::EncodeJpeg(pixels, width, height, quality);
}

}  // namespace
}  // namespace tern

int main(int argc, char** argv) {
  if (argc != 2) {
    std::cerr << "usage: overhead_inputs FOLDER\n";
    return 2;
  }
  const std::string folder = std::string(argv[1]) + "/";
  tern::Write(folder + "empty.onnx", tern::EmptyNetwork());
  tern::Write(folder + "resnet50.onnx", tern::ResNet().Build());
  tern::Write(folder + "photo.jpg", tern::Photo(640, 480, 88));
  tern::Write(folder + "small.jpg", tern::Photo(224, 224, 80));
  return 0;
}
