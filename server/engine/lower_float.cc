// Float operators other than convolutions and fully connected layers, and the channel shuffle.
#include <algorithm>
#include <limits>

#include "absl/strings/str_cat.h"
#include "server/engine/lowering.h"

namespace tern::engine {
namespace {

using graph::Node;
using graph::OpType;
using graph::ValueId;

}  // namespace

bool Lowering::TryShuffle(const Node& node) {
  if (fused_.count(node.output) != 0 || program_.value_buffer[node.output] >= 0) {
    layer().implementation = "fused";
    return true;
  }
  if (node.op != OpType::kReshape) return false;
  const Shape &xs = graph_.shape(node.inputs[0]), &split = graph_.shape(node.output);
  if (xs.rank() != 3 || split.rank() != 4 || split[0] * split[1] != xs[0] || split[2] != xs[1] ||
      split[3] != xs[2]) {
    return false;
  }
  const auto only_reader = [&](ValueId id) -> const Node* {
    const std::vector<int> readers = graph_.ConsumersOf(id);
    return readers.size() == 1 && id != graph_.output ? &graph_.nodes[readers[0]] : nullptr;
  };
  const Node* turn = only_reader(node.output);
  if (turn == nullptr || turn->op != OpType::kTranspose ||
      turn->perm != std::vector<int>{1, 0, 2, 3})
    return false;
  const Node* join = only_reader(turn->output);
  if (join == nullptr || join->op != OpType::kReshape || graph_.shape(join->output) != xs)
    return false;
  const auto& params = quant(node.inputs[0]);
  if (quant(node.output) != params || quant(turn->output) != params ||
      quant(join->output) != params)
    return false;

  const Format format = params ? Format::kU8 : Format::kF32;
  const int src = Get(node.inputs[0], format), dst = NewBuffer(format, xs);
  const int64_t groups = split[0], rest = split[1], channels = xs[0], pixels = xs[1] * xs[2];
  std::vector<int32_t> from(channels);
  for (int64_t j = 0; j < rest; ++j) {
    for (int64_t g = 0; g < groups; ++g) from[j * groups + g] = static_cast<int32_t>(g * rest + j);
  }
  AddStep({src}, {dst}).loop = [=](const RunContext& run) {
    const auto gather = [&](auto* d, const auto* s) {
      InRanges(
          run.batch * pixels, run.batch * pixels * channels > 16384,
          [&](int64_t begin_p, int64_t end_p) {
            for (int64_t p = begin_p; p < end_p; ++p) {
              if (groups == 2) {  // ShuffleNet's: two halves interleaved, which compilers vectorise
                const auto *low = s + p * channels, *high = low + rest;
                auto* both = d + p * channels;
                for (int64_t c = 0; c < rest; ++c) {
                  both[2 * c] = low[c];
                  both[2 * c + 1] = high[c];
                }
                continue;
              }
              for (int64_t c = 0; c < channels; ++c)
                d[p * channels + c] = s[p * channels + from[c]];
            }
          });
    };
    if (format == Format::kU8) {
      gather(run.at<uint8_t>(dst), run.at<uint8_t>(src));
    } else {
      gather(run.at<float>(dst), run.at<float>(src));
    }
  };
  layer().implementation = "tern:loop";
  fused_.insert(node.output);
  fused_.insert(turn->output);
  Define(join->output, dst);
  return true;
}

absl::Status Lowering::LowerFloat(const Node& node) {
  const Shape &xs = graph_.shape(node.inputs[0]), &ys = graph_.shape(node.output);
  const bool same_shapes = std::all_of(node.inputs.begin(), node.inputs.end(), [&](ValueId id) {
    return graph_.shape(id) == ys && !graph_.values[id].constant;
  });
  const bool whole_blocks = xs.rank() == 3 && xs[0] % kChannelBlock == 0;
  bool blocked =
      whole_blocks && Current(node.inputs[0]) == Format::kF32Blocked && !quant(node.output);

  if ((node.op == OpType::kMaxPool || node.op == OpType::kAveragePool) &&
      !(node.pool.ceil_mode && node.pool.count_include_pad)) {
    const Format format = Current(node.inputs[0]);
    const int src = Get(node.inputs[0], format), dst = NewBuffer(format, ys);
    if (AddPooling(node, src, dst)) {
      SetFloatImplementation(node, layer().implementation);
      StoreFloat(node.output, dst);
      return absl::OkStatus();
    }
  }
  if (node.op == OpType::kReshape) {
    const int src = Get(node.inputs[0], Format::kF32);
    if (!quant(node.output) && IsView(Format::kF32, xs, ys)) {
      DefineView(node, src);
      return absl::OkStatus();
    }
  }

  // Blocked tensors pass through where the order of elements does not matter, or channels stay
  // whole blocks.
  const bool elementwise =
      IsUnary(node.op) || ((node.op == OpType::kAdd || node.op == OpType::kSub ||
                            node.op == OpType::kMul || node.op == OpType::kDiv) &&
                           same_shapes);
  bool block_concat = node.op == OpType::kConcat && node.axis == 0 && ys.rank() == 3;
  for (ValueId id : node.inputs)
    block_concat = block_concat && graph_.shape(id)[0] % kChannelBlock == 0;
  blocked = blocked && (elementwise || block_concat || node.op == OpType::kBatchNorm ||
                        node.op == OpType::kGlobalAveragePool);

  const Format format = blocked ? Format::kF32Blocked : Format::kF32;
  std::vector<int> sources;
  std::vector<Place> inputs;
  // A blocked tensor is [c/8,h,w,8] row-major: channels outside, so that concatenation along axis 0
  // is what it was; per-channel operators see the inner 8 as a dimension of its own.
  const auto place_of = [&](int b) {
    Place place = PlaceOf(b);
    if (!blocked) return place;
    const Shape& s = buffer(b).shape;
    place.shape = Shape{s[0] / kChannelBlock, s[1], s[2], kChannelBlock};
    place.strides = RowMajorStrides(place.shape);
    return place;
  };
  for (ValueId id : node.inputs) {
    sources.push_back(Get(id, format));
    inputs.push_back(place_of(sources.back()));
  }
  const bool pooled_blocks = blocked && node.op == OpType::kGlobalAveragePool;
  const int dst = NewBuffer(pooled_blocks ? Format::kF32 : format, ys);
  const Place output = pooled_blocks ? PlaceOf(dst) : place_of(dst);
  Step& step = AddStep(sources, {dst});
  if (elementwise) {
    for (size_t i = 0; i < inputs.size(); ++i) {
      if (graph_.shape(node.inputs[i]) == ys) step.in_place.push_back({sources[i], dst});
    }
  }
  auto attributes = std::make_shared<Node>(node);
  if (pooled_blocks) {
    step.loop = [=, channels = xs[0], pixels = xs[1] * xs[2]](const RunContext& run) {
      const float* src = run.at<float>(sources[0]);
      float* means = run.at<float>(dst);
      const float inverse = 1.0f / static_cast<float>(pixels);
      const int64_t blocks = run.batch * channels / kChannelBlock;
      InRanges(blocks, blocks * pixels > 4096, [&](int64_t begin_b, int64_t end_b) {
        for (int64_t b = begin_b; b < end_b; ++b) {
          float sums[kChannelBlock] = {};
          for (int64_t p = 0; p < pixels; ++p) {
            for (int c = 0; c < kChannelBlock; ++c)
              sums[c] += src[(b * pixels + p) * kChannelBlock + c];
          }
          for (int c = 0; c < kChannelBlock; ++c) means[b * kChannelBlock + c] = sums[c] * inverse;
        }
      });
    };
  } else if (blocked && node.op == OpType::kBatchNorm) {
    step.loop = [=, channels = xs[0], pixels = xs[1] * xs[2]](const RunContext& run) {
      const float *src = run.at<float>(sources[0]),
                  *scale = attributes->weight.data<float>().data(),
                  *shift = attributes->bias.data<float>().data();
      float* result = run.at<float>(dst);
      const float lo =
          attributes->clip ? attributes->clip->lo : -std::numeric_limits<float>::infinity();
      const float hi =
          attributes->clip ? attributes->clip->hi : std::numeric_limits<float>::infinity();
      const int64_t per_image = channels / kChannelBlock, blocks = run.batch * per_image;
      InRanges(blocks, blocks * pixels > 4096, [&](int64_t begin_b, int64_t end_b) {
        for (int64_t b = begin_b; b < end_b; ++b) {
          const float *m = scale + b % per_image * kChannelBlock,
                      *a = shift + b % per_image * kChannelBlock;
          for (int64_t i = b * pixels * kChannelBlock, p = 0; p < pixels; ++p) {
            for (int c = 0; c < kChannelBlock; ++c, ++i)
              result[i] = std::min(std::max(src[i] * m[c] + a[c], lo), hi);
          }
        }
      });
    };
  } else {
    // Made once per batch size: a concatenation may have many operands.
    step.make = [=](const RunContext& run) {
      std::vector<Operand<const float>> operands;
      for (const Place& place : inputs) operands.push_back(place.At<const float>(run));
      Executable executable;
      executable.run = [=, to = output.At<float>(run), batch = run.batch](dnnl::stream&) {
        // The status can only be UNIMPLEMENTED, for operators that do not come here.
        RunPlainFloat(*attributes, operands, to, batch).IgnoreError();
      };
      return executable;
    };
  }
  SetFloatImplementation(node, "tern:loop");
  StoreFloat(node.output, dst);
  return absl::OkStatus();
}

}  // namespace tern::engine
