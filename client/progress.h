// Progress on stderr: a bar that redraws itself on a terminal, else a line every few seconds.
#ifndef TERN_CLIENT_PROGRESS_H_
#define TERN_CLIENT_PROGRESS_H_

#include <cstdio>
#include <mutex>
#include <string>

#include "absl/time/time.h"

namespace tern::client {

// Thread safe. Nothing is printed if `quiet`.
class Progress {
 public:
  explicit Progress(bool quiet, std::FILE* out = stderr);
  // Clears the bar.
  ~Progress();

  // `done` is 0..1; negative: unknown. `seconds_left` negative: unknown.
  void Show(const std::string& phase, double done, const std::string& detail, double seconds_left);
  // Ends the bar, so that other text can follow.
  void Clear();

 private:
  std::FILE* const out_;
  const bool quiet_;
  const bool terminal_;
  std::mutex mutex_;
  std::string phase_;
  size_t drawn_ = 0;  // characters on the bar's line
  absl::Time next_ = absl::InfinitePast();
};

}  // namespace tern::client

#endif  // TERN_CLIENT_PROGRESS_H_
