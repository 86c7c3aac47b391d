// Models in motion: versions come, go and change places under full load, and every answer is right.
#include <atomic>
#include <chrono>
#include <cmath>
#include <filesystem>
#include <fstream>
#include <future>
#include <map>
#include <mutex>
#include <random>
#include <set>
#include <string>
#include <thread>
#include <vector>

#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "tests/serving/server_fixture.h"

namespace tern::serving {
namespace {

using Time = std::chrono::steady_clock::time_point;

Time Now() { return std::chrono::steady_clock::now(); }

// What version v answers for a colour: its class is moved on by v, and the probability differs from
// that of any version within 60 by 0.01 at least.
float Gain(uint64_t version) { return 0.5f + 0.05f * static_cast<float>(version % 60); }
int Rotation(uint64_t version) { return static_cast<int>(version % 3); }
std::string OnnxOf(uint64_t version) { return testing::TinyOnnx(Gain(version), Rotation(version)); }

// When a version was certainly in memory, or may have been the default.
struct Life {
  uint64_t version;
  Time from, to = Time::max();
};

class MotionTest : public testing::PipelineTest {
 protected:
  static constexpr char kModel[] = "moving";

  void SetUp() override {
    PipelineTest::SetUp();
    const auto first =
        repository_->Import(kModel, OnnxOf(1), testing::TinyPreprocessing(), {}, true);
    ASSERT_TRUE(first.ok()) << first.status();
    loaded_.push_back({1, Now()});
    defaults_.push_back({1, Time::min()});
    versions_ = {1};
  }

  // One request and its judgement; false if the answer was wrong.
  void Ask(std::mt19937& random) {
    uint64_t version = 0;
    if (random() % 2 == 0) {
      std::lock_guard<std::mutex> lock(mutex_);
      version = *std::next(versions_.begin(), random() % versions_.size());
    }
    const int colour = static_cast<int>(random() % 3);
    uint8_t rgb[3] = {0, 0, 0};
    rgb[colour] = 255;
    ClassifyInput input;
    input.image = testing::SolidBmp(8, 8, rgb[0], rgb[1], rgb[2]);
    std::promise<absl::StatusOr<ClassifyOutput>> promise;
    const Time sent = Now();
    classifier_->Classify(
        kModel, version, std::move(input),
        [&](absl::StatusOr<ClassifyOutput> output) { promise.set_value(std::move(output)); });
    const absl::StatusOr<ClassifyOutput> output = promise.get_future().get();
    const Time answered = Now();
    ++asked_;
    if (output.ok()) {
      ++answered_;
      const uint64_t by = output->model->info.version;
      const double gain = std::exp(Gain(by));
      EXPECT_EQ(output->classes[0].index, (colour + Rotation(by)) % 3) << "version " << by;
      EXPECT_NEAR(output->classes[0].probability, gain / (gain + 2), 1e-4) << "version " << by;
      if (version != 0) {
        EXPECT_EQ(by, version);
      } else {
        EXPECT_TRUE(Overlaps(defaults_, by, sent, answered))
            << "version " << by << " was not the default";
      }
    } else if (version == 0) {
      ADD_FAILURE() << "the default must always answer: " << output.status();
    } else {
      EXPECT_TRUE(absl::IsUnavailable(output.status()) || absl::IsNotFound(output.status()))
          << output.status();
      EXPECT_FALSE(Covers(loaded_, version, sent, answered))
          << "version " << version << " was loaded all the time: " << output.status();
    }
  }
  bool Overlaps(const std::vector<Life>& lives, uint64_t version, Time from, Time to) {
    std::lock_guard<std::mutex> lock(mutex_);
    for (const Life& life : lives) {
      if (life.version == version && life.from <= to && from <= life.to) return true;
    }
    return false;
  }
  bool Covers(const std::vector<Life>& lives, uint64_t version, Time from, Time to) {
    std::lock_guard<std::mutex> lock(mutex_);
    for (const Life& life : lives) {
      if (life.version == version && life.from <= from && to <= life.to) return true;
    }
    return false;
  }

  void Loaded(uint64_t version) {
    std::lock_guard<std::mutex> lock(mutex_);
    loaded_.push_back({version, Now()});
    versions_.insert(version);
    in_memory_.insert(version);
  }
  void Leaving(uint64_t version) {
    std::lock_guard<std::mutex> lock(mutex_);
    for (Life& life : loaded_) {
      if (life.version == version && life.to == Time::max()) life.to = Now();
    }
    in_memory_.erase(version);
  }
  // `change` makes `version` the default: both the old and the new one may be it meanwhile.
  template <typename Change>
  void MoveDefault(uint64_t version, Change change) {
    {
      std::lock_guard<std::mutex> lock(mutex_);
      defaults_.push_back({version, Now()});
    }
    change();
    std::lock_guard<std::mutex> lock(mutex_);
    if (default_ != version) {
      for (Life& life : defaults_) {
        if (life.version == default_ && life.to == Time::max()) life.to = Now();
      }
    }
    default_ = version;
  }
  uint64_t AnyOf(const std::set<uint64_t>& versions, std::mt19937& random) {
    return *std::next(versions.begin(), random() % versions.size());
  }

