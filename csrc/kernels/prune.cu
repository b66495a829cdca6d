// prune: zero what a selection drops, in place on a dense tensor, and say what was kept.

#include "mustafar/select.cuh"
#include "mustafar/store_params.h"

namespace mustafar {

__device__ __forceinline__ uint16_t* row_of(const PruneParams& p, int64_t sequence, int64_t token, int head) {
  return p.x + sequence * p.x_batch_stride + token * p.x_token_stride + head * p.x_head_stride;
}

// Bytes of the mask row of one token and head; rows are kDim / 8 bytes apart in this order.
template <int kDim>
__device__ __forceinline__ uint8_t* mask_of(const PruneParams& p, int64_t sequence, int64_t token, int head) {
  return p.mask + ((sequence * p.tokens + token) * p.heads + head) * (kDim / 8);
}

// Word `index` of a mask row, which starts on any byte.
__device__ __forceinline__ void store_mask_word(uint8_t* row, int index, uint32_t word) {
  uint8_t* to = row + 4 * index;
  if (is_aligned(to, 4)) {
    *reinterpret_cast<uint32_t*>(to) = word;
  } else {
    for (int i = 0; i < 4; ++i) {
      to[i] = static_cast<uint8_t>(word >> (8 * i));
    }
  }
}

template <typename T, int kDim>
__device__ __forceinline__ void prune_token(const PruneParams& p) {
  using L = Lanes<kDim>;
  const int lane = threadIdx.x % 32;
  const int t = lane % L::kPerRow;
  const uint32_t heads = p.heads;
  const uint32_t tiles = (static_cast<uint32_t>(p.tokens) + kTileRows - 1) / kTileRows;
  const uint32_t unit = blockIdx.x * kStoreWarps + threadIdx.x / 32;
  if (unit >= p.batch * tiles * heads) {
    return;
  }
  const int head = unit % heads;
  const int64_t sequence = unit / heads / tiles;
  const int64_t first = static_cast<int64_t>(unit / heads % tiles) * kTileRows;

  for (int pass = 0; pass < kTileRows / L::kRows; ++pass) {
    const int64_t token = first + pass * L::kRows + lane / L::kPerRow;
    const bool present = token < p.tokens;
    uint16_t* chunk0 = row_of(p, sequence, token, head) + 8 * t;
    uint32_t words[L::kWords] = {};
    if (present) {
      load_chunks<kDim>(chunk0, words);
    }
    const Ranking ranking = p.weights != nullptr
                                ? rank_weighted<T, kDim>(words, p.weights + head * kDim + 8 * t, p.keep)
                                : rank_magnitudes<kDim>(words, p.keep);
    // `all_ties` is the same for every lane, so take_first's shuffles stay convergent.
    const uint32_t kept = p.all_ties ? ranking.above | ranking.tied : take_first<L::kPerRow>(ranking, t);
    const uint32_t bitmap = p.mask != nullptr ? to_bitmap<kDim>(kept, t) : 0;
    if (present) {
      zero_dropped<kDim>(words, kept);
      store_chunks<kDim>(chunk0, words);
      if (p.mask != nullptr && t < kDim / 32) {
        store_mask_word(mask_of<kDim>(p, sequence, token, head), bitmap_word<kDim>(t), bitmap);
      }
    }
  }
}

// Channel direction. Lane l holds channels 2l and 2l + 1 of 64 for all tokens of the group, so a channel's
// candidates lie in one lane: no shuffles but for the mask.
constexpr int kGroup = 32;

// Keeps the `keep` largest magnitudes of 32; the values are the halves of `pairs`, `select` (0x5410 or
// 0x7632) says which. Bit i of the result is value i.
__device__ __forceinline__ uint32_t select_column(const uint32_t (&pairs)[kGroup], uint32_t select,
                                                  uint32_t keep) {
  uint32_t planes[16];
#pragma unroll
  for (int i = 0; i < 16; ++i) {
    planes[i] = __byte_perm(pairs[i], pairs[i + 16], select);
  }
  planes_of_16_bits(planes);
  return take_first<1>(rank_planes<15, 1>(planes, 0xFFFFFFFFu, keep), 0);
}

// As `select_column`, by abs(x) * weight of the token, for the channel at `x`, tokens `stride` apart; lane i
// holds the weight of token i. Nothing is read unless `present`.
template <typename T>
__device__ __forceinline__ uint32_t select_weighted_column(const uint16_t* x, int64_t stride, bool present,
                                                           float weight, uint32_t keep) {
  uint32_t planes[32];
#pragma unroll
  for (int i = 0; i < kGroup; ++i) {
    const float value = T::to_float(present ? x[i * stride] : static_cast<uint16_t>(0));
    planes[i] = rank_of_score(value * __shfl_sync(kFullWarp, weight, i));
  }
  planes_of_32_bits(planes);
  return take_first<1>(rank_planes<31, 1>(planes, 0xFFFFFFFFu, keep), 0);
}

// Puts the bits of `even` at even places and those of `odd` at odd places; the low or the high 16 of each.
__device__ __forceinline__ uint32_t interleave(uint32_t even, uint32_t odd, int shift) {
  const auto spread = [](uint32_t bits) {
    bits = (bits | bits << 8) & 0x00FF00FFu;
    bits = (bits | bits << 4) & 0x0F0F0F0Fu;
    bits = (bits | bits << 2) & 0x33333333u;
    return (bits | bits << 1) & 0x55555555u;
  };
  return spread((even >> shift) & 0xFFFFu) | spread((odd >> shift) & 0xFFFFu) << 1;
}

template <typename T, int kDim>
__device__ __forceinline__ void prune_channel(const PruneParams& p) {
  constexpr uint32_t kColumns = (kDim + 63) / 64;
  const int lane = threadIdx.x % 32;
  const uint32_t heads = p.heads;
  const uint32_t groups = static_cast<uint32_t>(p.tokens) / kGroup;
  const uint32_t unit = blockIdx.x * kStoreWarps + threadIdx.x / 32;
  if (unit >= p.batch * groups * heads * kColumns) {
    return;
  }
  const int column = unit % kColumns;
  const int head = unit / kColumns % heads;
  const int64_t sequence = unit / kColumns / heads / groups;
  const int64_t first = static_cast<int64_t>(unit / kColumns / heads % groups) * kGroup;
  const int channel = column * 64 + 2 * lane;
  const bool present = channel < kDim;  // the second half of the last 64 channels of 96 is not there
  uint16_t* const base = row_of(p, sequence, first, head) + channel;
  const bool wide = is_aligned(base, 4) && p.x_token_stride % 2 == 0;

  uint32_t even = 0;
  uint32_t odd = 0;
  if (p.weights != nullptr) {
    const float weight = p.weights[(sequence * p.tokens + first + lane) * heads + head];
    // One channel after the other and before the pairs: all at once would not fit in registers.
#pragma unroll 1
    for (int half = 0; half < 2; ++half) {
      const uint32_t kept = select_weighted_column<T>(base + half, p.x_token_stride, present, weight, p.keep);
      even = half == 0 ? kept : even;
      odd = kept;
    }
  }
  uint32_t pairs[kGroup];
#pragma unroll
  for (int i = 0; i < kGroup; ++i) {
    pairs[i] = 0;
    if (present) {
      const uint16_t* from = base + i * p.x_token_stride;
      pairs[i] =
          wide ? *reinterpret_cast<const uint32_t*>(from) : from[0] | static_cast<uint32_t>(from[1]) << 16;
    }
  }
  if (p.weights == nullptr) {
    even = select_column(pairs, 0x5410, p.keep);
    odd = select_column(pairs, 0x7632, p.keep);
  }
#pragma unroll
  for (int i = 0; i < kGroup; ++i) {
    const uint32_t pair = pairs[i] & ((even >> i & 1 ? 0x0000FFFFu : 0) | (odd >> i & 1 ? 0xFFFF0000u : 0));
    if (present) {
      uint16_t* to = base + i * p.x_token_stride;
      if (wide) {
        *reinterpret_cast<uint32_t*>(to) = pair;
      } else {
        to[0] = static_cast<uint16_t>(pair);
        to[1] = static_cast<uint16_t>(pair >> 16);
      }
    }
  }
  if (p.mask == nullptr) {
    return;
  }
  // Lane i collects and writes the 64 mask bits of token i.
  uint32_t my_even = 0;
  uint32_t my_odd = 0;
#pragma unroll
  for (int i = 0; i < kGroup; ++i) {
    const uint32_t all_even = __ballot_sync(kFullWarp, even >> i & 1);
    const uint32_t all_odd = __ballot_sync(kFullWarp, odd >> i & 1);
    my_even = lane == i ? all_even : my_even;
    my_odd = lane == i ? all_odd : my_odd;
  }
  uint8_t* row = mask_of<kDim>(p, sequence, first + lane, head);
  store_mask_word(row, 2 * column, interleave(my_even, my_odd, 0));
  if (64 * column + 32 < kDim) {
    store_mask_word(row, 2 * column + 1, interleave(my_even, my_odd, 16));
  }
}

}  // namespace mustafar

// Four CTAs to an SM: left alone, the compiler aims higher on some architectures and spills.
#define MST_VARIANT(dtype, dim)                                                                  \
  extern "C" __global__ void __launch_bounds__(32 * mustafar::kStoreWarps, 4)                    \
      mst_prune_token_##dtype##_d##dim(const __grid_constant__ mustafar::PruneParams params) {   \
    mustafar::prune_token<mustafar::dtype, dim>(params);                                         \
  }                                                                                              \
  extern "C" __global__ void __launch_bounds__(32 * mustafar::kStoreWarps, 4)                    \
      mst_prune_channel_##dtype##_d##dim(const __grid_constant__ mustafar::PruneParams params) { \
    mustafar::prune_channel<mustafar::dtype, dim>(params);                                       \
  }
#include "variants.inc"
#undef MST_VARIANT
