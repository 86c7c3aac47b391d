// Runs of a session allocate nothing once it is warm. Every malloc of the process is counted, by
// whoever calls it: oneDNN allocates a few small blocks for each of its primitives that a run
// executes, which its interface does not let a caller avoid, so plans of Tern's own kernels must
// reach zero and others may not exceed a bound per primitive.
#include <dlfcn.h>
#include <gtest/gtest.h>

#include <atomic>
#include <cstdlib>

#include "server/engine/plan.h"
#include "server/graph/fixed_point.h"
#include "tests/engine/graph_builder.h"
#include "tests/engine/quantize_graph.h"

#if defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__) || !defined(__GLIBC__)
#define TERN_COUNTS_ALLOCATIONS 0
#else
#define TERN_COUNTS_ALLOCATIONS 1
#endif

namespace {
std::atomic<int64_t> g_allocations{0};
std::atomic<int64_t> g_bytes{0};
}  // namespace

#if TERN_COUNTS_ALLOCATIONS
// glibc's own names, which the executable's definitions hide from everyone, shared libraries and
// operator new included.
extern "C" {
void* __libc_malloc(size_t size);
void* __libc_calloc(size_t count, size_t size);
void* __libc_realloc(void* old, size_t size);
void* __libc_memalign(size_t alignment, size_t size);

void* malloc(size_t size) {
  g_allocations.fetch_add(1, std::memory_order_relaxed);
  g_bytes.fetch_add(static_cast<int64_t>(size), std::memory_order_relaxed);
  return __libc_malloc(size);
}
void* calloc(size_t count, size_t size) {
  g_allocations.fetch_add(1, std::memory_order_relaxed);
  g_bytes.fetch_add(static_cast<int64_t>(count * size), std::memory_order_relaxed);
  return __libc_calloc(count, size);
}
void* realloc(void* old, size_t size) {
  g_allocations.fetch_add(1, std::memory_order_relaxed);
  g_bytes.fetch_add(static_cast<int64_t>(size), std::memory_order_relaxed);
  return __libc_realloc(old, size);
}
void* memalign(size_t alignment, size_t size) {
  g_allocations.fetch_add(1, std::memory_order_relaxed);
  g_bytes.fetch_add(static_cast<int64_t>(size), std::memory_order_relaxed);
  return __libc_memalign(alignment, size);
}
void* aligned_alloc(size_t alignment, size_t size) { return memalign(alignment, size); }
int posix_memalign(void** result, size_t alignment, size_t size) {
  *result = memalign(alignment, size);
  return *result == nullptr ? 12 /* ENOMEM */ : 0;
}
}
#endif

namespace tern::engine {
namespace {

using namespace testing;  // NOLINT(build/namespaces): the builder's vocabulary

// Per executed primitive: oneDNN 2.6 needs up to 8 blocks for the arguments, the context and its
// nested primitives; those that multiply by blocks also take a buffer of some KiB.
constexpr double kPerPrimitive = 12, kBytesPerPrimitive = 16384;

struct Count {
  double allocations = 0, bytes = 0;  // per run
};

Count CountRuns(Session& session, int batch) {
  for (int i = 0; i < 3; ++i) EXPECT_TRUE(session.Run(batch).ok());
  constexpr int kRuns = 8;
  const int64_t allocations = g_allocations, bytes = g_bytes;
  for (int i = 0; i < kRuns; ++i) {
    if (!session.Run(batch).ok()) std::abort();
  }
  return {static_cast<double>(g_allocations - allocations) / kRuns,
          static_cast<double>(g_bytes - bytes) / kRuns};
}

// The number of oneDNN primitives that a plan's layers execute, at most: each layer's own, a
// reorder before and behind it, and one at the end.
double Primitives(const Plan& plan) {
  double count = 1;  // the result in the graph's own order
  for (const LayerInfo& layer : plan.layers())
    count += layer.implementation.find("onednn") != std::string::npos ? 3 : 0;
  return count;
}

void Check(const Graph& graph, const std::string& name) {
  SCOPED_TRACE(name);
  auto plan = Plan::Create(graph, {});
  ASSERT_TRUE(plan.ok()) << plan.status();
  const double primitives = Primitives(**plan) + 1;  // the last turns outputs of rank 3 over
  for (int threads : {1, 2}) {
    auto session = (*plan)->NewSession(threads);
    ASSERT_TRUE(session.ok()) << session.status();
    for (int batch : {1, 3}) {
      const Count count = CountRuns(*session, batch);
      EXPECT_LE(count.allocations, kPerPrimitive * primitives)
          << threads << " threads, batch " << batch;
      EXPECT_LE(count.bytes, kBytesPerPrimitive * primitives)
          << threads << " threads, batch " << batch;
    }
  }
}

class AllocationTest : public ::testing::TestWithParam<NamedGraph> {
  void SetUp() override {
    if (!TERN_COUNTS_ALLOCATIONS) GTEST_SKIP() << "a sanitizer owns malloc";
  }
};

TEST_P(AllocationTest, WarmRunsAllocateNothingOfTheirOwn) {
  const Graph& graph = GetParam().graph;
  const Ranges ranges(graph.values.size(), {-1.0f, 1.0f});
  QuantizeOptions ternary;
  ternary.scheme = WeightScheme::kTernaryCluster;
  Check(graph, "float");
  Check(QuantizeGraph(graph, ranges, {}), "int8");
  Graph quantized = QuantizeGraph(graph, ranges, ternary);
  Check(quantized, "ternary");
  if (graph::RoundToFixedPoint(quantized).ok()) Check(quantized, "ternary, fixed point");
}

INSTANTIATE_TEST_SUITE_P(Zoo, AllocationTest, ::testing::ValuesIn(Zoo()),
                         [](const auto& info) { return info.param.name; });

// A plan of Tern's kernels alone reaches zero; that also shows that the counter counts.
TEST(AllocationOfOwnKernelsTest, IsZero) {
  if (!TERN_COUNTS_ALLOCATIONS) GTEST_SKIP() << "a sanitizer owns malloc";
  GraphBuilder b({16, 12, 12});
  ValueId x = b.Conv(b.input(), 32, 3, Strided(1, 1), kReluRange);
  const ValueId skip = x;
  x = b.Conv(x, 32, 3, Strided(1, 1, 32), kReluRange);
  x = b.Conv(x, 32, 1, {}, {}, skip);
  x = b.Concat({x, skip});
  x = b.Unary(OpType::kHardSwish, x);
  x = b.FullyConnected(b.Flatten(b.GlobalAverage(x)), 10);
  const Graph graph = b.Finish(x);
  QuantizeOptions options;
  options.scheme = WeightScheme::kTernaryCluster;
  PlanOptions plan_options;
  plan_options.expand_on_vnni = false;
  const int64_t before = g_allocations;
  auto plan = Plan::Create(
      QuantizeGraph(graph, Ranges(graph.values.size(), {-1.0f, 1.0f}), options), plan_options);
  ASSERT_TRUE(plan.ok()) << plan.status();
  EXPECT_GT(g_allocations, before + 100);
  ASSERT_EQ(Primitives(**plan), 1);  // the last, which a vector does not need
  for (int threads : {1, 2}) {
    auto session = (*plan)->NewSession(threads);
    ASSERT_TRUE(session.ok()) << session.status();
    for (int batch : {1, 4}) EXPECT_EQ(CountRuns(*session, batch).allocations, 0);
  }
}

}  // namespace
}  // namespace tern::engine
