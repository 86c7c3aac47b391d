// Everything that differs between oneDNN 2.x (Debian 12) and 3.x (Debian 13), and oneDNN's
// exceptions turned into absl::Status. The rest of the engine uses oneDNN's memory and primitive
// types only.
//
// The three differences: 3.x has no operation descriptors; its scales are run-time arguments (2.x:
// numbers in the attribute, applied after the bias; 3.x: before it); some accessors have other
// names.
#ifndef TERN_SERVER_ENGINE_ONEDNN_H_
#define TERN_SERVER_ENGINE_ONEDNN_H_

#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <unordered_map>
#include <utility>
#include <vector>

#include "absl/status/status.h"
#include "absl/strings/str_cat.h"
#include "dnnl.hpp"
#include "server/graph/graph.h"
#include "server/kernels/dispatch.h"

namespace tern::engine::onednn {

using dnnl::memory;
using Args = std::unordered_map<int, memory>;

// The CPU engine of this process.
const dnnl::engine& Engine();

// Runs `f`; a dnnl::error becomes INTERNAL with `what` and oneDNN's status, exhausted memory
// RESOURCE_EXHAUSTED.
template <typename F>
absl::Status Guard(absl::string_view what, F&& f) {
  try {
    f();
    return absl::OkStatus();
  } catch (const dnnl::error& e) {
    return absl::InternalError(absl::StrCat("oneDNN, ", what, ": ", e.what(), " (status ",
                                            static_cast<int>(e.status), ")"));
  } catch (const std::bad_alloc&) {
    return absl::ResourceExhaustedError(absl::StrCat("out of memory in oneDNN, ", what));
  }
}

// What follows the sum of products: [scale and] bias, then dst = dst * sum_scale + v, then the
// clamp.
struct Epilogue {
  std::vector<float> scales;  // one per output channel; empty = none
  bool sum = false;           // adds what lies in dst
  float sum_scale = 1.0f;
  std::optional<graph::ClipRange> clip;
};

// `args` as oneDNN's C interface takes them; they must outlive it. dnnl::primitive::execute would
// make this list anew for every execution.
std::vector<dnnl_exec_arg_t> Flatten(const Args& args);
// Waits. Throws dnnl::error.
void Execute(const dnnl::primitive& primitive, dnnl::stream& stream,
             const std::vector<dnnl_exec_arg_t>& args);

// A primitive with the memory descriptors that it chose.
struct Primitive {
  dnnl::primitive primitive;
  memory::desc src, weights, bias, dst;
  memory::desc scratchpad;     // memory that an execution needs for itself; size 0: none
  std::string implementation;  // oneDNN's impl_info_str
  // To be merged into every execution: in 3.x the scales.
  Args constant_args;
};

// The constant arguments and a scratchpad of their own, for one thread at a time.
Args OwnArgs(const Primitive& primitive);

// The primitives of one layer, each made once for all sessions and kept while one of them uses it.
// oneDNN plans for a batch and for the calling thread's team. Thread safe.
class SharedPrimitives {
 public:
  // `make` throws dnnl::error.
  explicit SharedPrimitives(std::function<Primitive(int64_t batch)> make)
      : make_(std::move(make)) {}

  // Throws dnnl::error.
  std::shared_ptr<const Primitive> Get(int64_t batch);

 private:
  const std::function<Primitive(int64_t batch)> make_;
  std::mutex mutex_;
  std::map<std::pair<int64_t, int>, std::weak_ptr<const Primitive>> made_;  // by batch and team
};

// The bias as oneDNN wants it beside `scales`, so that the result is acc * scale + bias in both
// versions.
std::vector<float> BiasBesideScales(const std::vector<float>& bias,
                                    const std::vector<float>& scales);

// All of the following throw dnnl::error (call them in Guard()). Dilations count from 1.
struct ConvolutionSpec {
  memory::desc src, weights, bias, dst;
  memory::dims strides, dilations, pads_begin, pads_end;
  bool grouped = false;  // weights are [g, o/g, c/g, kh, kw]
};
Primitive MakeConvolution(const ConvolutionSpec& spec, const Epilogue& epilogue);
// Derivatives of a convolution without bias: `src` and `weights` of `spec` and of the result are
// those of the derivatives where the primitive writes them, `dst` is that of the output's.
Primitive MakeConvolutionBackwardData(const ConvolutionSpec& spec);
Primitive MakeConvolutionBackwardWeights(const ConvolutionSpec& spec);
Primitive MakeInnerProduct(const memory::desc& src, const memory::desc& weights,
                           const memory::desc& bias, const memory::desc& dst,
                           const Epilogue& epilogue);
struct PoolingSpec {
  dnnl::algorithm algorithm = dnnl::algorithm::pooling_max;
  memory::desc src, dst;
  memory::dims kernel, strides, pads_begin, pads_end;
};
Primitive MakePooling(const PoolingSpec& spec);

// Copies src to dst with a change of layout or type; waits.
void Reorder(dnnl::stream& stream, const memory& src, const memory& dst);
// A view of `data`, which must outlive it; primitives write only where it is their output.
memory Wrap(const memory::desc& desc, const float* data);
// `plain` itself if it has the wanted layout, else a copy that has.
memory InLayout(dnnl::stream& stream, const memory& plain, const memory::desc& wanted);

// True if the instruction set oneDNN uses multiplies u8 x s8 exactly for full 8-bit weights (VNNI);
// without it pairs of products saturate in 16 bits unless weights stay within 7 bits.
bool ExactInt8();
// There plain NHWC is as fast as blocked layouts (measured on ResNet-50: within 1 %; with AVX2 the
// blocked layout is 10 % faster in f32).
bool UsesAvx512();
// "avx2", "avx512_core_vnni", ...
std::string IsaName();
// "2.6.3"
std::string Version();

// oneDNN's row-major sgemm; trans: 'N' or 'T'. Throws dnnl::error.
void Sgemm(char trans_a, char trans_b, int64_t m, int64_t n, int64_t k, float alpha, const float* a,
           int64_t lda, const float* b, int64_t ldb, float beta, float* c, int64_t ldc);

// Sets the calling thread's OpenMP team size, and puts the old one back. oneDNN plans its blocking
// for the team size at creation, so primitives are made and run under the same one.
class ScopedThreads {
 public:
  explicit ScopedThreads(int threads);
  ~ScopedThreads();
  ScopedThreads(const ScopedThreads&) = delete;
  ScopedThreads& operator=(const ScopedThreads&) = delete;

 private:
  int previous_;
};

}  // namespace tern::engine::onednn

#endif  // TERN_SERVER_ENGINE_ONEDNN_H_