  std::mutex mutex_;
  std::vector<Life> loaded_;     // certainly in memory, and not about to leave
  std::vector<Life> defaults_;   // may have been the default
  std::set<uint64_t> versions_;  // that clients ask for, deleted ones included
  std::set<uint64_t> in_memory_ = {1};
  uint64_t default_ = 1;  // of the thread that changes things
  std::atomic<int> asked_{0}, answered_{0};
};

TEST_F(MotionTest, EveryAnswerIsRightAndOfALegalVersionWhileVersionsComeAndGo) {
  std::atomic<bool> stop{false};
  std::vector<std::thread> clients;
  for (int i = 0; i < 8; ++i) {
    clients.emplace_back([this, i, &stop] {
      std::mt19937 random(100 + i);
      while (!stop) Ask(random);
    });
  }
  std::mt19937 random(7);
  std::map<std::string, int> done;
  std::set<uint64_t> unloaded;
  uint64_t next = 2;
  for (int step = 0; step < 300; ++step) {
    const int asked = asked_;
    std::set<uint64_t> others = in_memory_;
    others.erase(default_);
    switch (random() % 7) {
      case 0: {  // publish, perhaps as the default
        if (in_memory_.size() + unloaded.size() >= 6) break;
        const uint64_t version = next++;
        const bool as_default = random() % 2 == 0;
        const auto import = [&] {
          const auto info = repository_->Import(kModel, OnnxOf(version),
                                                testing::TinyPreprocessing(), {}, as_default);
          ASSERT_TRUE(info.ok()) << info.status();
          ASSERT_EQ(info->version, version);
        };
        as_default ? MoveDefault(version, import) : import();
        Loaded(version);
        ++done["publish"];
        break;
      }
      case 1: {  // reload in place
        const uint64_t version = AnyOf(in_memory_, random);
        ASSERT_TRUE(repository_->Load(kModel, version).ok());
        ++done["reload"];
        break;
      }
      case 2: {
        if (others.empty()) break;
        const uint64_t version = AnyOf(others, random);
        Leaving(version);
        ASSERT_TRUE(repository_->Unload(kModel, version).ok());
        unloaded.insert(version);
        ++done["unload"];
        break;
      }
      case 3: {
        if (unloaded.empty()) break;
        const uint64_t version = AnyOf(unloaded, random);
        ASSERT_TRUE(repository_->Load(kModel, version).ok());
        unloaded.erase(version);
        Loaded(version);
        ++done["load"];
        break;
      }
      case 4: {
        const uint64_t version = AnyOf(in_memory_, random);
        MoveDefault(version, [&] { ASSERT_TRUE(repository_->SetDefault(kModel, version).ok()); });
        ++done["default"];
        break;
      }
      case 5: {
        if (others.size() < 2) break;
        const uint64_t version = AnyOf(others, random);
        Leaving(version);
        ASSERT_TRUE(repository_->Delete(kModel, version).ok());
        ++done["delete"];
        break;
      }
      case 6: {  // a broken file in the place of a good one, and back
        const uint64_t version = AnyOf(in_memory_, random);
        const std::string path = absl::StrCat(root_, "/", kModel, "/", version, "/model.onnx");
        std::ofstream(path, std::ios::binary) << "no network";
        EXPECT_FALSE(repository_->Load(kModel, version).ok());
        std::ofstream(path, std::ios::binary) << OnnxOf(version);
        ++done["broken"];
        break;
      }
    }
    // Requests go through between any two changes, however slow the machine is.
    while (asked_ < asked + 4) std::this_thread::yield();
  }
  stop = true;
  for (std::thread& client : clients) client.join();
  EXPECT_EQ(done.size(), 7u);
  EXPECT_GT(answered_, asked_ / 2);

  // Nothing is left of the versions that are gone.
  for (uint64_t version = 1; version < next; ++version) {
    if (in_memory_.count(version) > 0) continue;
    EXPECT_EQ(
        metrics_.Render().find(absl::StrCat("model=\"", kModel, "\",version=\"", version, "\"")),
        std::string::npos)
        << version;
  }
}

TEST_F(MotionTest, AVersionIsWarmBeforeItIsReadyIfAsked) {
  runner_.warm_up = true;
  ASSERT_TRUE(repository_->Load(kModel, 1).ok());
  std::mt19937 random(1);
  for (int i = 0; i < 20; ++i) Ask(random);
  EXPECT_EQ(answered_, 20);
}

}  // namespace
}  // namespace tern::serving
