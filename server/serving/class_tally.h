// How each class fares: hits per class, and what its images are taken for.
#ifndef TERN_SERVER_SERVING_CLASS_TALLY_H_
#define TERN_SERVER_SERVING_CLASS_TALLY_H_

#include <cstdint>
#include <map>
#include <optional>
#include <string>
#include <vector>

#include "tern/v1/model.pb.h"

namespace tern::serving {

// Memory grows with the number of different (label, answer) pairs seen, at most one per image. Not
// thread safe.
class ClassTally {
 public:
  static constexpr int kMaxClasses = 10;
  static constexpr int kMaxConfusions = 3;

  // One labelled image: what the network answered and, if there is one, its reference.
  void Add(uint32_t label, uint32_t answer, std::optional<uint32_t> reference);

  // With a reference: the classes that lost most right answers to it, most first; else the classes
  // with errors, lowest accuracy first. At most kMaxClasses, each with its kMaxConfusions most
  // frequent wrong answers. Equal ones: the lower index first. `labels` names the classes and may
  // be empty.
  std::vector<v1::ClassReport> Worst(const std::vector<std::string>& labels) const;

 private:
  struct Class {
    uint64_t images = 0, right = 0, reference_right = 0;
    std::map<uint32_t, uint64_t> wrong;  // by answer
  };
  std::map<uint32_t, Class> classes_;
  bool has_reference_ = false;
};

}  // namespace tern::serving

#endif  // TERN_SERVER_SERVING_CLASS_TALLY_H_
