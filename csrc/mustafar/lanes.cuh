// How the lanes of a warp share rows: loads, stores, bitmaps and packed values.
//
// A row belongs to kPerRow neighbouring lanes. Lane t of them holds kChunks chunks of 8 channels; chunk i
// starts at channel 8 * (i * kPerRow + t), so that one 16-byte load of all lanes reads consecutive bytes of
// each row. What is kept is a word per lane: bit 8 * i + j stands for channel j of chunk i, so byte i is byte
// i * kPerRow + t of the row's bitmap.
#pragma once

#include "mustafar/dtype.cuh"

namespace mustafar {

constexpr uint32_t kFullWarp = 0xFFFFFFFFu;

template <int kDim>
struct Lanes {
  static constexpr int kChunks = kDim % 64 == 0 ? 4 : 3;
  static constexpr int kPerRow = kDim / 8 / kChunks;  // 64: 2, 96: 4, 128: 4, 256: 8
  static constexpr int kRows = 32 / kPerRow;          // rows a warp holds at a time
  static constexpr int kWords = 4 * kChunks;          // 32-bit words of values per lane, two channels each
  static constexpr int kStep = 8 * kPerRow;           // channels from one chunk of a lane to its next
  static constexpr uint32_t kValid = kChunks == 4 ? 0xFFFFFFFFu : 0x00FFFFFFu;
  static_assert(kPerRow * kChunks * 8 == kDim && (kPerRow & (kPerRow - 1)) == 0, "unsupported head_dim");
};

template <int kPerRow, typename Value>
__device__ __forceinline__ Value row_sum(Value value) {
#pragma unroll
  for (int offset = 1; offset < kPerRow; offset *= 2) {
    value += __shfl_xor_sync(kFullWarp, value, offset);
  }
  return value;
}

__device__ __forceinline__ bool is_aligned(const void* pointer, uint32_t bytes) {
  return (reinterpret_cast<uintptr_t>(pointer) & (bytes - 1)) == 0;
}

// `chunk0` points at the lane's first chunk. Rows may start at any element; those on 16 bytes are read 16 at
// a time.
template <int kDim>
__device__ __forceinline__ void load_chunks(const uint16_t* chunk0, uint32_t (&words)[Lanes<kDim>::kWords]) {
  using L = Lanes<kDim>;
  if (is_aligned(chunk0, 16)) {
#pragma unroll
    for (int i = 0; i < L::kChunks; ++i) {
      const uint4 v = *reinterpret_cast<const uint4*>(chunk0 + i * L::kStep);
      words[4 * i] = v.x;
      words[4 * i + 1] = v.y;
      words[4 * i + 2] = v.z;
      words[4 * i + 3] = v.w;
    }
  } else {
#pragma unroll
    for (int m = 0; m < L::kWords; ++m) {
      const uint16_t* pair = chunk0 + (m / 4) * L::kStep + (m % 4) * 2;
      words[m] = pair[0] | static_cast<uint32_t>(pair[1]) << 16;
    }
  }
}

template <int kDim>
__device__ __forceinline__ void store_chunks(uint16_t* chunk0, const uint32_t (&words)[Lanes<kDim>::kWords]) {
  using L = Lanes<kDim>;
  if (is_aligned(chunk0, 16)) {
#pragma unroll
    for (int i = 0; i < L::kChunks; ++i) {
      *reinterpret_cast<uint4*>(chunk0 + i * L::kStep) =
          make_uint4(words[4 * i], words[4 * i + 1], words[4 * i + 2], words[4 * i + 3]);
    }
  } else {
#pragma unroll
    for (int m = 0; m < L::kWords; ++m) {
      uint16_t* pair = chunk0 + (m / 4) * L::kStep + (m % 4) * 2;
      pair[0] = static_cast<uint16_t>(words[m]);
      pair[1] = static_cast<uint16_t>(words[m] >> 16);
    }
  }
}

// From bytes by chunk to consecutive bytes: word `bitmap_word` of the row's bitmap. Lanes whose number is not
// below kDim / 32 (the fourth of 96 channels) get 0.
template <int kDim>
__device__ __forceinline__ uint32_t to_bitmap(uint32_t kept, int t) {
  const uint32_t neighbour = __shfl_xor_sync(kFullWarp, kept, 1);
  if (Lanes<kDim>::kPerRow == 2) {
    // Lane 0 takes bytes 0, 1 of both lanes, lane 1 bytes 2, 3.
    return __byte_perm(kept, neighbour, (t & 1) == 0 ? 0x5140 : 0x3726);
  }
  // A transpose of 4 x 4 bytes among four lanes: single bytes with the neighbour, then pairs with the next
  // but one.
  const uint32_t pairs = __byte_perm(kept, neighbour, (t & 1) == 0 ? 0x6240 : 0x3715);
  const uint32_t other = __shfl_xor_sync(kFullWarp, pairs, 2);
  return __byte_perm(pairs, other, (t & 2) == 0 ? 0x5410 : 0x3276);
}

// Which 32-bit word of the row's bitmap to_bitmap() gives lane t.
template <int kDim>
__device__ __forceinline__ int bitmap_word(int t) {
  return Lanes<kDim>::kPerRow == 8 ? 2 * (t & 3) + (t >> 2) : t;
}

// The lane's bytes of a bitmap row that starts anywhere.
template <int kDim>
__device__ __forceinline__ uint32_t load_kept(const uint8_t* bitmap_row, int t) {
  using L = Lanes<kDim>;
  uint32_t kept = 0;
#pragma unroll
  for (int i = 0; i < L::kChunks; ++i) {
    kept |= static_cast<uint32_t>(bitmap_row[i * L::kPerRow + t]) << (8 * i);
  }
  return kept;
}

// Kept channels of the row in front of each of the lane's chunks (byte i for chunk i), and in the whole row.
// Counts in front of a chunk are at most 248, so bytes do not overflow into each other.
template <int kDim>
__device__ __forceinline__ uint32_t chunk_starts(uint32_t kept, int t, uint32_t& row_count) {
  constexpr int kPerRow = Lanes<kDim>::kPerRow;
  uint32_t count = kept - ((kept >> 1) & 0x55555555u);
  count = (count & 0x33333333u) + ((count >> 2) & 0x33333333u);
  count = (count + (count >> 4)) & 0x0F0F0F0Fu;
  uint32_t through = count;  // inclusive sum over lanes, chunk by chunk
#pragma unroll
  for (int offset = 1; offset < kPerRow; offset *= 2) {
    const uint32_t left = __shfl_up_sync(kFullWarp, through, offset, kPerRow);
    through += t >= offset ? left : 0;
  }
  const uint32_t all = __shfl_sync(kFullWarp, through, kPerRow - 1, kPerRow);
  row_count = (all & 0xFF) + ((all >> 8) & 0xFF) + ((all >> 16) & 0xFF) + (all >> 24);
  return through - count + all * 0x01010100u;
}

// Writes the lane's kept values where they belong in the row's packed values, in shared memory.
template <int kDim>
__device__ __forceinline__ void pack_chunks(const uint32_t (&words)[Lanes<kDim>::kWords], uint32_t kept,
                                            uint32_t starts, uint16_t* row_values) {
  const uint32_t base = shared_address(row_values);
#pragma unroll
  for (int i = 0; i < Lanes<kDim>::kChunks; ++i) {
    uint32_t next = base + 2 * ((starts >> (8 * i)) & 0xFF);
#pragma unroll
    for (int j = 0; j < 8; ++j) {
      const uint32_t pair = words[4 * i + j / 2];
      append_shared_u16(kept & 1u << (8 * i + j), next, j % 2 == 0 ? pair : pair >> 16);
    }
  }
}

// The reverse of pack_chunks; dropped channels become +0.
template <int kDim>
__device__ __forceinline__ void unpack_chunks(uint32_t (&words)[Lanes<kDim>::kWords], uint32_t kept,
                                              uint32_t starts, const uint16_t* row_values) {
#pragma unroll
  for (int i = 0; i < Lanes<kDim>::kChunks; ++i) {
    const uint16_t* next = row_values + ((starts >> (8 * i)) & 0xFF);
#pragma unroll
    for (int j = 0; j < 8; ++j) {
      uint32_t value = 0;
      if (kept & 1u << (8 * i + j)) {
        value = *next++;
      }
      words[4 * i + j / 2] = j % 2 == 0 ? value : words[4 * i + j / 2] | value << 16;
    }
  }
}

// Sets dropped channels to +0.
template <int kDim>
__device__ __forceinline__ void zero_dropped(uint32_t (&words)[Lanes<kDim>::kWords], uint32_t kept) {
#pragma unroll
  for (int m = 0; m < Lanes<kDim>::kWords; ++m) {
    const uint32_t low = kept & 1u << (2 * m) ? 0x0000FFFFu : 0;
    const uint32_t high = kept & 2u << (2 * m) ? 0xFFFF0000u : 0;
    words[m] &= low | high;
  }
}

}  // namespace mustafar
