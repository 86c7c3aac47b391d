#include "server/quant/distill.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <numeric>
#include <random>

#include "absl/strings/str_cat.h"
#include "absl/time/clock.h"
#include "server/base/status_macros.h"
#include "server/engine/plan.h"
#include "server/graph/fixed_point.h"
#include "server/quant/student.h"

namespace tern::quant {
namespace {

using graph::Graph;

// Values and derivatives of one pass may take about this much memory; a pass of more is slower
// (MobileNet v2: by a third with 1 GiB), because fresh pages and cache misses cost more than calls.
constexpr int64_t kPassMemory = int64_t{1} << 28;
// The views that blocks learn from.
constexpr int64_t kViewsMemory = int64_t{1} << 30;
constexpr int kEngineBatch = 16;
// Softened outputs tell more about the order of the unlikely classes (Hinton et al. 2015).
constexpr float kTemperature = 2.0f;

bool IsSet(const std::atomic<bool>* flag) {
  return flag != nullptr && flag->load(std::memory_order_relaxed);
}
absl::Status Cancelled() { return absl::CancelledError("quantisation cancelled"); }

void Softmax(const float* logits, int64_t classes, float temperature, std::vector<double>& out) {
  out.resize(classes);
  const float largest = *std::max_element(logits, logits + classes);
  double sum = 0;
  for (int64_t k = 0; k < classes; ++k) {
    out[k] = std::exp(static_cast<double>(logits[k] - largest) / temperature);
    sum += out[k];
  }
  for (double& v : out) v /= sum;
}

// Random views of images: mirrored or not, moved by up to a sixteenth of their size with the border
// repeated, half of them blended with another image of the batch.
class Augmenter {
 public:
  Augmenter(const Shape& sample, uint64_t seed)
      : c_(sample[0]), h_(sample[1]), w_(sample[2]), random_(seed) {}

  Tensor Batch(const Tensor& images, absl::Span<const int64_t> which) {
    Tensor batch(DType::kF32, Shape{c_, h_, w_}.WithBatch(static_cast<int64_t>(which.size())));
    float* out = batch.data<float>().data();
    for (int64_t image : which) {
      const float* in = images.data<float>().data() + image * c_ * h_ * w_;
      const bool mirrored = (random_() >> 20 & 1) != 0;
      const int64_t dy = Shift(h_), dx = Shift(w_);
      for (int64_t c = 0; c < c_; ++c) {
        for (int64_t y = 0; y < h_; ++y) {
          const float* row = in + (c * h_ + std::clamp<int64_t>(y + dy, 0, h_ - 1)) * w_;
          for (int64_t x = 0; x < w_; ++x) {
            const int64_t at = std::clamp<int64_t>(x + dx, 0, w_ - 1);
            *out++ = row[mirrored ? w_ - 1 - at : at];
          }
        }
      }
    }
    // Blends of two images: as many inputs as one likes, and the teacher answers all of them.
    const int64_t n = static_cast<int64_t>(which.size()), elements = c_ * h_ * w_;
    float* data = batch.data<float>().data();
    if (n > 1) {
      const std::vector<float> plain(data, data + n * elements);
      for (int64_t i = 0; i < n; ++i) {
        if ((random_() >> 20 & 1) != 0) continue;
        const double u = static_cast<double>(random_() >> 11) * 0x1.0p-53;
        const float own = static_cast<float>(0.5 + 0.5 * u);
        const float* other = &plain[(i + 1) % n * elements];
        for (int64_t k = 0; k < elements; ++k)
          data[i * elements + k] = own * data[i * elements + k] + (1 - own) * other[k];
      }
    }
    return batch;
  }

 private:
  int64_t Shift(int64_t extent) {
    const int64_t most = (extent + 8) / 16;
    return static_cast<int64_t>(random_() % static_cast<uint64_t>(2 * most + 1)) - most;
  }

