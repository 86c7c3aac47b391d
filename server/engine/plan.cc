#include "server/engine/plan.h"

#include <algorithm>
#include <cstring>
#include <list>
#include <utility>

#include "absl/strings/str_cat.h"
#include "server/base/log.h"
#include "server/base/status_macros.h"
#include "server/engine/program.h"
#include "server/kernels/elementwise.h"

namespace tern::engine {
namespace {

// oneDNN objects are made per batch size; a session keeps those of this many, the least recently
// used goes.
constexpr size_t kPreparedBatches = 12;

}  // namespace

class CompiledPlan : public Plan {
 public:
  // A layer whose output codes can be counted once `steps` steps have run.
  struct Countable {
    int steps = 0;
    int layer = 0;
    int buffer = 0;
    bool floor_is_limit = false;  // code 0 stands for a real other than 0
  };

  explicit CompiledPlan(Program program) : program_(std::move(program)) {
    for (size_t l = 0; l < program_.layers.size(); ++l) {
      const graph::ValueId id = program_.layer_value[l];
      const int b = program_.value_buffer[id];
      if (program_.layers[l].macs == 0 || b < 0) continue;
      if (program_.buffers[b].format != Format::kU8 || !program_.values[id].quant) continue;
      countable_.push_back({program_.value_step[id], static_cast<int>(l), b,
                            program_.values[id].quant->zero_point != 0});
    }
    std::stable_sort(countable_.begin(), countable_.end(),
                     [](const Countable& x, const Countable& y) { return x.steps < y.steps; });
  }

  absl::StatusOr<Session> NewSession(int threads) const override;
  const Shape& input_shape() const override { return program_.input_shape; }
  int64_t classes() const override { return program_.classes; }
  int max_batch() const override { return program_.max_batch; }
  const std::vector<LayerInfo>& layers() const override { return program_.layers; }
  size_t weight_bytes() const override { return program_.weight_bytes; }
  size_t activation_bytes() const override { return program_.arena_bytes; }
  const Program& program() const { return program_; }
  const std::vector<Countable>& countable() const { return countable_; }

 private:
  const Program program_;
  std::vector<Countable> countable_;  // by steps
};

struct Session::Impl {
  // The oneDNN objects of one batch size, one per step (empty for loops).
  struct Prepared {
    int batch = 0;
    std::vector<Executable> executables;
    AlignedBuffer scratchpad;  // the largest of the executables'
  };

  Impl(std::shared_ptr<const CompiledPlan> plan_in, int threads_in)
      : plan(std::move(plan_in)),
        threads(threads_in),
        arena(plan->program().arena_bytes),
        scratch(plan->program().scratch_bytes * threads),
        stream(onednn::Engine()) {}

  RunContext Context(int batch) {
    return {&plan->program(), arena.as<char>(), scratch.as<char>(), batch, threads};
  }

  absl::Status CheckBatch(int batch) const {
    if (batch >= 1 && batch <= plan->max_batch()) return absl::OkStatus();
    return absl::InvalidArgumentError(
        absl::StrCat("got a batch of ", batch, ", wanted 1..", plan->max_batch()));
  }

  absl::StatusOr<const Prepared*> Prepare(int batch) {
    for (auto it = prepared.begin(); it != prepared.end(); ++it) {
      if (it->batch != batch) continue;
      prepared.splice(prepared.begin(), prepared, it);
      return &prepared.front();
    }
    Prepared made;
    made.batch = batch;
    const auto& steps = plan->program().steps;
    made.executables.resize(steps.size());
    const RunContext context = Context(batch);
    size_t scratchpad_bytes = 0;
    for (size_t s = 0; s < steps.size(); ++s) {
      if (!steps[s].make) continue;
      TERN_RETURN_IF_ERROR(onednn::Guard(
          absl::StrCat("node ", plan->layers()[steps[s].node].name, " at batch ", batch), [&] {
            made.executables[s] = steps[s].make(context);
            scratchpad_bytes =
                std::max(scratchpad_bytes, made.executables[s].scratchpad.get_size());
          }));
    }
    TERN_RETURN_IF_ERROR(onednn::Guard("preparing a session", [&] {
      made.scratchpad = AlignedBuffer(scratchpad_bytes);
      for (Executable& executable : made.executables) {
        if (executable.scratchpad.get_size() > 0) {
          executable.args.emplace(
              DNNL_ARG_SCRATCHPAD,
              dnnl::memory(executable.scratchpad, onednn::Engine(), made.scratchpad.as<char>()));
        }
        executable.flat = onednn::Flatten(executable.args);
      }
    }));
    prepared.push_front(std::move(made));
    if (prepared.size() > kPreparedBatches) prepared.pop_back();
    return &prepared.front();
  }

