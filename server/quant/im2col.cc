#include "server/quant/im2col.h"

namespace tern::quant {
namespace {

int64_t PlaneSize(const Shape& shape) { return shape.rank() == 4 ? shape[2] * shape[3] : 1; }

}  // namespace

void GatherColumns(const graph::Graph& graph, const graph::Node& node, const ClusterLayout& layout,
                   const Tensor& input, const std::vector<int64_t>& positions,
                   std::vector<float>& x) {
  const Shape& in = input.shape();
  const Shape& out = graph.shape(node.output);
  const bool image = in.rank() == 4;
  const int64_t channels = in[1], height = image ? in[2] : 1, width = image ? in[3] : 1;
  const int64_t out_width = out.rank() == 3 ? out[2] : 1;
  const int64_t out_plane = out.rank() == 3 ? out[1] * out[2] : 1;
  const int64_t kernel_h = image ? node.weight.shape()[2] : 1,
                kernel_w = image ? node.weight.shape()[3] : 1;
  const graph::ConvAttributes& conv = node.conv;
  const size_t count = positions.size();
  const float* data = input.data<float>().data();

  std::vector<const float*> sample(count);
  std::vector<int> top(count), left(count);
  for (size_t i = 0; i < count; ++i) {
    const int64_t in_plane = positions[i] % out_plane;
    sample[i] = data + positions[i] / out_plane * channels * height * width;
    top[i] = static_cast<int>(in_plane / out_width * conv.stride_h - conv.pad_top);
    left[i] = static_cast<int>(in_plane % out_width * conv.stride_w - conv.pad_left);
  }
  x.resize(static_cast<size_t>(layout.columns()) * count);
  for (int j = 0; j < layout.columns(); ++j) {
    const int tap = static_cast<int>(layout.column[j] % (kernel_h * kernel_w));
    const int64_t channel = layout.column[j] / (kernel_h * kernel_w);
    const int row_offset = static_cast<int>(tap / kernel_w * conv.dilation_h);
    const int column_offset = static_cast<int>(tap % kernel_w * conv.dilation_w);
    const int64_t plane = channel * height * width;
    float* target = &x[static_cast<size_t>(j) * count];
    for (size_t i = 0; i < count; ++i) {
      const int row = top[i] + row_offset, column = left[i] + column_offset;
      const bool inside = row >= 0 && row < height && column >= 0 && column < width;
      target[i] = inside ? sample[i][plane + row * width + column] : 0.0f;
    }
  }
}

void GatherOutputs(const Tensor& output, const std::vector<int64_t>& positions,
                   std::vector<float>& z) {
  const int64_t channels = output.shape()[1], plane = PlaneSize(output.shape());
  const size_t count = positions.size();
  const float* data = output.data<float>().data();
  z.resize(static_cast<size_t>(channels) * count);
  for (int64_t o = 0; o < channels; ++o) {
    for (size_t i = 0; i < count; ++i) {
      z[o * count + i] = data[(positions[i] / plane * channels + o) * plane + positions[i] % plane];
    }
  }
}

}  // namespace tern::quant
