#include "server/tensor/cluster.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <vector>

namespace tern {
namespace {

TEST(ClusterMapTest, EveryChannelIsInExactlyOneClusterAndNoClusterIsEmptyOrTooLarge) {
  for (int channels = 1; channels <= 80; ++channels) {
    for (int n = 1; n <= 70; ++n) {
      SCOPED_TRACE(testing::Message() << "channels " << channels << " n " << n);
      const ClusterMap map(channels, n);
      ASSERT_EQ(map.channels(), channels);
      ASSERT_EQ(map.n(), n);
      std::vector<int> seen;
      for (int g = 0; g < map.clusters(); ++g) {
        const std::vector<int> members = map.channels_of(g);
        ASSERT_FALSE(members.empty()) << g;
        ASSERT_LE(static_cast<int>(members.size()), n) << g;
        ASSERT_TRUE(std::is_sorted(members.begin(), members.end()));
        for (int c : members) ASSERT_EQ(map.cluster_of(c), g);
        seen.insert(seen.end(), members.begin(), members.end());
      }
      std::sort(seen.begin(), seen.end());
      ASSERT_EQ(static_cast<int>(seen.size()), channels);
      for (int c = 0; c < channels; ++c) ASSERT_EQ(seen[c], c);
    }
  }
}

// The kernels' layout: in four consecutive channels of a paired map, the first two share a
// cluster and the last two share its partner.
TEST(ClusterMapTest, AlignedFoursHoldTwoChannelsOfEachCluster) {
  for (int n = 2; n <= 64; n += 2) {
    for (int channels = n + 1; channels <= 4 * n + 3; ++channels) {
      const ClusterMap map(channels, n);
      ASSERT_TRUE(map.paired());
      for (int c = 0; c + 1 < channels; c += 2) ASSERT_EQ(map.cluster_of(c), map.cluster_of(c + 1));
      if (n % 4 != 0 && n != 2) continue;  // blocks of 2n channels start at multiples of four
      for (int c = 0; c + 3 < channels; c += 4) {
        ASSERT_EQ(map.cluster_of(c) + 1, map.cluster_of(c + 2));
        ASSERT_EQ(map.cluster_of(c) % 2, 0);
      }
    }
  }
}

TEST(ClusterMapTest, AFullBlockHasTwoClustersOfExactlyN) {
  for (int n : {2, 4, 6, 8, 10, 16, 64}) {
    const ClusterMap map(2 * n, n);
    ASSERT_EQ(map.clusters(), 2);
    EXPECT_EQ(map.channels_of(0).size(), static_cast<size_t>(n));
    EXPECT_EQ(map.channels_of(1).size(), static_cast<size_t>(n));
  }
}

using Channels = std::vector<int>;

TEST(ClusterMapTest, DescribedExampleForFour) {
  const ClusterMap map(8, 4);
  EXPECT_EQ(map.channels_of(0), (Channels{0, 1, 4, 5}));
  EXPECT_EQ(map.channels_of(1), (Channels{2, 3, 6, 7}));
}

TEST(ClusterMapTest, ShortTails) {
  const ClusterMap six(6, 4);
  EXPECT_EQ(six.clusters(), 2);
  EXPECT_EQ(six.channels_of(0), (Channels{0, 1, 4, 5}));
  EXPECT_EQ(six.channels_of(1), (Channels{2, 3}));
  // Up to two channels in the last block: it has no second cluster, and none is counted.
  const ClusterMap nine(9, 4);
  EXPECT_EQ(nine.clusters(), 3);
  EXPECT_EQ(nine.channels_of(2), (Channels{8}));
  const ClusterMap ten(10, 4);
  EXPECT_EQ(ten.clusters(), 3);
  EXPECT_EQ(ten.channels_of(2), (Channels{8, 9}));
  const ClusterMap eleven(11, 4);
  EXPECT_EQ(eleven.clusters(), 4);
  EXPECT_EQ(eleven.channels_of(3), (Channels{10}));
}

TEST(ClusterMapTest, OddOrLargeNGivesContiguousRuns) {
  const ClusterMap odd(8, 3);
  EXPECT_FALSE(odd.paired());
  EXPECT_EQ(odd.clusters(), 3);
  EXPECT_EQ(odd.channels_of(2), (Channels{6, 7}));
  for (int n : {8, 9, 64, 1000}) {
    const ClusterMap all(8, n);
    EXPECT_FALSE(all.paired());
    EXPECT_EQ(all.clusters(), 1);
  }
  EXPECT_EQ(ClusterMap(5, 1).clusters(), 5);
}

}  // namespace
}  // namespace tern
