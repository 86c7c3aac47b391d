// Compiled networks: a Plan is a graph made ready for this CPU, a Session runs it.
//
// Plan: immutable, shared by any number of sessions and threads; holds prepacked weights and
//   the choice of implementation per layer. Session: the activation memory and oneDNN objects of
//   one caller; not thread safe, one thread uses it at a time.
// Float graphs run over oneDNN f32; quantised graphs run u8 activations between float
// islands (docs/quantisation.md, "Inference arithmetic").
#ifndef TERN_SERVER_ENGINE_PLAN_H_
#define TERN_SERVER_ENGINE_PLAN_H_

#include <array>
#include <memory>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/time/time.h"
#include "absl/types/span.h"
#include "server/graph/graph.h"
#include "server/kernels/dispatch.h"

namespace tern::engine {

struct PlanOptions {
  // Highest instruction set that our kernels and oneDNN may use. oneDNN's own cap is process-wide
  // and set by CapOneDnnIsa() at start; this one chooses our kernels and the int8 expansion.
  kernels::Isa isa = kernels::DetectIsa();
  int max_batch = 32;
  int load_threads = 1;  // that make the plan; runs have the threads of their session
  // Cluster layers whose products of code and scale fit s8 may run as int8 over oneDNN where VNNI
  // exists (exact, and faster there).
  bool expand_on_vnni = true;
  // int8 layers run on our own kernels where these are expected to be faster than oneDNN's. Off, to
  // compare with oneDNN: only where oneDNN would be wrong.
  bool own_int8 = true;
};

// What runs one node.
struct LayerInfo {
  std::string name;
  std::string op;
  std::string scheme;  // fp32, int8, int4-cluster, int3-cluster, ternary-cluster, u8 (no weights)
  std::string
      implementation;  // "onednn:jit_int8:avx2", "tern:avx2", "tern:table", "float-island", ...
  int64_t macs = 0;    // per image
};

// What a run does between the operators.
enum class Conversion {
  kQuantize,    // reals to codes
  kDequantize,  // codes to reals
  kReorder,     // another memory order
  kPad,         // a copy with the border that oneDNN cannot imagine: its padding is code 0
};
inline constexpr int kConversions = 4;
std::string Name(Conversion conversion);  // "quantize", ...

// Where the wall time of a run went. The sum of all but `total` is less than `total` by what lies
// between the steps.
struct RunTimes {
  std::vector<absl::Duration> layers;  // the operators, as in Plan::layers()
  std::array<absl::Duration, kConversions> conversions{};
  absl::Duration total;
};

// How many of a layer's output codes lie at an end of the range of codes: 255, and 0 unless that
// stands for the real 0 (what a ReLU leaves). Those beyond the range are among them.
struct CodeCount {
  int64_t at_limit = 0;
  int64_t total = 0;  // 0: no weights, or no codes at its output
};

class Plan;

// Runs a plan. Create one per thread of execution. Not thread safe.
class Session {
 public:
  ~Session();
  Session(Session&&) noexcept;
  Session& operator=(Session&&) noexcept;

  // The float input buffer, NHWC f32 [max_batch, h, w, c], to be filled before Run.
  absl::Span<float> input();

  // Runs the first `batch` images of input(), which it leaves as they are. Returns logits f32
  // [batch, classes] (an output of rank 3 in c,h,w order), valid until the next call.
  // INVALID_ARGUMENT if batch is not in 1..max_batch; INTERNAL if oneDNN fails.
  absl::StatusOr<absl::Span<const float>> Run(int batch);

  // Makes what a first run of this batch size would make. The objects of the last 12 sizes are
  // kept. Run's errors.
  absl::Status Prepare(int batch);

  // As Run; sets `times`.
  absl::StatusOr<absl::Span<const float>> RunProfiled(int batch, RunTimes& times);

  // As Run; sets `counts`, one for each of Plan::layers(). One more pass over the activations of
  // the layers with weights.
  absl::StatusOr<absl::Span<const float>> RunCounted(int batch, std::vector<CodeCount>& counts);

  // Runs with every graph value kept: returns value `id` as f32 NCHW [batch, ...] after
  // dequantisation. For tests and reports; slow. INVALID_ARGUMENT if `id` is a constant, or was
  // fused away (channel shuffles).
  absl::StatusOr<Tensor> RunAndFetch(int batch, graph::ValueId id);

  const Plan& plan() const;

 private:
  friend class CompiledPlan;
  struct Impl;
  explicit Session(std::unique_ptr<Impl> impl);
  std::unique_ptr<Impl> impl_;
};

// Immutable and thread safe. Held by shared_ptr because sessions keep it alive.
class Plan : public std::enable_shared_from_this<Plan> {
 public:
  // `graph` is optimised (graph::Optimize), float or quantised; copied as needed.
  // INVALID_ARGUMENT if it is not valid; UNIMPLEMENTED naming the node if no implementation takes
  // it; INTERNAL with oneDNN's status otherwise.
  static absl::StatusOr<std::shared_ptr<const Plan>> Create(const graph::Graph& graph,
                                                            const PlanOptions& options);
  virtual ~Plan() = default;

  // A session whose runs use `threads` OpenMP threads, prepared for batches of 1.
  virtual absl::StatusOr<Session> NewSession(int threads) const = 0;

  // Input sample shape, [c, h, w].
  virtual const Shape& input_shape() const = 0;
  virtual int64_t classes() const = 0;
  virtual int max_batch() const = 0;
  virtual const std::vector<LayerInfo>& layers() const = 0;
  // Bytes of packed weights (shared), and of activations per session.
  virtual size_t weight_bytes() const = 0;
  virtual size_t activation_bytes() const = 0;
};

// Caps oneDNN's instruction set for the whole process; call once before any plan is made.
// `isa` kAvx2 -> AVX2, kScalar -> SSE4.1 (oneDNN's lowest). Logs and returns
// FAILED_PRECONDITION if oneDNN has already chosen.
absl::Status CapOneDnnIsa(kernels::Isa isa);

// "2.6.3": the oneDNN that runs.
std::string OneDnnVersion();

// Converts f32 NCHW [n,c,h,w] to the NHWC input buffer.
void NchwToNhwc(const float* src, int64_t n, int64_t c, int64_t h, int64_t w, float* dst);

}  // namespace tern::engine

#endif  // TERN_SERVER_ENGINE_PLAN_H_
