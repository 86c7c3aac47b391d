#include <gtest/gtest.h>

#include <atomic>
#include <stdexcept>
#include <thread>

#include "server/engine/onednn.h"

namespace tern::engine::onednn {
namespace {

// Primitives that tell which batch they were made for, and how many were made.
struct Counted {
  std::atomic<int> made = 0;
  SharedPrimitives primitives{[this](int64_t batch) {
    ++made;
    Primitive primitive;
    primitive.implementation = std::to_string(batch);
    return primitive;
  }};
};

TEST(SharedPrimitivesTest, AreMadeOnceForEachBatchAndTeam) {
  Counted counted;
  const auto one = counted.primitives.Get(1), again = counted.primitives.Get(1);
  EXPECT_EQ(one, again);
  const auto eight = counted.primitives.Get(8);
  EXPECT_EQ(one->implementation, "1");
  EXPECT_EQ(eight->implementation, "8");
  EXPECT_EQ(counted.made, 2);
  ScopedThreads team(3);
  const auto of_three = counted.primitives.Get(1), of_three_again = counted.primitives.Get(1);
  EXPECT_NE(of_three, one);
  EXPECT_EQ(of_three, of_three_again);
  EXPECT_EQ(counted.made, 3);
}

TEST(SharedPrimitivesTest, AreKeptOnlyWhileSomeoneUsesThem) {
  Counted counted;
  std::weak_ptr<const Primitive> kept = counted.primitives.Get(4);
  EXPECT_TRUE(kept.expired());
  const auto held = counted.primitives.Get(4);
  EXPECT_EQ(counted.made, 2);
}

TEST(SharedPrimitivesTest, AreMadeOnceWhenManyAskAtOnce) {
  Counted counted;
  std::vector<std::shared_ptr<const Primitive>> got(8);
  std::vector<std::thread> threads;
  for (auto& primitive : got) {
    threads.emplace_back([&counted, &primitive] {
      ScopedThreads team(1);
      primitive = counted.primitives.Get(2);
    });
  }
  for (std::thread& thread : threads) thread.join();
  for (const auto& primitive : got) EXPECT_EQ(primitive, got[0]);
  EXPECT_EQ(counted.made, 1);
}

TEST(SharedPrimitivesTest, AFailureIsNotKept) {
  bool fails = true;
  SharedPrimitives primitives([&](int64_t) -> Primitive {
    if (fails) throw std::runtime_error("refused");
    return {};
  });
  EXPECT_THROW(primitives.Get(1), std::runtime_error);
  fails = false;
  EXPECT_NE(primitives.Get(1), nullptr);
}

}  // namespace
}  // namespace tern::engine::onednn
