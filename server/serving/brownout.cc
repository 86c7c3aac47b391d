#include "server/serving/brownout.h"

#include <algorithm>
#include <tuple>
#include <utility>

#include "absl/strings/str_cat.h"
#include "server/base/log.h"

namespace tern::serving {
namespace {

// A version that is faster by less than this is no relief.
constexpr double kFaster = 0.95;
// How old what is known of a model may be.
constexpr absl::Duration kReadAgain = absl::Seconds(1);
// Models that were deleted are forgotten once there are so many.
constexpr size_t kManyModels = 256;
constexpr absl::Duration kDefaultQueueWait = absl::Milliseconds(20);

// The float version that a version comes from: itself, or its report's source.
std::pair<std::string, uint64_t> Origin(const repository::LoadedModel& version) {
  if (version.report.source_version() == 0) return {version.info.model, version.info.version};
  return {version.report.source_model(), version.report.source_version()};
}

uint64_t Images(const v1::PairedComparison& comparison) {
  return comparison.both_right() + comparison.only_reference_right() +
         comparison.only_candidate_right() + comparison.both_wrong();
}

// Upper end of the top-1 that a quantised version loses; nothing if it publishes none.
std::optional<double> DropHigh(const v1::QuantizationReport& report) {
  double drop = 0;
  if (Images(report.comparison()) > 0) {
    drop = report.comparison().drop_high();
  } else if (report.agreement().total() > 0) {
    drop = 1 - report.agreement().low();
  } else {
    return std::nullopt;
  }
  // A report comes with an artifact from outside.
  if (!(drop >= -1 && drop <= 1)) return std::nullopt;
  return std::max(0.0, drop);
}

absl::Duration Milliseconds(double ms) {
  return ms > 0 && ms < 1e9 ? absl::Milliseconds(ms) : absl::ZeroDuration();
}

size_t PlaceOf(const std::vector<Rung>& ladder, uint64_t version) {
  return std::find_if(ladder.begin(), ladder.end(),
                      [&](const Rung& rung) { return rung.version == version; }) -
         ladder.begin();
}

// The rungs that a request goes down along from `start`: `allowed` ones, each faster than the one
// before.
std::vector<Rung> Way(const std::vector<Rung>& ladder, size_t start,
                      const std::function<bool(const Rung&)>& allowed) {
  std::vector<Rung> way = {ladder[start]};
  for (size_t i = start + 1; i < ladder.size(); ++i) {
    if (allowed(ladder[i]) && ladder[i].cost > absl::ZeroDuration() &&
        ladder[i].cost < kFaster * way.back().cost) {
      way.push_back(ladder[i]);
    }
  }
  return way;
}

bool Within(const Rung& rung, double max_top1_drop) {
  return max_top1_drop > 0 && rung.drop_high <= max_top1_drop;
}

}  // namespace

std::vector<Rung> MakeLadder(
    uint64_t version, const std::vector<std::shared_ptr<const repository::LoadedModel>>& versions) {
  const auto self = std::find_if(versions.begin(), versions.end(), [&](const auto& candidate) {
    return candidate->info.version == version;
  });
  if (self == versions.end()) return {};
  const auto origin = Origin(**self);
  std::vector<Rung> ladder;
  // What the float version does is in the reports of those that were made from it: the one on most
  // images.
  const v1::QuantizationReport* about_float = nullptr;
  for (const auto& candidate : versions) {
    const v1::QuantizationReport& report = candidate->report;
    if (report.source_version() == 0 || Origin(*candidate) != origin) continue;
    if (about_float == nullptr || report.evaluation_images() > about_float->evaluation_images()) {
      about_float = &report;
    }
    const std::optional<double> drop = DropHigh(report);
    if (!drop.has_value() && candidate != *self) continue;
    Rung rung;
    rung.version = candidate->info.version;
    rung.drop_high = drop.value_or(1);
    if (report.top1().total() > 0) rung.top1_low = report.top1().low();
    rung.cost = Milliseconds(report.ms_per_image());
    ladder.push_back(rung);
  }
  std::sort(ladder.begin(), ladder.end(), [](const Rung& a, const Rung& b) {
    return std::tie(a.drop_high, a.cost, a.version) < std::tie(b.drop_high, b.cost, b.version);
  });
  for (const auto& candidate : versions) {
    if (candidate->report.source_version() != 0 || Origin(*candidate) != origin) continue;
    Rung rung;
    rung.version = candidate->info.version;
    if (about_float != nullptr) {
      if (about_float->float_top1().total() > 0) rung.top1_low = about_float->float_top1().low();
      rung.cost = Milliseconds(about_float->float_ms_per_image());
    }
    ladder.insert(ladder.begin(), rung);
  }
  return ladder;
}

void OverloadController::Observe(absl::Duration wait, absl::Time now) {
  if (wait > queue_wait_ / 2) last_wait_ = now;
  if (wait <= queue_wait_) {
    bad_since_ = absl::InfiniteFuture();
    return;
  }
  bad_since_ = std::min(bad_since_, now);
  if (now - bad_since_ < kHold) return;
  bad_since_ = now;
  // The step back up was too early: wait longer before the next.
  release_ = now - raised_ < release_ ? std::min(2 * release_, kMaxRelease) : kRelease;
  changed_ = now;
  ++level_;
}

int OverloadController::Level(absl::Time now, int most) {
  level_ = std::min(level_, most);
  if (level_ > 0 && now - std::max(last_wait_, changed_) >= release_) {
    --level_;
    changed_ = raised_ = now;
  }
  return level_;
}

int StepsDown(const std::vector<Rung>& ladder, uint64_t default_version, double max_top1_drop) {
  const size_t start = PlaceOf(ladder, default_version);
  if (start == ladder.size()) return 0;
  return static_cast<int>(
             Way(ladder, start, [&](const Rung& rung) { return Within(rung, max_top1_drop); })
                 .size()) -
         1;
}

absl::StatusOr<Brownout::Choice> ChooseRung(
    const std::vector<Rung>& ladder, uint64_t default_version, int level, double max_top1_drop,
    const Wishes& wishes, const std::function<absl::Duration(uint64_t version)>& expected) {
  size_t start = PlaceOf(ladder, default_version);
  if (start == ladder.size()) return Brownout::Choice{};
  const bool hurry = wishes.max_latency < absl::InfiniteDuration();
  const auto allowed = [&](const Rung& rung) {
    if (wishes.min_accuracy.has_value()) return rung.top1_low >= *wishes.min_accuracy;
    // A max_latency alone opts in, within the model's own bound if it has one.
    return (hurry && max_top1_drop <= 0) || Within(rung, max_top1_drop);
  };
  Brownout::Choice choice;
  if (wishes.min_accuracy.has_value() && !allowed(ladder[start])) {
    // Up to the next version that is accurate enough.
    size_t up = start;
    while (up > 0 && !allowed(ladder[up])) --up;
    if (!allowed(ladder[up])) {
      double best = -1;
      for (const Rung& rung : ladder) best = std::max(best, rung.top1_low);
      return absl::FailedPreconditionError(
          absl::StrCat("min_accuracy: got ", *wishes.min_accuracy,
                       best < 0 ? std::string(", no version has a published top-1")
                                : absl::StrCat(", the most accurate version has ", best,
                                               " (lower end of its 95 % interval)")));
    }
    start = up;
    choice = {ladder[start].version, Degradation::kMinAccuracy, default_version};
  }
  const std::vector<Rung> way = Way(ladder, start, allowed);
  size_t step = std::min<size_t>(std::max(level, 0), way.size() - 1);
  if (step > 0) choice = {way[step].version, Degradation::kOverload, default_version};
  if (hurry) {
    while (step + 1 < way.size() && expected(way[step].version) > wishes.max_latency) {
      ++step;
      choice = {way[step].version, Degradation::kMaxLatency, default_version};
    }
  }
  if (choice.version == default_version) choice = {};
  return choice;
}

Brownout::Model* Brownout::Find(absl::string_view name) {
  const absl::Time now = clock_->Now();
  auto it = models_.find(name);
  if (it != models_.end() && now - it->second->read < kReadAgain) return it->second.get();
  const auto current = repository_->Find(name, 0);
  if (!current.ok()) {
    if (it != models_.end()) {
      TellLevel(name, *it->second, 0);
      models_.erase(it);
    }
    return nullptr;
  }
  const v1::ModelConfig::Brownout& config = (*current)->config.brownout();
  const absl::Duration queue_wait =
      config.queue_wait_us() > 0 ? absl::Microseconds(config.queue_wait_us()) : kDefaultQueueWait;
  if (it == models_.end() || it->second->queue_wait != queue_wait) {
    for (auto old = models_.begin(); models_.size() >= kManyModels && old != models_.end();) {
      old = now - old->second->read > absl::Minutes(1) ? models_.erase(old) : std::next(old);
    }
    if (it != models_.end()) TellLevel(name, *it->second, 0);
    it = models_.insert_or_assign(std::string(name), std::make_unique<Model>(queue_wait)).first;
    metrics_->BrownoutLevel(name, 0);  // to be seen before the first step
  }
  Model& model = *it->second;
  model.read = now;
  model.default_version = (*current)->info.version;
  model.max_top1_drop = config.max_top1_drop();
  std::vector<std::shared_ptr<const repository::LoadedModel>> versions;
  for (const repository::VersionInfo& info : repository_->List(name)) {
    if (info.state != repository::State::kReady) continue;
    auto version = repository_->Find(name, info.version);
    if (version.ok()) versions.push_back(*std::move(version));
  }
  model.ladder = MakeLadder(model.default_version, versions);
  return &model;
}

void Brownout::TellLevel(absl::string_view name, Model& model, int level) {
  if (level == model.told_level) return;
  TERN_LOG_WARN("{}: brown-out level {} (was {}), of {} versions", std::string(name), level,
                model.told_level, model.ladder.size());
  model.told_level = level;
  metrics_->BrownoutLevel(name, level);
}

absl::StatusOr<Brownout::Choice> Brownout::Choose(
    absl::string_view name, uint64_t version, const Wishes& wishes,
    const std::function<absl::Duration(uint64_t version)>& expected) {
  if (wishes.min_accuracy.has_value() &&
      !(*wishes.min_accuracy >= 0 && *wishes.min_accuracy <= 1)) {
    return absl::InvalidArgumentError(
        absl::StrCat("min_accuracy: got ", *wishes.min_accuracy, ", want 0..1"));
  }
  if (version != 0 && !wishes.min_accuracy.has_value()) return Choice{version};
  std::vector<Rung> ladder;
  uint64_t default_version = 0;
  double max_top1_drop = 0;
  int level = 0;
  {
    std::lock_guard<std::mutex> lock(mutex_);
    Model* model = Find(name);
    if (model == nullptr) return Choice{version};
    // Without a bound of the model's own only requests with one of theirs step down.
    const int most = model->max_top1_drop > 0
                         ? StepsDown(model->ladder, model->default_version, model->max_top1_drop)
                         : std::max(0, static_cast<int>(model->ladder.size()) - 1);
    level = model->overload.Level(clock_->Now(), most);
    TellLevel(name, *model, level);
    if ((level == 0 || model->max_top1_drop <= 0) && version == 0 &&
        !wishes.min_accuracy.has_value() && wishes.max_latency == absl::InfiniteDuration()) {
      return Choice{};
    }
    ladder = model->ladder;
    default_version = model->default_version;
    max_top1_drop = model->max_top1_drop;
  }
  if (version != 0) {
    // Named: answered by it or refused.
    const size_t place = PlaceOf(ladder, version);
    if (place < ladder.size() && ladder[place].top1_low >= *wishes.min_accuracy)
      return Choice{version};
    return absl::FailedPreconditionError(absl::StrCat(
        "min_accuracy: got ", *wishes.min_accuracy, ", version ", version, " of '", name, "' ",
        place == ladder.size() || ladder[place].top1_low < 0
            ? std::string("has no published top-1 beside the default version's")
            : absl::StrCat("has ", ladder[place].top1_low, " (lower end of its 95 % interval)")));
  }
  absl::StatusOr<Choice> choice =
      ChooseRung(ladder, default_version, level, max_top1_drop, wishes, expected);
  // Not whatever is the default when the image runs: that may be less accurate.
  if (choice.ok() && choice->version == 0 && wishes.min_accuracy.has_value() &&
      PlaceOf(ladder, default_version) < ladder.size()) {
    choice->version = default_version;
  }
  return choice;
}

void Brownout::Observe(absl::string_view name, absl::Duration wait) {
  std::lock_guard<std::mutex> lock(mutex_);
  const auto it = models_.find(name);
  if (it != models_.end()) it->second->overload.Observe(wait, clock_->Now());
}

}  // namespace tern::serving
