// Exact selection of the `keep` largest of a row, ties to the lower channel, without sorting.
//
// Ranks are turned into bit planes: word b of a lane holds bit b of all its channels. A radix select then
// walks from the top bit down with one population count per lane and bit, and what it ends with is the bitmap
// itself. Every lane runs the same instructions whatever the data.
#pragma once

#include "mustafar/lanes.cuh"

namespace mustafar {

// One step of a bit transpose: the bits under `kMask` of `b` change places with the bits kShift higher of
// `a`.
template <int kShift, uint32_t kMask>
__device__ __forceinline__ void swap_bits(uint32_t& a, uint32_t& b) {
  static_assert(static_cast<uint32_t>(kMask << kShift) == ~kMask, "not a mask of this step");
  const uint32_t low = bit_select(kMask, a, b << kShift);
  b = bit_select(kMask, a >> kShift, b);
  a = low;
}

// Transposes within groups of 16 words: afterwards bit e of either half of word b is what bit b of the same
// half of word e was. kWords is 16 or 32.
template <int kWords>
__device__ __forceinline__ void transpose_halves(uint32_t (&w)[kWords]) {
#pragma unroll
  for (int e = 0; e < kWords; ++e) {
    if (e & 8) continue;
    const uint32_t a = w[e];
    w[e] = __byte_perm(a, w[e + 8], 0x6240);
    w[e + 8] = __byte_perm(a, w[e + 8], 0x7351);
  }
#pragma unroll
  for (int e = 0; e < kWords; ++e) {
    if ((e & 4) == 0) swap_bits<4, 0x0F0F0F0Fu>(w[e], w[e + 4]);
  }
#pragma unroll
  for (int e = 0; e < kWords; ++e) {
    if ((e & 2) == 0) swap_bits<2, 0x33333333u>(w[e], w[e + 2]);
  }
#pragma unroll
  for (int e = 0; e < kWords; ++e) {
    if ((e & 1) == 0) swap_bits<1, 0x55555555u>(w[e], w[e + 1]);
  }
}

// Planes of 32 ranks of 16 bits: word e of `w` holds rank e in its low half and rank e + 16 in its high half.
__device__ __forceinline__ void planes_of_16_bits(uint32_t (&w)[16]) { transpose_halves<16>(w); }

// Planes of 32 ranks of 32 bits.
__device__ __forceinline__ void planes_of_32_bits(uint32_t (&w)[32]) {
#pragma unroll
  for (int e = 0; e < 16; ++e) {
    const uint32_t a = w[e];
    w[e] = __byte_perm(a, w[e + 16], 0x5410);
    w[e + 16] = __byte_perm(a, w[e + 16], 0x7632);
  }
  transpose_halves<32>(w);
}

// The state of a radix select: the elements known to be above the keep-th largest, those that may still equal
// it, and how many of these are to be taken, negated: -`left` as an unsigned number.
struct Ranking {
  uint32_t above;
  uint32_t tied;
  uint32_t minus_left;
};

// Splits the tied elements by `plane`. If fewer than `left` of them are in it, all of those are above the
// keep-th largest, which is then among the others; if not, it is among those.
template <int kPerRow>
__device__ __forceinline__ void narrow(Ranking& r, uint32_t plane) {
  const uint32_t ones = r.tied & plane;
  const uint32_t rest = row_sum<kPerRow>(__popc(ones)) + r.minus_left;
  const uint32_t all =
      static_cast<uint32_t>(static_cast<int32_t>(rest) >> 31);  // all bits set if rest is negative
  r.above |= ones & all;
  r.tied = bit_select(all, r.tied ^ ones, ones);
  r.minus_left = max(r.minus_left, rest);  // a negative rest is the larger one, any other the smaller
}

// Planes 0 to kPlanes - 1 rank the elements of `valid`; `keep` is at most their number in the row. What is
// tied in the end equals the keep-th largest.
template <int kPlanes, int kPerRow, int kWords>
__device__ __forceinline__ Ranking rank_planes(const uint32_t (&planes)[kWords], uint32_t valid,
                                               uint32_t keep) {
  Ranking r = {0, valid, 0 - keep};
#pragma unroll
  for (int b = kPlanes - 1; b >= 0; --b) {
    narrow<kPerRow>(r, planes[b]);
  }
  return r;
}

// Takes the first `left` of the tied elements, by channel: the same walk over the bits of the channel number,
// which are, from the top, the chunk's number, the lane's, and the place in the chunk.
template <int kPerRow>
__device__ __forceinline__ uint32_t take_first(Ranking r, int t) {
  if (__any_sync(kFullWarp, row_sum<kPerRow>(__popc(r.tied)) + r.minus_left != 0)) {
    narrow<kPerRow>(r, 0x0000FFFFu);
    narrow<kPerRow>(r, 0x00FF00FFu);
#pragma unroll
    for (int bit = kPerRow / 2; bit > 0; bit /= 2) {
      narrow<kPerRow>(r, (t & bit) == 0 ? 0xFFFFFFFFu : 0);
    }
    narrow<kPerRow>(r, 0x0F0F0F0Fu);
    narrow<kPerRow>(r, 0x33333333u);
    narrow<kPerRow>(r, 0x55555555u);
  }
  return r.above | r.tied;
}

// By magnitude: the 16-bit patterns without their signs.
template <int kDim>
__device__ __forceinline__ Ranking rank_magnitudes(const uint32_t (&words)[Lanes<kDim>::kWords],
                                                   uint32_t keep) {
  using L = Lanes<kDim>;
  uint32_t planes[16];
#pragma unroll
  for (int m = 0; m < 8; ++m) {
    const uint32_t high = m + 8 < L::kWords ? words[m + 8 < L::kWords ? m + 8 : 0] : 0;
    planes[2 * m] = __byte_perm(words[m], high, 0x5410);
    planes[2 * m + 1] = __byte_perm(words[m], high, 0x7632);
  }
  planes_of_16_bits(planes);
  return rank_planes<15, L::kPerRow>(planes, L::kValid, keep);
}

// Orders abs(x) * weight in float32: patterns of non-negative floats order like the floats, and every NaN
// counts as one value above infinity.
__device__ __forceinline__ uint32_t rank_of_score(float score) {
  return score != score ? 0x7FFFFFFFu : __float_as_uint(score) & 0x7FFFFFFFu;
}

// By abs(x) * weight. `weights` points at the weights of the lane's first chunk.
template <typename T, int kDim>
__device__ __forceinline__ Ranking rank_weighted(const uint32_t (&words)[Lanes<kDim>::kWords],
                                                 const float* weights, uint32_t keep) {
  using L = Lanes<kDim>;
  uint32_t planes[32];
#pragma unroll
  for (int e = 0; e < 32; ++e) {
    planes[e] = 0;
    if (e < 2 * L::kWords) {
      const uint32_t pair = words[e < 2 * L::kWords ? e / 2 : 0];
      const float x = T::to_float(static_cast<uint16_t>(e % 2 == 0 ? pair : pair >> 16));
      planes[e] = rank_of_score(x * weights[(e / 8) * L::kStep + e % 8]);
    }
  }
  planes_of_32_bits(planes);
  return rank_planes<31, L::kPerRow>(planes, L::kValid, keep);
}

}  // namespace mustafar
