#include "client/samples.h"

#include <map>
#include <memory>
#include <utility>

#include "client/contract.h"
#include "client/status.h"

namespace tern::client {

std::vector<Sample> MergeSamples(const std::vector<ImageFile>& calibration,
                                 const std::vector<ImageFile>& evaluation) {
  std::vector<Sample> samples;
  std::map<std::string, size_t> place;
  for (const ImageFile& file : calibration) {
    place[file.path] = samples.size();
    samples.push_back({file, true, false});
  }
  for (const ImageFile& file : evaluation) {
    const auto [it, is_new] = place.emplace(file.path, samples.size());
    if (is_new) samples.push_back({file, false, false});
    samples[it->second].evaluation = true;
  }
  return samples;
}

SampleSource ReadSamples(std::vector<Sample> samples, std::function<void(size_t)> sent) {
  auto next = std::make_shared<size_t>(0);
  auto all = std::make_shared<const std::vector<Sample>>(std::move(samples));
  return [all, next, sent]() -> absl::StatusOr<std::optional<v1::SampleImage>> {
    if (*next == all->size()) return std::nullopt;
    const Sample& sample = (*all)[*next];
    v1::SampleImage image;
    TERN_CLIENT_ASSIGN_OR_RETURN(*image.mutable_image(),
                                 ReadFile(sample.file.path, size_t{60} << 20));
    if (sample.file.label) image.set_label(*sample.file.label);
    image.set_calibration(sample.calibration);
    image.set_evaluation(sample.evaluation);
    image.set_name(sample.file.path);
    sent(++*next);
    return image;
  };
}

}  // namespace tern::client
