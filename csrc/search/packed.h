// The layout of packed keys, one codebook after the other.
//
//   id       64 bytes of text, checked by every search
//   mark     uint64, a fingerprint of the keys: whether they are still the ones that were packed
//   Scale    the numbers a bound is made of
//   centre   float[D], the mean of the finite keys
//   bits     uint16 a block: which of its 16 keys are usable
//   blocks   float[Kb][D + 1][16]: centred keys k, 16 neighbours a block, so that a vector holds one coordinate of 16
//            keys; then the bias of each, -|k|^2/2, or -inf for a key that is barred
//   bias     float, the same biases in the order of the tiles
//   tiles    uint8[groups*4][depth][4][16][4], the keys as 8-bit numbers, four coordinates together; these two only
//            where a filter multiplies them
//
// The float32 filter reads the blocks. The 8-bit filter reads the tiles, four side by side: tile t of group g holds the
// keys g*256 + l*16 + t in its lanes l = 0..15, so that the maximum of one lane over the 16 tiles of a group stands for
// the 16 neighbours of one block. Every part starts at a multiple of 64 bytes.
#pragma once

#include "../common.h"

#include <cstring>
#include <string>

namespace kvb {

constexpr int64_t kLanes = 16; // keys of a block
constexpr int64_t kGroup = 256; // keys of a group of tiles
constexpr int64_t kAlignment = 64; // bytes, the alignment of every part
constexpr int64_t kTileQuads = 16; // quadruples of coordinates in a hardware tile
constexpr int64_t kInterleaved = 4; // tiles whose rows alternate in memory: their sums wait for nothing
constexpr int64_t kTileRow = 64; // bytes of four coordinates in a tile
// The byte that stands for zero in a tile: products on x86-64 take the bytes of one side as unsigned.
constexpr int32_t kZeroByte =
#if defined(__aarch64__)
    0;
#else
    128;
#endif

struct Scale {
  float radius; // largest norm of a centred key
  float step; // a coordinate times this is its 8-bit number
  float lost; // largest norm, in 8-bit numbers, of what rounding to them takes off a key
  float tame; // 1, or 0 if magnitudes could overflow: then every key is rescored
};

inline int64_t padded(int64_t bytes) {
  return (bytes + kAlignment - 1) / kAlignment * kAlignment;
}

struct Layout {
  int64_t K, D;
  bool float64; // float64 keys
  bool tiled; // with 8-bit tiles

  int64_t blocks() const {
    return (K + kLanes - 1) / kLanes;
  }
  int64_t groups() const {
    return (K + kGroup - 1) / kGroup;
  }
  int64_t block_floats() const {
    return (D + 1) * kLanes;
  }
  // The quadruples of coordinates in a tile: cut evenly into parts that fit a hardware tile.
  int64_t parts() const {
    return ((D + 3) / 4 + kTileQuads - 1) / kTileQuads;
  }
  int64_t quads() const { // of one part
    return ((D + 3) / 4 + parts() - 1) / parts();
  }
  int64_t depth() const { // of all parts
    return parts() * quads();
  }
  // Where tile ``t`` of group ``group`` begins among the tiles; its next row is kInterleaved * kTileRow further.
  int64_t tile(int64_t group, int64_t t) const {
    return ((group * kLanes + t) / kInterleaved * depth() * kInterleaved + t % kInterleaved) * kTileRow;
  }

  // Where each part begins, in bytes.
  int64_t mark() const {
    return kAlignment;
  }
  int64_t scale() const {
    return mark() + kAlignment;
  }
  int64_t centre() const {
    return scale() + kAlignment;
  }
  int64_t bits() const {
    return centre() + padded(4 * D);
  }
  int64_t block() const {
    return bits() + padded(2 * blocks());
  }
  int64_t bias() const {
    return block() + 4 * blocks() * block_floats();
  }
  int64_t tiles() const {
    return bias() + 4 * groups() * kGroup;
  }
  int64_t nbytes() const {
    return tiled ? tiles() + tile(groups(), 0) : bias();
  }

  std::string id() const {
    std::string id = "kvb cpp 5: K=" + std::to_string(K) + " D=" + std::to_string(D);
    id += !tiled ? " float32" : kZeroByte ? " int8" : " int8 signed";
    id += float64 ? " of float64" : "";
    id.resize(kAlignment, ' ');
    return id;
  }
};

// The biases of one codebook as its filter reads them: sixteen for each tile, or for each block.
struct Biases {
  const float* data;
  int64_t step; // floats from one sixteen to the next

  Biases(const Layout& layout, const char* packed)
      : data(reinterpret_cast<const float*>(packed + (layout.tiled ? layout.bias() : layout.block())) +
             (layout.tiled ? 0 : layout.D * kLanes)),
        step(layout.tiled ? kLanes : layout.block_floats()) {}
  explicit Biases(const float* masked) : data(masked), step(kLanes) {}

  static int64_t count(const Layout& layout) {
    return layout.tiled ? layout.groups() * kLanes : layout.blocks();
  }
  // Which sixteen holds key k, times 16, plus the lane.
  static int64_t place(const Layout& layout, int64_t k) {
    if (!layout.tiled) return k;
    const int64_t group = k / kGroup, lane = k % kGroup / kLanes, tile = k % kLanes;
    return (group * kLanes + tile) * kLanes + lane;
  }
};

} // namespace kvb
