// Encoded image -> network input: decoding and preprocessing of one JPEG, one thread.
//
//   input_bench [--benchmark_filter=...] [--benchmark_repetitions=...]
//
// The picture is 500 x 375 (BM_LargePhoto: 4000 x 3000), smooth with some texture, quality 90,
// 4:2:0 as cameras write it; preprocessing is that of the named contract `imagenet` (shorter side
// 256, centre crop 224), for the large picture also with jpeg_scaling.
#include <benchmark/benchmark.h>

#include <cmath>
#include <cstdlib>
#include <random>
#include <string>
#include <vector>

#include "server/base/allocator.h"
#include "server/image/image.h"
#include "tests/image/encode_jpeg.h"

namespace tern::image {
namespace {

constexpr int kWidth = 500, kHeight = 375, kSide = 224;

std::string Picture(int width = kWidth, int height = kHeight) {
  std::mt19937 random(1);
  std::vector<uint8_t> pixels(static_cast<size_t>(width) * height * 3);
  size_t i = 0;
  for (int y = 0; y < height; ++y) {
    for (int x = 0; x < width; ++x) {
      for (int c = 0; c < 3; ++c) {
        const double wave = std::sin(x * 0.03 * (c + 1)) + std::cos(y * 0.05 + c) +
                            0.3 * std::sin(x * 0.9) * std::sin(y * 0.7);
        pixels[i++] = static_cast<uint8_t>(std::lround(128 + 45 * wave) + random() % 8);
      }
    }
  }
  return testing::EncodeJpeg(pixels, width, height, 90);
}

void BM_Decode(benchmark::State& state) {
  const std::string jpeg = Picture();
  for (auto _ : state) benchmark::DoNotOptimize(Decode(jpeg, Limits(), true)->pixels.data());
  state.counters["bytes"] = static_cast<double>(jpeg.size());
}
BENCHMARK(BM_Decode)->Unit(benchmark::kMillisecond);

void BM_Preprocess(benchmark::State& state) {
  const Image image = *Decode(Picture(), Limits(), true);
  const v1::Preprocessing contract = *NamedPreprocessing("imagenet");
  std::vector<float> input(size_t{kSide} * kSide * 3);
  for (auto _ : state) {
    if (!Preprocess(image, contract, kSide, kSide, absl::MakeSpan(input)).ok()) std::abort();
    benchmark::DoNotOptimize(input.data());
  }
}
BENCHMARK(BM_Preprocess)->Unit(benchmark::kMillisecond);

void BM_DecodeAndPreprocess(benchmark::State& state) {
  const std::string jpeg = Picture();
  const v1::Preprocessing contract = *NamedPreprocessing("imagenet");
  std::vector<float> input(size_t{kSide} * kSide * 3);
  for (auto _ : state) {
    const Image image = *Decode(jpeg, Limits(), true);
    if (!Preprocess(image, contract, kSide, kSide, absl::MakeSpan(input)).ok()) std::abort();
    benchmark::DoNotOptimize(input.data());
  }
}
BENCHMARK(BM_DecodeAndPreprocess)->Unit(benchmark::kMillisecond);

void BM_LargePhoto(benchmark::State& state) {
  const std::string jpeg = Picture(4000, 3000);
  v1::Preprocessing contract = *NamedPreprocessing("imagenet");
  contract.set_jpeg_scaling(state.range(0) != 0);
  std::vector<float> input(size_t{kSide} * kSide * 3);
  for (auto _ : state) {
    const Image image = *Decode(jpeg, Limits(), contract, kSide, kSide);
    if (!Preprocess(image, contract, kSide, kSide, absl::MakeSpan(input)).ok()) std::abort();
    benchmark::DoNotOptimize(input.data());
  }
  state.counters["bytes"] = static_cast<double>(jpeg.size());
}
BENCHMARK(BM_LargePhoto)->ArgName("jpeg_scaling")->Arg(0)->Arg(1)->Unit(benchmark::kMillisecond);

}  // namespace
}  // namespace tern::image

int main(int argc, char** argv) {
  tern::KeepFreedMemory();  // as ternd
  benchmark::Initialize(&argc, argv);
  if (benchmark::ReportUnrecognizedArguments(argc, argv)) return 1;
  benchmark::RunSpecifiedBenchmarks();
}
