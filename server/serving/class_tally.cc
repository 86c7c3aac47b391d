#include "server/serving/class_tally.h"

#include <algorithm>
#include <utility>

namespace tern::serving {

void ClassTally::Add(uint32_t label, uint32_t answer, std::optional<uint32_t> reference) {
  Class& entry = classes_[label];
  ++entry.images;
  entry.right += answer == label;
  if (answer != label) ++entry.wrong[answer];
  if (reference.has_value()) {
    has_reference_ = true;
    entry.reference_right += *reference == label;
  }
}

std::vector<v1::ClassReport> ClassTally::Worst(const std::vector<std::string>& labels) const {
  const auto name = [&](uint32_t index) {
    return index < labels.size() ? labels[index] : std::string();
  };
  // How bad, larger is worse: images lost, or the share of errors.
  const auto badness = [&](const Class& c) {
    if (has_reference_) {
      return static_cast<double>(c.reference_right) - static_cast<double>(c.right);
    }
    return 1.0 - static_cast<double>(c.right) / static_cast<double>(c.images);
  };
  std::vector<std::pair<uint32_t, const Class*>> order;
  for (const auto& [index, entry] : classes_) {
    if (badness(entry) > 0) order.push_back({index, &entry});
  }
  std::stable_sort(order.begin(), order.end(), [&](const auto& a, const auto& b) {
    return badness(*a.second) > badness(*b.second);
  });
  if (order.size() > kMaxClasses) order.resize(kMaxClasses);

  std::vector<v1::ClassReport> reports;
  for (const auto& [index, entry] : order) {
    v1::ClassReport& report = reports.emplace_back();
    report.set_class_index(index);
    report.set_label(name(index));
    report.set_images(entry->images);
    report.set_reference_right(entry->reference_right);
    report.set_candidate_right(entry->right);
    std::vector<std::pair<uint32_t, uint64_t>> wrong(entry->wrong.begin(), entry->wrong.end());
    std::stable_sort(wrong.begin(), wrong.end(),
                     [](const auto& a, const auto& b) { return a.second > b.second; });
    for (size_t i = 0; i < wrong.size() && i < kMaxConfusions; ++i) {
      v1::ClassReport::Confusion& confusion = *report.add_confused_with();
      confusion.set_class_index(wrong[i].first);
      confusion.set_label(name(wrong[i].first));
      confusion.set_images(wrong[i].second);
    }
  }
  return reports;
}

}  // namespace tern::serving
