#include "client/progress.h"

#include <unistd.h>

#include <algorithm>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "absl/time/clock.h"
#include "client/table.h"

namespace tern::client {

Progress::Progress(bool quiet, std::FILE* out)
    : out_(out), quiet_(quiet), terminal_(!quiet && isatty(fileno(out)) == 1) {}

Progress::~Progress() { Clear(); }

void Progress::Show(const std::string& phase, double done, const std::string& detail,
                    double seconds_left) {
  if (quiet_) return;
  std::lock_guard lock(mutex_);
  const absl::Time now = absl::Now();
  const bool new_phase = phase != phase_;
  if (now < next_ && !new_phase) return;
  phase_ = phase;
  next_ = now + (terminal_ ? absl::Milliseconds(100) : absl::Seconds(3));

  std::string text = Printable(phase);
  if (done >= 0) {
    const double share = std::clamp(done, 0.0, 1.0);
    text = absl::StrFormat("%-12s %3.0f %%", text, 100 * share);
    if (terminal_) {
      constexpr int kWidth = 30;
      const int filled = static_cast<int>(share * kWidth);
      absl::StrAppend(&text, " [", std::string(filled, '#'), std::string(kWidth - filled, '.'),
                      "]");
    }
  }
  if (!detail.empty()) absl::StrAppend(&text, "  ", Printable(detail));
  if (seconds_left >= 0) absl::StrAppend(&text, absl::StrFormat("  %.0f s left", seconds_left));
  if (!terminal_) {
    std::fprintf(out_, "%s\n", text.c_str());
    return;
  }
  constexpr size_t kLine = 100;  // a longer line would wrap and not be overwritten
  text.resize(std::min(text.size(), kLine));
  const size_t written = text.size();
  if (written < drawn_) text.append(drawn_ - written, ' ');
  std::fprintf(out_, "\r%s", text.c_str());
  std::fflush(out_);
  drawn_ = written;
}

void Progress::Clear() {
  std::lock_guard lock(mutex_);
  if (drawn_ == 0) return;
  std::fprintf(out_, "\r%s\r", std::string(drawn_, ' ').c_str());
  std::fflush(out_);
  drawn_ = 0;
}

}  // namespace tern::client
