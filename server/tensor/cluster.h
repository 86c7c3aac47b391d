// Which input channel belongs to which cluster (Mellempudi et al. 2017, section 3).
//
// For one output channel, a cluster is N input channels with all their KxK taps; its
// weights are small integer codes (ternary -1..1, or 4-bit -7..7) times one 8-bit scale.
//
// Clusters come in pairs, so that a SIMD dword of four consecutive NHWC channels holds two
// channels of each and one multiply-add instruction applies both scales: inside every block
// of 2N channels, channel c belongs to the first cluster of the pair if bit 1 of its offset
// in the block is 0, else to the second. For N=4: {0,1,4,5} and {2,3,6,7}. The order of
// channels carries no meaning in a trained network, so this costs no accuracy. Exceptions:
// odd N, and N >= channels, where clusters are contiguous runs of N channels (one run of
// all channels in the latter case). The last block may be short; no cluster is empty.
#ifndef TERN_SERVER_TENSOR_CLUSTER_H_
#define TERN_SERVER_TENSOR_CLUSTER_H_

#include <vector>

namespace tern {

// The clusters of one convolution; the same for every output channel. A value type.
class ClusterMap {
 public:
  // `channels` >= 1 input channels, N >= 1 of them in a cluster.
  ClusterMap(int channels, int n);

  int channels() const { return static_cast<int>(cluster_of_.size()); }
  // The requested N.
  int n() const { return n_; }
  // Number of clusters, G.
  int clusters() const { return clusters_; }
  // Cluster of input channel c, 0 <= c < channels().
  int cluster_of(int c) const { return cluster_of_[c]; }
  // True if clusters are paired inside blocks of 2N channels as described above.
  bool paired() const { return paired_; }
  // The channels of cluster g in rising order.
  std::vector<int> channels_of(int g) const;

 private:
  int n_;
  int clusters_ = 0;
  bool paired_ = false;
  std::vector<int> cluster_of_;
};

}  // namespace tern

#endif  // TERN_SERVER_TENSOR_CLUSTER_H_