  // Runs the first `steps` steps; `times` and `counts` may be null.
  absl::Status RunSteps(int batch, size_t steps, RunTimes* times, std::vector<CodeCount>* counts) {
    const absl::Time start = times != nullptr ? absl::Now() : absl::Time();
    TERN_RETURN_IF_ERROR(CheckBatch(batch));
    onednn::ScopedThreads team(threads);
    TERN_ASSIGN_OR_RETURN(const Prepared* now, Prepare(batch));
    const RunContext context = Context(batch);
    const Program& program = plan->program();
    return onednn::Guard("running a plan", [&] {
      absl::Time begin = times != nullptr ? absl::Now() : absl::Time();
      auto countable = plan->countable().begin();
      for (size_t s = 0; s < steps; ++s) {
        const Step& step = program.steps[s];
        if (step.copy_from >= 0) {
          char* to = context.at<char>(step.copy_to);
          const char* from = context.at<char>(step.copy_from);
          if (to != from) std::memcpy(to, from, program.buffers[step.copy_to].sample_bytes * batch);
        }
        if (step.loop) {
          step.loop(context);
        } else if (now->executables[s].run) {
          now->executables[s].run(stream);
        } else {
          onednn::Execute(now->executables[s].primitive, stream, now->executables[s].flat);
        }
        if (times != nullptr) {
          const absl::Time end = absl::Now();
          (step.conversion ? times->conversions[static_cast<int>(*step.conversion)]
                           : times->layers[step.node]) += end - begin;
          begin = end;
        }
        if (counts == nullptr) continue;
        for (; countable != plan->countable().end() && countable->steps <= static_cast<int>(s) + 1;
             ++countable) {
          const int64_t codes = program.buffers[countable->buffer].sample_elements * batch;
          const uint8_t* q = context.at<uint8_t>(countable->buffer);
          int64_t at_limit = std::count(q, q + codes, uint8_t{255});
          if (countable->floor_is_limit) at_limit += std::count(q, q + codes, uint8_t{0});
          (*counts)[countable->layer] = {at_limit, codes};
        }
      }
      if (times != nullptr) times->total = begin - start;
    });
  }

  absl::StatusOr<absl::Span<const float>> Run(int batch, RunTimes* times,
                                              std::vector<CodeCount>* counts) {
    TERN_RETURN_IF_ERROR(RunSteps(batch, plan->program().steps.size(), times, counts));
    return absl::MakeConstSpan(Context(batch).at<float>(plan->program().output),
                               batch * plan->classes());
  }

