#include <algorithm>
#include <numeric>

#include "server/engine/program.h"

namespace tern::engine {
namespace {

// Buffers that share memory, one after the other.
struct Group {
  int first = 0, last = 0;
  size_t bytes = 0;
  size_t offset = 0;
  bool pinned = false;
};

constexpr size_t kAlignment = AlignedBuffer::kAlignment;

int SamplesOf(const Program& program, const Buffer& buffer) {
  return buffer.max_samples > 0 ? buffer.max_samples : program.max_batch;
}

size_t RoundUp(size_t bytes) { return (bytes + kAlignment - 1) / kAlignment * kAlignment; }

}  // namespace

void PlanMemory(Program& program) {
  auto& buffers = program.buffers;
  const auto root = [&](int b) { return buffers[b].view_of >= 0 ? buffers[b].view_of : b; };
  const int end = static_cast<int>(program.steps.size());
  for (int s = 0; s < end; ++s) {
    for (int b : program.steps[s].writes) {
      Buffer& written = buffers[root(b)];
      if (written.first < 0) written.first = s;
      written.last = std::max(written.last, s);
    }
    for (int b : program.steps[s].reads) buffers[root(b)].last = std::max(buffers[root(b)].last, s);
  }
  buffers[program.input].first = 0;
  std::vector<int> group_of(buffers.size());
  std::vector<Group> groups(buffers.size());
  for (size_t b = 0; b < buffers.size(); ++b) {
    if (!buffers[b].pinned) continue;
    Buffer& kept = buffers[root(static_cast<int>(b))];
    kept.pinned = true;
    kept.last = end;
  }
  for (size_t b = 0; b < buffers.size(); ++b) {
    group_of[b] = static_cast<int>(b);
    groups[b] = {buffers[b].first, buffers[b].last,
                 RoundUp(buffers[b].sample_bytes * SamplesOf(program, buffers[b])), 0,
                 buffers[b].pinned};
  }
  // In step order, so that a chain of in-place steps grows from its beginning.
  for (int s = 0; s < end; ++s) {
    for (const InPlace& wish : program.steps[s].in_place) {
      const int from_root = root(wish.from);
      const Buffer& from = buffers[from_root];
      const Buffer& to = buffers[wish.to];
      Group& source = groups[group_of[from_root]];
      // Whatever a step reads twice it may read again after it has written a part of `to`.
      const auto& reads = program.steps[s].reads;
      const auto same = std::count_if(reads.begin(), reads.end(),
                                      [&](int read) { return root(read) == from_root; });
      if (same > 1 || from.constant >= 0 || from.pinned || source.pinned || source.last != s ||
          to.first != s || group_of[wish.to] != wish.to || from.sample_bytes != to.sample_bytes ||
          from.max_samples != to.max_samples) {
        continue;
      }
      source.last = std::max(source.last, to.last);
      source.pinned = source.pinned || to.pinned;
      group_of[wish.to] = group_of[from_root];
      break;
    }
  }
  std::vector<int> order;
  for (size_t b = 0; b < buffers.size(); ++b) {
    if (group_of[b] == static_cast<int>(b) && buffers[b].constant < 0 && buffers[b].first >= 0 &&
        buffers[b].view_of < 0) {
      order.push_back(static_cast<int>(b));
    }
  }
  std::stable_sort(order.begin(), order.end(),
                   [&](int a, int b) { return groups[a].bytes > groups[b].bytes; });
  std::vector<int> placed;  // by rising offset
  for (int g : order) {
    // The smallest gap that is large enough among the groups alive at the same time.
    size_t best = 0, best_gap = SIZE_MAX, top = 0;
    for (int other : placed) {
      if (groups[other].last < groups[g].first || groups[g].last < groups[other].first) continue;
      if (groups[other].offset > top) {
        const size_t gap = groups[other].offset - top;
        if (gap >= groups[g].bytes && gap < best_gap) {
          best = top;
          best_gap = gap;
        }
      }
      top = std::max(top, groups[other].offset + groups[other].bytes);
    }
    groups[g].offset = best_gap == SIZE_MAX ? top : best;
    program.arena_bytes = std::max(program.arena_bytes, groups[g].offset + groups[g].bytes);
    placed.insert(
        std::upper_bound(placed.begin(), placed.end(), g,
                         [&](int a, int b) { return groups[a].offset < groups[b].offset; }),
        g);
  }
  for (size_t b = 0; b < buffers.size(); ++b) {
    buffers[b].offset = groups[group_of[root(static_cast<int>(b))]].offset;
  }
}

}  // namespace tern::engine
