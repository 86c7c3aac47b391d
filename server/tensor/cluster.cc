#include "server/tensor/cluster.h"

namespace tern {

ClusterMap::ClusterMap(int channels, int n)
    : n_(n), paired_(n % 2 == 0 && n < channels), cluster_of_(channels) {
  for (int c = 0; c < channels; ++c) {
    if (paired_) {
      const int block = c / (2 * n);
      // A short last block with at most 2 channels has no second cluster; numbering stays
      // dense because only the very last cluster can be missing.
      cluster_of_[c] = 2 * block + ((c % (2 * n)) >> 1 & 1);
    } else {
      cluster_of_[c] = c / n;
    }
    if (cluster_of_[c] + 1 > clusters_) clusters_ = cluster_of_[c] + 1;
  }
}

std::vector<int> ClusterMap::channels_of(int g) const {
  std::vector<int> result;
  for (int c = 0; c < channels(); ++c) {
    if (cluster_of_[c] == g) result.push_back(c);
  }
  return result;
}

}  // namespace tern
