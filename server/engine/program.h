// What a Plan executes: buffers, and steps over them in order.
#ifndef TERN_SERVER_ENGINE_PROGRAM_H_
#define TERN_SERVER_ENGINE_PROGRAM_H_

#include <cstdint>
#include <functional>
#include <optional>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "server/base/aligned_buffer.h"
#include "server/engine/onednn.h"
#include "server/engine/plan.h"
#include "server/engine/strided.h"
#include "server/graph/graph.h"

namespace tern::engine {

// Element type and memory order of one sample. Ranks other than 3 are row-major in every format.
enum class Format : uint8_t {
  kU8,          // [h,w,c]
  kF32,         // [h,w,c]
  kF32Planar,   // [c,h,w]
  kF32Blocked,  // [ceil(c/8),h,w,8], missing channels zero
  kS32,         // [h,w,c]: sums of products before a fixed-point epilogue; never a value
};
inline constexpr int64_t kChannelBlock = 8;

// The memory of one tensor. Samples lie one behind the other.
struct Buffer {
  Format format = Format::kF32;
  Shape shape;
  int64_t sample_elements = 0;
  size_t sample_bytes = 0;
  int max_samples = 0;  // that it holds at once; 0: Program::max_batch
  int constant = -1;    // index in Program::constants; then it holds one sample and no arena memory
  int view_of = -1;     // another buffer (not a view itself) whose memory this is
  bool pinned = false;  // input: lives from the first step on; all: until after the last
  // Set by PlanMemory.
  int first = -1, last = -1;  // steps that write and last read it
  size_t offset = 0;          // in the arena
};

struct Program;

// One run of a session, as the steps see it.
struct RunContext {
  const Program* program = nullptr;
  char* arena = nullptr;
  char* scratch = nullptr;  // Program::scratch_bytes for each thread
  int batch = 1;
  int threads = 1;

  template <typename T>
  T* at(int buffer) const;
  char* thread_scratch() const;  // of the calling OpenMP thread
};

// A oneDNN primitive bound to a session's memory and to a batch; or `run`, bound to them as well.
struct Executable {
  dnnl::primitive primitive;
  onednn::Args args;
  dnnl::memory::desc scratchpad;      // bound by the session to memory that all its steps share
  std::vector<dnnl_exec_arg_t> flat;  // of `args`, set by the session
  std::shared_ptr<const onednn::Primitive> shared;  // kept for other sessions
  std::function<void(dnnl::stream&)> run;
};

// `to` may take the memory of `from` if this step reads it for the last time, and once.
struct InPlace {
  int from = -1;
  int to = -1;
};

// Either `loop` or `make` is set. Both are thread safe: all state is in the context.
struct Step {
  int node = 0;                          // whose time it counts as,
  std::optional<Conversion> conversion;  // unless it is one of these
  std::vector<int> reads, writes;
  std::vector<InPlace> in_place;     // first possible one wins
  int copy_from = -1, copy_to = -1;  // buffers: copied before the step unless they share memory
  std::function<void(const RunContext&)> loop;
  std::function<Executable(const RunContext&)> make;  // throws dnnl::error
};

struct Program {
  Shape input_shape;
  int64_t classes = 0;
  int max_batch = 1;
  kernels::Isa isa = kernels::Isa::kScalar;
  std::vector<Buffer> buffers;
  std::vector<Step> steps;
  std::vector<AlignedBuffer> constants;
  std::vector<LayerInfo> layers;
  std::vector<graph::ValueId> layer_value;  // by layer: its output
  int input = -1, output = -1;              // buffers
  std::vector<int>
      value_buffer;  // by ValueId: the buffer as defined (u8 if quantised), or -1 where fused away
  std::vector<int> value_step;  // steps to run for it
  std::vector<graph::Value> values;
  size_t scratch_bytes = 0;  // per thread
  size_t arena_bytes = 0;
  size_t weight_bytes = 0;
};

template <typename T>
T* RunContext::at(int buffer) const {
  const Buffer& b = program->buffers[buffer];
  if (b.constant >= 0) return const_cast<T*>(program->constants[b.constant].as<T>());
  return reinterpret_cast<T*>(arena + b.offset);
}

// Strides of a sample in `format`, which must not be blocked.
inline Strides FormatStrides(Format format, const Shape& shape) {
  return format == Format::kF32Planar ? RowMajorStrides(shape) : NhwcStrides(shape);
}

// Turns an optimised, validated graph into steps, without addresses.
absl::StatusOr<Program> Lower(const graph::Graph& graph, const PlanOptions& options);

// Gives buffers their arena offsets: tensors whose lives do not overlap share memory (greedy,
// largest first), and in-place wishes come true where the source dies.
void PlanMemory(Program& program);

}  // namespace tern::engine

#endif  // TERN_SERVER_ENGINE_PROGRAM_H_
