// The layout of packed keys, one codebook after the other.
//
//   id       64 bytes of text, checked by every search
//   Scale    the numbers a bound is made of
//   centre   float[D], the mean of the finite keys
//   bits     uint16 a block: which of its 16 keys are usable
//   blocks   float[Kb][D][16]: centred keys, 16 neighbours a block, so that a vector holds one coordinate of 16 keys
//   bias     float, -|k|^2/2, or -inf for a key that is barred, in the order of the filter
//   tiles    bfloat16[groups*16][pairs][16][2], only for filters that multiply bfloat16
//
// A filter in float32 reads the blocks. A filter in bfloat16 reads the tiles: tile t of group g holds the keys
// g*256 + l*16 + t in its lanes l = 0..15, so that the maximum of one lane over the 16 tiles of a group stands for the
// 16 neighbours of one block. Every part starts at a multiple of 64 bytes. Keys in float64 are searched by direct
// difference alone, and their packed form is the id.
#pragma once

#include "common.h"

#include <cstring>

namespace kvb {

constexpr int64_t kLanes = 16; // keys of a block
constexpr int64_t kGroup = 256; // keys of a group of tiles
constexpr int64_t kPart = 64; // bytes, the alignment of every part

struct Scale {
  float radius; // largest norm of a centred key
  float rounding; // largest norm of what bfloat16 rounding takes off a centred key
  float tame; // 1, or 0 if magnitudes could overflow: then every key is rescored
};

inline int64_t padded(int64_t bytes) {
  return (bytes + kPart - 1) / kPart * kPart;
}

struct Layout {
  int64_t K, D;
  bool wide; // float64 keys
  bool halved; // with bfloat16 tiles

  int64_t blocks() const {
    return (K + kLanes - 1) / kLanes;
  }
  int64_t groups() const {
    return (K + kGroup - 1) / kGroup;
  }
  // The pairs of coordinates of a tile: cut evenly into parts of at most 16, the rows of one hardware tile.
  int64_t parts() const {
    return ((D + 1) / 2 + 15) / 16;
  }
  int64_t pairs() const { // of one part
    return ((D + 1) / 2 + parts() - 1) / parts();
  }
  int64_t biases() const {
    return halved ? groups() * kGroup : blocks() * kLanes;
  }
  int64_t scale() const {
    return kPart;
  }
  int64_t centre() const {
    return scale() + kPart;
  }
  int64_t bits() const {
    return centre() + padded(4 * D);
  }
  int64_t block() const {
    return bits() + padded(2 * blocks());
  }
  int64_t bias() const {
    return block() + 4 * blocks() * D * kLanes;
  }
  int64_t tiles() const {
    return bias() + padded(4 * biases());
  }
  int64_t tile_bytes() const {
    return parts() * pairs() * kLanes * 4;
  }
  int64_t nbytes() const {
    if (wide) return kPart;
    return halved ? tiles() + groups() * kLanes * tile_bytes() : tiles();
  }

  std::string id() const {
    std::ostringstream text;
    text << "kvb csrc 1: K=" << K << " D=" << D << (wide ? " float64" : halved ? " bfloat16" : " float32");
    std::string id = text.str();
    id.resize(kPart, ' ');
    return id;
  }
};

// Where the filter finds key k among the biases: the lane of its tile, or simply in order.
inline int64_t bias_place(const Layout& layout, int64_t k) {
  if (!layout.halved) return k;
  const int64_t group = k / kGroup, lane = k % kGroup / kLanes, tile = k % kLanes;
  return (group * kLanes + tile) * kLanes + lane;
}

} // namespace kvb
