// Images on their way to Quantize and Evaluate.
#ifndef TERN_CLIENT_SAMPLES_H_
#define TERN_CLIENT_SAMPLES_H_

#include <functional>
#include <string>
#include <vector>

#include "client/dataset.h"
#include "client/tern_client.h"

namespace tern::client {

// An image to send, with its uses.
struct Sample {
  ImageFile file;
  bool calibration = false;
  bool evaluation = false;
};

// Calibration images first; an image of both lists (by path) is there once, with both uses.
std::vector<Sample> MergeSamples(const std::vector<ImageFile>& calibration,
                                 const std::vector<ImageFile>& evaluation);

// Reads the images as they are asked for, one in memory at a time, and calls `sent` with the number
// given out so far.
SampleSource ReadSamples(std::vector<Sample> samples, std::function<void(size_t)> sent);

}  // namespace tern::client

#endif  // TERN_CLIENT_SAMPLES_H_