  std::shared_ptr<const CompiledPlan> plan;
  int threads;
  AlignedBuffer arena;
  AlignedBuffer scratch;
  dnnl::stream stream;
  std::list<Prepared> prepared;  // most recently used first
};

Session::Session(std::unique_ptr<Impl> impl) : impl_(std::move(impl)) {}
Session::~Session() = default;
Session::Session(Session&&) noexcept = default;
Session& Session::operator=(Session&&) noexcept = default;

absl::Span<float> Session::input() {
  const int64_t elements = impl_->plan->input_shape().elements() * impl_->plan->max_batch();
  return absl::MakeSpan(impl_->Context(1).at<float>(impl_->plan->program().input), elements);
}

absl::Status Session::Prepare(int batch) {
  TERN_RETURN_IF_ERROR(impl_->CheckBatch(batch));
  onednn::ScopedThreads team(impl_->threads);
  return impl_->Prepare(batch).status();
}

absl::StatusOr<absl::Span<const float>> Session::Run(int batch) {
  return impl_->Run(batch, nullptr, nullptr);
}

absl::StatusOr<absl::Span<const float>> Session::RunProfiled(int batch, RunTimes& times) {
  times.layers.assign(impl_->plan->layers().size(), absl::ZeroDuration());
  times.conversions = {};
  return impl_->Run(batch, &times, nullptr);
}

absl::StatusOr<absl::Span<const float>> Session::RunCounted(int batch,
                                                            std::vector<CodeCount>& counts) {
  counts.assign(impl_->plan->layers().size(), {});
  return impl_->Run(batch, nullptr, &counts);
}

absl::StatusOr<Tensor> Session::RunAndFetch(int batch, graph::ValueId id) {
  const Program& program = impl_->plan->program();
  if (id < 0 || id >= static_cast<int>(program.value_buffer.size()) ||
      program.value_buffer[id] < 0) {
    return absl::InvalidArgumentError(
        absl::StrCat("value ", id, " is not held in memory of its own"));
  }
  // The value is whole after the step that writes it; later steps may reuse its memory.
  TERN_RETURN_IF_ERROR(impl_->RunSteps(batch, program.value_step[id], nullptr, nullptr));
  const graph::Value& value = program.values[id];
  const int b = program.value_buffer[id];
  const Buffer& buffer = program.buffers[b];
  const RunContext context = impl_->Context(batch);
  Tensor result(DType::kF32, value.shape.WithBatch(batch));
  const std::vector<int64_t> dims = value.shape.WithBatch(batch).dims();
  const Strides to = RowMajorStrides(result.shape());
  float* out = result.data<float>().data();
  if (buffer.format == Format::kU8) {
    Strides from = NhwcStrides(value.shape);
    from = from.Behind(buffer.sample_elements);
    StridedMap(dims, out, to, context.at<uint8_t>(b), from,
               [&](uint8_t q) { return value.quant->Dequantize(q); });
    return result;
  }
  const float* src = context.at<float>(b);
  if (buffer.format == Format::kF32Blocked) {
    const int64_t channels = value.shape[0], pixels = value.shape[1] * value.shape[2];
    for (int64_t n = 0; n < batch; ++n) {
      for (int64_t c = 0; c < channels; ++c) {
        const float* plane = src + n * buffer.sample_elements +
                             c / kChannelBlock * pixels * kChannelBlock + c % kChannelBlock;
        for (int64_t p = 0; p < pixels; ++p)
          out[(n * channels + c) * pixels + p] = plane[p * kChannelBlock];
      }
    }
    return result;
  }
  Strides from = FormatStrides(buffer.format, value.shape);
  from = from.Behind(buffer.sample_elements);
  StridedMap(dims, out, to, src, from, [](float v) { return v; });
  return result;
}

const Plan& Session::plan() const { return *impl_->plan; }

absl::StatusOr<Session> CompiledPlan::NewSession(int threads) const {
  if (threads < 1)
    return absl::InvalidArgumentError(absl::StrCat("got ", threads, " threads, wanted at least 1"));
  std::unique_ptr<Session::Impl> impl;
  try {
    impl = std::make_unique<Session::Impl>(
        std::static_pointer_cast<const CompiledPlan>(shared_from_this()), threads);
  } catch (const std::bad_alloc&) {
    return absl::ResourceExhaustedError(absl::StrCat(
        "no memory for a session's ", program_.arena_bytes >> 20, " MiB of activations"));
  }
  onednn::ScopedThreads team(threads);
  TERN_RETURN_IF_ERROR(impl->Prepare(1).status());
  return Session(std::move(impl));
}

absl::StatusOr<std::shared_ptr<const Plan>> Plan::Create(const graph::Graph& graph,
                                                         const PlanOptions& options) {
  if (options.max_batch < 1) {
    return absl::InvalidArgumentError(
        absl::StrCat("got max_batch ", options.max_batch, ", wanted at least 1"));
  }
  if (options.isa > kernels::DetectIsa()) {
    return absl::InvalidArgumentError(
        absl::StrCat("this CPU has no ", kernels::IsaName(options.isa)));
  }
  TERN_RETURN_IF_ERROR(graph::Validate(graph));
  onednn::ScopedThreads team(1);
  try {
    TERN_ASSIGN_OR_RETURN(Program program, Lower(graph, options));
    program.scratch_bytes = (program.scratch_bytes + AlignedBuffer::kAlignment - 1) /
                            AlignedBuffer::kAlignment * AlignedBuffer::kAlignment;
    PlanMemory(program);
    return std::make_shared<const CompiledPlan>(std::move(program));
  } catch (const dnnl::error& e) {
    return absl::InternalError(absl::StrCat("oneDNN, making a plan: ", e.what()));
  } catch (const std::bad_alloc&) {
    return absl::ResourceExhaustedError("no memory for the plan's weights");
  }
}

std::string Name(Conversion conversion) {
  switch (conversion) {
    case Conversion::kQuantize:
      return "quantize";
    case Conversion::kDequantize:
      return "dequantize";
    case Conversion::kReorder:
      return "reorder";
    case Conversion::kPad:
      return "pad";
  }
  return "";
}

std::string OneDnnVersion() { return onednn::Version(); }

absl::Status CapOneDnnIsa(kernels::Isa isa) {
  if (isa == kernels::Isa::kAvx512Vnni) return absl::OkStatus();
  const auto cap = isa == kernels::Isa::kAvx2 ? dnnl::cpu_isa::avx2 : dnnl::cpu_isa::sse41;
  const dnnl::status status = dnnl::set_max_cpu_isa(cap);
  if (status == dnnl::status::success) return absl::OkStatus();
  const std::string message = absl::StrCat("oneDNN cannot be capped at ", kernels::IsaName(isa),
                                           ": it already runs with ", onednn::IsaName());
  TERN_LOG_ERROR("{}", message);
  return absl::FailedPreconditionError(message);
}

void NchwToNhwc(const float* src, int64_t n, int64_t c, int64_t h, int64_t w, float* dst) {
  StridedMap({n, c, h, w}, dst, Strides{h * w * c, 1, w * c, c}, src,
             Strides{c * h * w, h * w, w, 1}, [](float v) { return v; });
}

}  // namespace tern::engine
