// Between the driver of the sum-table convolutions (table_conv.cc) and their loops
// (table_conv_avx2.cc). Included by a file with its own instruction-set flags: keep it free of
// inline code and of library headers that have some.
//
// A table row is a run of s16 sums of consecutive positions (pixels); a state picks one of 81 rows.
#ifndef TERN_SERVER_KERNELS_TABLE_CONV_TILES_H_
#define TERN_SERVER_KERNELS_TABLE_CONV_TILES_H_

#include <cstddef>
#include <cstdint>

namespace tern::kernels::tables {

inline constexpr int kStates = 81;
inline constexpr int kZeroState = 40;  // four zero weights
inline constexpr int kLanes = 16;      // s16 in a vector

// ---- 3x3 -------------------------------------------------------------------------------------

// Input lines of a tile have 32 positions: 64 bytes of s16, one cache line. The taps of output
// position p are positions p, p + 1, p + 2. The first vector of outputs starts at position 0, the
// second at 14, so that its last tap ends with the line: no load crosses a cache line.
inline constexpr int kLinePositions = 32;
inline constexpr int kSecondVector = 14;
inline constexpr int kMaxRows = 3;  // of outputs in a tile; it reads two lines more
inline constexpr int kMaxVectors = 2;
// Lines lie in a ring of slots: consecutive tiles share two.
inline constexpr int kSlots = 8;
inline constexpr int kPlaneStride = kSlots * kLinePositions;
inline constexpr size_t kTable3x3Bytes = size_t{kStates} * (kMaxRows + 2) * 2 * kLinePositions;

// Adds a quad's nine taps to the sums of `outputs` output channels.
struct QuadArgs {
  const char* table;      // [81][rows + 2][32] s16, 64-byte aligned
  const uint8_t* states;  // [outputs][9]
  int16_t* sums;          // [outputs][rows][vectors][16], the cluster's; 64-byte aligned
  // At the flush: the sums of the pair's other cluster, and the s32 sums, in which each vector lies
  // as its pixels 0-3, 8-11, 4-7, 12-15.
  const int16_t* partner;
  const int32_t* scales;  // [outputs] pairs {partner's, own}
  int32_t* acc;
  bool clear;  // acc is overwritten
  int outputs;
};
using QuadKernel = void (*)(const QuadArgs&);

// [rows - 1][vectors - 1][step]. The first quad of a run overwrites `sums`, the last one flushes.
enum QuadStep { kMiddle = 0, kFirst = 1, kLast = 2, kOnly = 3 };
extern const QuadKernel kQuadKernels[kMaxRows][kMaxVectors][4];

// The table of a quad for `rows` output rows whose first line is in `slot`. planes: the quad's four
// channels, kPlaneStride apart.
void BuildLines(const uint8_t* planes, int slot, int rows, char* table);

// ---- 1x1 -------------------------------------------------------------------------------------

inline constexpr int kGroupQuads = 8;  // 32 channels at a time
inline constexpr size_t kTable1x1Bytes = size_t{kGroupQuads} * kStates * 2 * kLanes;

struct GroupArgs {
  const char* table;       // [8 quads][81][16] s16, 64-byte aligned
  const uint16_t* states;  // [outputs][8]: bytes from `table` to the row
  const int32_t* scales;   // [outputs][pairs]
  int32_t* acc;            // [outputs][16] in the order of QuadArgs::acc
  bool clear;
  int outputs;
};
using GroupKernel = void (*)(const GroupArgs&);

// By the number of cluster pairs in 32 channels: 1, 2 or 4.
extern const GroupKernel kGroupKernels[5];

// The tables of eight quads; planes of 16 positions.
void BuildGroup(const uint8_t* planes, char* table);

// ---- Both ------------------------------------------------------------------------------------

// Turns `channels` (a multiple of 16) channels of 16 pixels into planes `plane_stride` bytes apart.
// In every 8 channels the planes hold channels 0, 1, 4, 5 and then 2, 3, 6, 7: the quads.
void GatherPlanes(const uint8_t* const* pixels, int channels, uint8_t* planes,
                  int64_t plane_stride);

// tile[16 pixels][16 output channels] of one vector of s32 sums; output channels are `stride`
// elements apart in `acc`.
void TransposeSums(const int32_t* acc, int64_t stride, int32_t* tile);

}  // namespace tern::kernels::tables

#endif  // TERN_SERVER_KERNELS_TABLE_CONV_TILES_H_
