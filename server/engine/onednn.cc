#include "server/engine/onednn.h"

#include <omp.h>

#include <cstring>

#include "absl/strings/str_cat.h"

namespace tern::engine::onednn {
namespace {

// `grouped`: the weights have a dimension of groups before that of output channels.
dnnl::primitive_attr MakeAttributes(const Epilogue& epilogue, bool grouped) {
  dnnl::primitive_attr attributes;
  if (!epilogue.scales.empty()) {
#if DNNL_VERSION_MAJOR >= 3
    const int mask = epilogue.scales.size() == 1 ? 0 : grouped ? 3 : 1;
    attributes.set_scales_mask(DNNL_ARG_WEIGHTS, mask);
#else
    attributes.set_output_scales(epilogue.scales.size() > 1 ? 2 : 0, epilogue.scales);
#endif
  }
  dnnl::post_ops post;
  if (epilogue.sum) post.append_sum(epilogue.sum_scale);
  if (epilogue.clip) {
    const float lo = epilogue.clip->lo, hi = epilogue.clip->hi;
    const bool relu = lo == 0.0f && hi == std::numeric_limits<float>::infinity();
    const auto algorithm = relu ? dnnl::algorithm::eltwise_relu : dnnl::algorithm::eltwise_clip;
    const float alpha = relu ? 0.0f : lo, beta = relu ? 0.0f : hi;
#if DNNL_VERSION_MAJOR >= 3
    post.append_eltwise(algorithm, alpha, beta);
#else
    post.append_eltwise(1.0f, algorithm, alpha, beta);
#endif
  }
  attributes.set_post_ops(post);
  // oneDNN's own scratchpad belongs to the thread that made the primitive; another one that runs it
  // would write to address 0.
  attributes.set_scratchpad_mode(dnnl::scratchpad_mode::user);
  return attributes;
}

template <typename PrimitiveDesc>
Primitive Finish(const PrimitiveDesc& desc, dnnl::primitive primitive) {
  Primitive result;
  result.primitive = std::move(primitive);
  result.src = desc.src_desc();
  result.dst = desc.dst_desc();
  result.implementation = desc.impl_info_str();
  result.scratchpad = desc.scratchpad_desc();
  return result;
}

template <typename PrimitiveDesc>
Primitive FinishWeighted(const PrimitiveDesc& desc, dnnl::primitive primitive,
                         const Epilogue& epilogue) {
  Primitive result = Finish(desc, std::move(primitive));
  result.weights = desc.weights_desc();
  result.bias = desc.bias_desc();
#if DNNL_VERSION_MAJOR >= 3
  if (!epilogue.scales.empty()) {
    memory scales({{static_cast<memory::dim>(epilogue.scales.size())},
                   memory::data_type::f32,
                   memory::format_tag::x},
                  Engine());
    std::memcpy(scales.get_data_handle(), epilogue.scales.data(),
                epilogue.scales.size() * sizeof(float));
    result.constant_args.emplace(DNNL_ARG_ATTR_SCALES | DNNL_ARG_WEIGHTS, scales);
  }
#endif
  return result;
}

memory::dims FromZero(const memory::dims& dilations) {
  memory::dims result = dilations;
  for (auto& d : result) --d;
  return result;
}

}  // namespace

const dnnl::engine& Engine() {
  static const dnnl::engine& engine = *new dnnl::engine(dnnl::engine::kind::cpu, 0);
  return engine;
}

std::vector<dnnl_exec_arg_t> Flatten(const Args& args) {
  std::vector<dnnl_exec_arg_t> result;
  for (const auto& [index, memory] : args) result.push_back({index, memory.get(true)});
  return result;
}

void Execute(const dnnl::primitive& primitive, dnnl::stream& stream,
             const std::vector<dnnl_exec_arg_t>& args) {
  dnnl::error::wrap_c_api(dnnl_primitive_execute(primitive.get(), stream.get(),
                                                 static_cast<int>(args.size()), args.data()),
                          "could not execute a primitive");
  stream.wait();
}

std::vector<float> BiasBesideScales(const std::vector<float>& bias,
                                    const std::vector<float>& scales) {
  std::vector<float> result = bias;
#if DNNL_VERSION_MAJOR < 3
  for (size_t o = 0; o < result.size() && !scales.empty(); ++o) {
    result[o] =
        static_cast<float>(static_cast<double>(bias[o]) / scales[scales.size() > 1 ? o : 0]);
  }
#endif
  return result;
}

Args OwnArgs(const Primitive& primitive) {
  Args args = primitive.constant_args;
  if (primitive.scratchpad.get_size() > 0)
    args.emplace(DNNL_ARG_SCRATCHPAD, memory(primitive.scratchpad, Engine()));
  return args;
}

std::shared_ptr<const Primitive> SharedPrimitives::Get(int64_t batch) {
  std::lock_guard lock(mutex_);
  std::weak_ptr<const Primitive>& known = made_[{batch, omp_get_max_threads()}];
  std::shared_ptr<const Primitive> primitive = known.lock();
  if (primitive == nullptr) known = primitive = std::make_shared<const Primitive>(make_(batch));
  return primitive;
}

Primitive MakeConvolution(const ConvolutionSpec& spec, const Epilogue& epilogue) {
  const auto attributes = MakeAttributes(epilogue, spec.grouped);
  const auto kind = dnnl::prop_kind::forward_inference;
  const auto algorithm = dnnl::algorithm::convolution_direct;
  const memory::dims dilations = FromZero(spec.dilations);
#if DNNL_VERSION_MAJOR >= 3
  dnnl::convolution_forward::primitive_desc desc(Engine(), kind, algorithm, spec.src, spec.weights,
                                                 spec.bias, spec.dst, spec.strides, dilations,
                                                 spec.pads_begin, spec.pads_end, attributes);
#else
  dnnl::convolution_forward::desc operation(kind, algorithm, spec.src, spec.weights, spec.bias,
                                            spec.dst, spec.strides, dilations, spec.pads_begin,
                                            spec.pads_end);
  dnnl::convolution_forward::primitive_desc desc(operation, attributes, Engine());
#endif
  return FinishWeighted(desc, dnnl::convolution_forward(desc), epilogue);
}

namespace {

// What the primitives of the derivatives want to know about the forward one.
dnnl::convolution_forward::primitive_desc ForwardHint(const ConvolutionSpec& spec) {
  const auto kind = dnnl::prop_kind::forward_training;
  const auto algorithm = dnnl::algorithm::convolution_direct;
  const memory::dims dilations = FromZero(spec.dilations);
#if DNNL_VERSION_MAJOR >= 3
  return {Engine(), kind,         algorithm, spec.src,        spec.weights,
          spec.dst, spec.strides, dilations, spec.pads_begin, spec.pads_end};
#else
  return {{kind, algorithm, spec.src, spec.weights, spec.dst, spec.strides, dilations,
           spec.pads_begin, spec.pads_end},
          Engine()};
#endif
}

}  // namespace

Primitive MakeConvolutionBackwardData(const ConvolutionSpec& spec) {
  const auto algorithm = dnnl::algorithm::convolution_direct;
  const memory::dims dilations = FromZero(spec.dilations);
#if DNNL_VERSION_MAJOR >= 3
  dnnl::convolution_backward_data::primitive_desc desc(
      Engine(), algorithm, spec.src, spec.weights, spec.dst, spec.strides, dilations,
      spec.pads_begin, spec.pads_end, ForwardHint(spec));
#else
  dnnl::convolution_backward_data::desc operation(algorithm, spec.src, spec.weights, spec.dst,
                                                  spec.strides, dilations, spec.pads_begin,
                                                  spec.pads_end);
  dnnl::convolution_backward_data::primitive_desc desc(operation, Engine(), ForwardHint(spec));
#endif
  Primitive result;
  result.primitive = dnnl::convolution_backward_data(desc);
  result.src = desc.diff_src_desc();
  result.weights = desc.weights_desc();
  result.dst = desc.diff_dst_desc();
  result.implementation = desc.impl_info_str();
  return result;
}

Primitive MakeConvolutionBackwardWeights(const ConvolutionSpec& spec) {
  const auto algorithm = dnnl::algorithm::convolution_direct;
  const memory::dims dilations = FromZero(spec.dilations);
#if DNNL_VERSION_MAJOR >= 3
  dnnl::convolution_backward_weights::primitive_desc desc(
      Engine(), algorithm, spec.src, spec.weights, spec.dst, spec.strides, dilations,
      spec.pads_begin, spec.pads_end, ForwardHint(spec));
#else
  dnnl::convolution_backward_weights::desc operation(algorithm, spec.src, spec.weights, spec.dst,
                                                     spec.strides, dilations, spec.pads_begin,
                                                     spec.pads_end);
  dnnl::convolution_backward_weights::primitive_desc desc(operation, Engine(), ForwardHint(spec));
#endif
  Primitive result;
  result.primitive = dnnl::convolution_backward_weights(desc);
  result.src = desc.src_desc();
  result.weights = desc.diff_weights_desc();
  result.dst = desc.diff_dst_desc();
  result.implementation = desc.impl_info_str();
  return result;
}

Primitive MakeInnerProduct(const memory::desc& src, const memory::desc& weights,
                           const memory::desc& bias, const memory::desc& dst,
                           const Epilogue& epilogue) {
  const auto attributes = MakeAttributes(epilogue, false);
  const auto kind = dnnl::prop_kind::forward_inference;
#if DNNL_VERSION_MAJOR >= 3
  dnnl::inner_product_forward::primitive_desc desc(Engine(), kind, src, weights, bias, dst,
                                                   attributes);
#else
  dnnl::inner_product_forward::desc operation(kind, src, weights, bias, dst);
  dnnl::inner_product_forward::primitive_desc desc(operation, attributes, Engine());
#endif
  return FinishWeighted(desc, dnnl::inner_product_forward(desc), epilogue);
}

Primitive MakePooling(const PoolingSpec& spec) {
  const auto kind = dnnl::prop_kind::forward_inference;
  dnnl::primitive_attr attributes;
  attributes.set_scratchpad_mode(dnnl::scratchpad_mode::user);
#if DNNL_VERSION_MAJOR >= 3
  const memory::dims dilations(spec.kernel.size(), 0);
  dnnl::pooling_forward::primitive_desc desc(Engine(), kind, spec.algorithm, spec.src, spec.dst,
                                             spec.strides, spec.kernel, dilations, spec.pads_begin,
                                             spec.pads_end, attributes);
#else
  dnnl::pooling_forward::desc operation(kind, spec.algorithm, spec.src, spec.dst, spec.strides,
                                        spec.kernel, spec.pads_begin, spec.pads_end);
  dnnl::pooling_forward::primitive_desc desc(operation, attributes, Engine());
#endif
  return Finish(desc, dnnl::pooling_forward(desc));
}

void Reorder(dnnl::stream& stream, const memory& src, const memory& dst) {
  dnnl::reorder(src, dst).execute(stream, const_cast<memory&>(src), const_cast<memory&>(dst));
  stream.wait();
}

memory Wrap(const memory::desc& desc, const float* data) {
  return memory(desc, Engine(), const_cast<float*>(data));
}

memory InLayout(dnnl::stream& stream, const memory& plain, const memory::desc& wanted) {
  if (plain.get_desc() == wanted) return plain;
  memory copy(wanted, Engine());
  Reorder(stream, plain, copy);
  return copy;
}

bool ExactInt8() {
  switch (dnnl::get_effective_cpu_isa()) {
    case dnnl::cpu_isa::sse41:
    case dnnl::cpu_isa::avx:
    case dnnl::cpu_isa::avx2:
    case dnnl::cpu_isa::avx512_core:
#if DNNL_VERSION_MAJOR < 3
    case dnnl::cpu_isa::avx512_mic:
    case dnnl::cpu_isa::avx512_mic_4ops:
#endif
      return false;
    default:
      return true;
  }
}

bool UsesAvx512() {
  switch (dnnl::get_effective_cpu_isa()) {
    case dnnl::cpu_isa::sse41:
    case dnnl::cpu_isa::avx:
    case dnnl::cpu_isa::avx2:
    case dnnl::cpu_isa::avx2_vnni:
#if DNNL_VERSION_MAJOR >= 3
    case dnnl::cpu_isa::avx2_vnni_2:
#endif
      return false;
    default:
      return true;
  }
}

std::string Version() {
  const dnnl_version_t* version = dnnl_version();
  return absl::StrCat(version->major, ".", version->minor, ".", version->patch);
}

std::string IsaName() {
  switch (dnnl::get_effective_cpu_isa()) {
    case dnnl::cpu_isa::sse41:
      return "sse41";
    case dnnl::cpu_isa::avx:
      return "avx";
    case dnnl::cpu_isa::avx2:
      return "avx2";
    case dnnl::cpu_isa::avx512_core:
      return "avx512_core";
    case dnnl::cpu_isa::avx512_core_vnni:
      return "avx512_core_vnni";
    case dnnl::cpu_isa::avx2_vnni:
      return "avx2_vnni";
    default:
      return ExactInt8() ? "above avx512_core_vnni" : "other";
  }
}

void Sgemm(char trans_a, char trans_b, int64_t m, int64_t n, int64_t k, float alpha, const float* a,
           int64_t lda, const float* b, int64_t ldb, float beta, float* c, int64_t ldc) {
  dnnl::error::wrap_c_api(
      dnnl_sgemm(trans_a, trans_b, m, n, k, alpha, a, lda, b, ldb, beta, c, ldc), "sgemm");
}

ScopedThreads::ScopedThreads(int threads) : previous_(omp_get_max_threads()) {
  omp_set_num_threads(threads);
}
ScopedThreads::~ScopedThreads() { omp_set_num_threads(previous_); }

}  // namespace tern::engine::onednn