  const int64_t c_, h_, w_;
  std::mt19937_64 random_;
};

// Draws images without repetition until all were drawn, then starts over.
class Drawer {
 public:
  Drawer(absl::Span<const int64_t> which, uint64_t seed)
      : order_(which.begin(), which.end()), random_(seed), next_(order_.size()) {}

  std::vector<int64_t> Draw(size_t count) {
    std::vector<int64_t> result;
    while (result.size() < count) {
      if (next_ == order_.size()) {
        for (size_t i = order_.size(); i > 1; --i) std::swap(order_[i - 1], order_[random_() % i]);
        next_ = 0;
      }
      result.push_back(order_[next_++]);
    }
    return result;
  }

 private:
  std::vector<int64_t> order_;
  std::mt19937_64 random_;
  size_t next_;
};

// A float network over the engine, on NCHW batches of any size.
class Teacher {
 public:
  static absl::StatusOr<Teacher> Create(const Graph& graph, engine::PlanOptions options,
                                        int threads) {
    options.max_batch = kEngineBatch;
    TERN_ASSIGN_OR_RETURN(const std::shared_ptr<const engine::Plan> plan,
                          engine::Plan::Create(graph, options));
    TERN_ASSIGN_OR_RETURN(engine::Session session, plan->NewSession(threads));
    return Teacher(plan->input_shape(), plan->classes(), std::move(session));
  }

  // [n, classes]
  absl::StatusOr<Tensor> Run(const Tensor& batch) {
    const int64_t n = batch.shape()[0], elements = shape_.elements();
    Tensor logits(DType::kF32, Shape{n, classes_});
    for (int64_t first = 0; first < n; first += kEngineBatch) {
      const int64_t count = std::min<int64_t>(kEngineBatch, n - first);
      engine::NchwToNhwc(batch.data<float>().data() + first * elements, count, shape_[0], shape_[1],
                         shape_[2], session_.input().data());
      TERN_ASSIGN_OR_RETURN(const absl::Span<const float> result,
                            session_.Run(static_cast<int>(count)));
      std::copy(result.begin(), result.begin() + count * classes_,
                logits.data<float>().begin() + first * classes_);
    }
    return logits;
  }

 private:
  Teacher(Shape shape, int64_t classes, engine::Session session)
      : shape_(std::move(shape)), classes_(classes), session_(std::move(session)) {}
  Shape shape_;
  int64_t classes_;
  engine::Session session_;
};

// d/d(student) of T^2 KL(teacher || student) summed over the batch, over `scale` images.
Tensor DivergenceGradient(const Tensor& teacher, const Tensor& student, double scale) {
  Tensor gradient(DType::kF32, student.shape());
  const int64_t n = teacher.shape()[0], classes = teacher.elements() / n;
  std::vector<double> wanted, got;
  for (int64_t i = 0; i < n; ++i) {
    Softmax(teacher.data<float>().data() + i * classes, classes, kTemperature, wanted);
    Softmax(student.data<float>().data() + i * classes, classes, kTemperature, got);
    for (int64_t k = 0; k < classes; ++k) {
      gradient.data<float>()[i * classes + k] =
          static_cast<float>(kTemperature * (got[k] - wanted[k]) / scale);
    }
  }
  return gradient;
}

double StandardDeviation(const Tensor& logits) {
  const int64_t n = logits.shape()[0], classes = logits.elements() / n;
  double sum = 0;
  for (int64_t i = 0; i < n; ++i) {
    const float* row = logits.data<float>().data() + i * classes;
    double mean = 0, square = 0;
    for (int64_t k = 0; k < classes; ++k) {
      mean += row[k];
      square += static_cast<double>(row[k]) * row[k];
    }
    mean /= static_cast<double>(classes);
    sum += std::sqrt(std::max(0.0, square / static_cast<double>(classes) - mean * mean));
  }
  return std::max(1e-3, sum / static_cast<double>(n));
}

// Steps of Adam in theta and beta.
constexpr Student::Rates kRates = {2e-3f, 1e-3f};

struct Schedule {
  int batch = 0, steps = 0;
  Student::Rates rates;

  Student::Rates At(int step) const {
    const float warm = std::min(1.0f, static_cast<float>(step + 1) / 10.0f);
    const float cosine = 0.5f * (1 + std::cos(static_cast<float>(M_PI) * static_cast<float>(step) /
                                              static_cast<float>(steps)));
    return {rates.theta * warm * cosine, rates.beta * warm * cosine};
  }
};

// Steps, and images in each: small networks learn from small images, of which more cost little.
constexpr double kSmallNetwork = 2e8;  // multiply-accumulates
constexpr int kSmallSteps = 300, kSmallBatch = 50;
constexpr int kSteps = 150, kBatch = 20, kLeastSteps = 60;
// Multiply-accumulates of all passes: less than kSteps where they would take more, some five
// minutes of two cores.
constexpr double kWork = 2e13;

Schedule MakeSchedule(const Graph& graph) {
  double macs = 1;
  for (const graph::Node& node : graph.nodes)
    macs += static_cast<double>(graph::MultiplyAccumulates(graph, node));
  if (macs < kSmallNetwork) return {kSmallBatch, kSmallSteps, kRates};
  // The float network forward, the student forward, and backward twice as much.
  const double affordable = kWork / (4 * macs * kBatch);
  return {kBatch, static_cast<int>(std::clamp<double>(affordable, kLeastSteps, kSteps)), kRates};
}

absl::Status TrainNetwork(const Graph& reference, const Tensor& images,
                          absl::Span<const int64_t> train, const DistillOptions& options,
                          Student& student, Teacher& teacher, v1::DistillationReport& report) {
  Schedule schedule = MakeSchedule(reference);
  if (options.steps > 0) schedule.steps = options.steps;
  const NodeRange whole = student.whole();
  // Values, their derivatives and the temporary ones of a layer.
  const int64_t micro = std::clamp<int64_t>(
      kPassMemory / std::max<int64_t>(1, 3 * student.BytesPerImage(whole)), 1, schedule.batch);
  Drawer drawer(train, options.seed + 1);
  Augmenter augmenter(reference.shape(reference.input), options.seed + 2);
  for (int step = 0; step < schedule.steps; ++step) {
    const std::vector<int64_t> drawn = drawer.Draw(schedule.batch);
    for (int64_t first = 0; first < schedule.batch; first += micro) {
      if (IsSet(options.cancelled)) return Cancelled();
      const Tensor batch =
          augmenter.Batch(images, absl::MakeConstSpan(drawn).subspan(
                                      first, std::min<int64_t>(micro, schedule.batch - first)));
      TERN_ASSIGN_OR_RETURN(const Tensor wanted, teacher.Run(batch));
      TERN_ASSIGN_OR_RETURN(const std::vector<Tensor> values, student.Forward(whole, batch, true));
      if (IsSet(options.cancelled)) return Cancelled();
      TERN_RETURN_IF_ERROR(student.Backward(
          whole, values, DivergenceGradient(wanted, values[whole.output], schedule.batch)));
    }
    student.Step(whole, schedule.At(step));
    if (options.progress) options.progress(static_cast<double>(step + 1) / schedule.steps);
  }
  report.set_steps(schedule.steps);
  return absl::OkStatus();
}

// Draws views once, then trains block after block on them: from what the blocks before it give to
// what the float network gives.
absl::Status TrainBlocks(const Graph& reference, const Tensor& images,
                         absl::Span<const int64_t> train, const DistillOptions& options,
                         Student& student, v1::DistillationReport& report) {
  const std::vector<NodeRange> blocks = student.Blocks();
  constexpr int kBatches = 40, kImages = 10, kEpochs = 2;
  Student teacher(reference, 1, options.threads);  // float: without parameters
  Drawer drawer(train, options.seed + 1);
  Augmenter augmenter(reference.shape(reference.input), options.seed + 2);
  std::vector<Tensor> given, wanted;  // by batch, at the start of the block
  const int64_t bytes = 4 * reference.shape(reference.input).elements();
  int64_t largest = bytes;
  for (const NodeRange& block : blocks)
    largest = std::max(largest, 4 * reference.shape(block.output).elements());
  const int batches =
      static_cast<int>(std::clamp<int64_t>(kViewsMemory / (2 * kImages * largest), 4, kBatches));
  for (int i = 0; i < batches; ++i) {
    given.push_back(augmenter.Batch(images, drawer.Draw(kImages)));
    wanted.push_back(given.back());
  }
  uint64_t steps = 0;
  for (size_t k = 0; k < blocks.size(); ++k) {
    const NodeRange& block = blocks[k];
    double mean = 0, square = 0, count = 0;
    for (Tensor& batch : wanted) {
      if (IsSet(options.cancelled)) return Cancelled();
      TERN_ASSIGN_OR_RETURN(std::vector<Tensor> values, teacher.Forward(block, batch, false));
      batch = std::move(values[block.output]);
      for (float v : batch.data<float>()) {
        mean += v;
        square += static_cast<double>(v) * v;
      }
      count += static_cast<double>(batch.elements());
    }
    mean /= count;
    // Squared error as a share of the target's variance, so that every block learns alike.
    const double variance = std::max(square / count - mean * mean, 1e-12);
    Schedule schedule;
    schedule.steps = kEpochs * batches;
    schedule.rates = kRates;
    for (int step = 0; step < schedule.steps; ++step) {
      if (IsSet(options.cancelled)) return Cancelled();
      const Tensor& target = wanted[step % batches];
      TERN_ASSIGN_OR_RETURN(const std::vector<Tensor> values,
                            student.Forward(block, given[step % batches], true));
      Tensor gradient = values[block.output];
      const double factor = 2 / (variance * static_cast<double>(gradient.elements()));
      const auto g = gradient.data<float>();
      const auto t = target.data<float>();
      for (size_t i = 0; i < g.size(); ++i)
        g[i] = static_cast<float>(factor * (static_cast<double>(g[i]) - t[i]));
      TERN_RETURN_IF_ERROR(student.Backward(block, values, std::move(gradient)));
      student.Step(block, schedule.At(step));
      ++steps;
    }
    for (Tensor& batch : given) {
      TERN_ASSIGN_OR_RETURN(std::vector<Tensor> values, student.Forward(block, batch, false));
      batch = std::move(values[block.output]);
    }
    if (options.progress) {
      options.progress(static_cast<double>(k + 1) / static_cast<double>(blocks.size()));
    }
  }
  report.set_steps(steps);
  return absl::OkStatus();
}

}  // namespace

Tensor TakeImages(const Tensor& images, absl::Span<const int64_t> which) {
  std::vector<int64_t> dims = images.shape().dims();
  const int64_t elements = images.elements() / dims[0];
  dims[0] = static_cast<int64_t>(which.size());
  Tensor result(DType::kF32, Shape(dims));
  for (size_t i = 0; i < which.size(); ++i) {
    std::memcpy(result.data<float>().data() + static_cast<int64_t>(i) * elements,
                images.data<float>().data() + which[i] * elements, elements * sizeof(float));
  }
  return result;
}

absl::StatusOr<Tensor> RunEngine(const Graph& graph, const Tensor& images,
                                 absl::Span<const int64_t> which, const engine::PlanOptions& plan,
                                 int threads, const std::atomic<bool>* cancelled) {
  TERN_ASSIGN_OR_RETURN(Teacher network, Teacher::Create(graph, plan, threads));
  Tensor result(DType::kF32, Shape{static_cast<int64_t>(which.size()), graph.classes()});
  for (size_t first = 0; first < which.size(); first += kEngineBatch) {
    if (IsSet(cancelled)) return Cancelled();
    const auto part = which.subspan(first, std::min<size_t>(kEngineBatch, which.size() - first));
    TERN_ASSIGN_OR_RETURN(const Tensor logits, network.Run(TakeImages(images, part)));
    std::copy(logits.data<float>().begin(), logits.data<float>().end(),
              result.data<float>().begin() + first * graph.classes());
  }
  return result;
}

Closeness Compare(const Tensor& wanted, const Tensor& got) {
  const int64_t n = wanted.shape()[0], classes = n > 0 ? wanted.elements() / n : 0;
  Closeness result;
  std::vector<double> p, q;
  for (int64_t i = 0; i < n; ++i) {
    const float* a = wanted.data<float>().data() + i * classes;
    const float* b = got.data<float>().data() + i * classes;
    Softmax(a, classes, 1, p);
    Softmax(b, classes, 1, q);
    double divergence = 0;
    for (int64_t k = 0; k < classes; ++k)
      divergence += p[k] * std::log(std::max(p[k], 1e-30) / std::max(q[k], 1e-30));
    result.divergence += divergence / static_cast<double>(n);
    const bool same = std::max_element(a, a + classes) - a == std::max_element(b, b + classes) - b;
    result.agreement += same / static_cast<double>(n);
  }
  return result;
}

absl::StatusOr<v1::DistillationReport> Distill(const Graph& reference, const Tensor& images,
                                               absl::Span<const int64_t> train,
                                               absl::Span<const int64_t> held_out,
                                               const DistillOptions& options, Graph& quantised) {
  if (reference.nodes.size() != quantised.nodes.size()) {
    return absl::InvalidArgumentError(absl::StrCat("the quantised network has ",
                                                   quantised.nodes.size(), " nodes, the float one ",
                                                   reference.nodes.size()));
  }
  const absl::Time start = absl::Now();
  v1::DistillationReport report;
  report.set_kind(options.kind == v1::DISTILL_BLOCKS ? v1::DISTILL_BLOCKS : v1::DISTILL_NETWORK);
  TERN_ASSIGN_OR_RETURN(Teacher teacher, Teacher::Create(reference, options.plan, options.threads));
  Tensor wanted;
  Closeness before;
  const auto measure = [&](const Graph& graph) -> absl::StatusOr<Closeness> {
    TERN_ASSIGN_OR_RETURN(const Tensor got, RunEngine(graph, images, held_out, options.plan,
                                                      options.threads, options.cancelled));
    return Compare(wanted, got);
  };
  if (!held_out.empty()) {
    TERN_ASSIGN_OR_RETURN(wanted, RunEngine(reference, images, held_out, options.plan,
                                            options.threads, options.cancelled));
    TERN_ASSIGN_OR_RETURN(before, measure(quantised));
  }
  report.set_loss_before(before.divergence);
  report.set_agreement_before(before.agreement);

  TERN_ASSIGN_OR_RETURN(
      const Tensor sample,
      teacher.Run(TakeImages(images, train.subspan(0, std::min<size_t>(train.size(), 32)))));
  Student student(quantised, static_cast<float>(StandardDeviation(sample)), options.threads);
  student.StopAt(options.cancelled);
  TERN_RETURN_IF_ERROR(
      options.kind == v1::DISTILL_BLOCKS
          ? TrainBlocks(reference, images, train, options, student, report)
          : TrainNetwork(reference, images, train, options, student, teacher, report));
  Graph trained = quantised;
  student.Store(options.power_of_two_steps, trained);
  if (trained.arithmetic == graph::Arithmetic::kFixedPoint) {
    TERN_RETURN_IF_ERROR(graph::RoundToFixedPoint(trained));
  }

  Closeness after;
  if (!held_out.empty()) {
    TERN_ASSIGN_OR_RETURN(after, measure(trained));
  }
  report.set_loss_after(after.divergence);
  report.set_agreement_after(after.agreement);
  report.set_kept(options.kind != v1::DISTILL_AUTO ||
                  (!held_out.empty() && after.divergence < before.divergence));
  if (report.kept()) quantised = std::move(trained);
  report.set_seconds(absl::ToDoubleSeconds(absl::Now() - start));
  return report;
}

}  // namespace tern::quant
