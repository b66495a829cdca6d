// Attention of a warp over one tile of 32 tokens: scores = K q, then out += V^T p.
//
// Keys are the A operand (tokens x channels) and queries B (channels x query rows). Values are A as well. For
// eight rows and more that is V^T, channels x tokens, so a register holds one channel of two tokens. Four
// rows would leave half of the columns of that product free. For them a register holds two channels of ONE
// token, so the reduction index is (token, parity of the channel), and B holds the probability at one parity
// and zero at the other: half the products, and outputs that fill the columns.
#pragma once

#include "mustafar/mma.cuh"

namespace mustafar {

// How kRows query rows (4, 8 or 16) lie in the columns of the products.
template <int kRows>
struct Rows {
  static constexpr int kTiles = kRows == 16 ? 2 : 1;  // column tiles of the scores
  // Two lanes have the scores of the same four rows, so each keeps those of half of the tokens. Lanes with
  // the same rows differ in bit kFirstLane and above.
  static constexpr int kTokenTiles = kRows == 4 ? 1 : 2;
  static constexpr int kFirstLane = kRows == 4 ? 2 : 4;

  // Position in the tile of the token whose score is number i of token tile m. Pages say which row that is.
  static __device__ __forceinline__ int token(int m, int i, int g, int t) {
    return 16 * (kRows == 4 ? t >> 1 : m) + g + 4 * (i & 2);
  }

  // Query row of column `column` (0 to 7) of score tile `tile`; four rows fill the eight columns twice.
  static __device__ __forceinline__ int of_score(int tile, int column) {
    return kRows == 4 ? column & 3 : 8 * tile + column;
  }
};

// Queries as B operand: register 2 j + i of word k of the row is register i for nibble j of the lane's byte.
template <int D, int kRows>
using Queries = uint32_t[Rows<kRows>::kTiles][D / 32][4];

// scores[m][n][i]: of the query in column 8 n + 2t + i % 2 and Rows::token(m, i, g, t).
template <int kRows>
using Scores = float[Rows<kRows>::kTokenTiles][Rows<kRows>::kTiles][4];

// products[m][n]: accumulators of tokens 16 m + (g, g + 8) and query columns 8 n + (2t, 2t + 1).
template <int kRows>
using Products = float[2][Rows<kRows>::kTiles][4];

// The scores that lane t of a quad keeps.
template <int kRows>
__device__ __forceinline__ void share_out(const Products<kRows>& products, Scores<kRows>& scores, int t) {
#pragma unroll
  for (int n = 0; n < Rows<kRows>::kTiles; ++n) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if constexpr (kRows == 4) {
        scores[0][n][i] = t < 2 ? products[0][n][i] : products[1][n][i];
      } else {
        scores[0][n][i] = products[0][n][i];
        scores[1][n][i] = products[1][n][i];
      }
    }
  }
}

template <int D, int kRows>
constexpr int kOutProducts = D / (kRows == 4 ? 32 : 16);

// out[i][n]: accumulators of column tile n. Of four rows: of pairs i (rows g) and i + D/32 (rows g + 8) of
// lane g, one parity in columns 0 to 3 and the other in 4 to 7; of more rows: of the even (rows g) and the
// odd (rows g + 8) channel of pair i. See PairChannels.
template <int D, int kRows>
using Output = float[kOutProducts<D, kRows>][Rows<kRows>::kTiles][4];

// Channel of half `parity` of pair `pair` (0 to D/16 - 1) of lane g.
template <int D>
struct PairChannels {
  static __device__ __forceinline__ int of(int pair, int g, int parity) {
    return 32 * (pair / 2) + 4 * g + 2 * (pair % 2) + parity;
  }
};

// `start` is what the sums of the lane's query columns start from. `keys.row(position, odd)` is the row at a
// position; `odd` says whether that is in an odd group of eight.
template <typename T, int D, int kRows, typename Keys>
__device__ __forceinline__ void score_tile(const Keys& keys, const Queries<D, kRows>& q,
                                           const float (&start)[Rows<kRows>::kTiles][2],
                                           Scores<kRows>& scores, int g, int t) {
  Products<kRows> products;
#pragma unroll
  for (int m = 0; m < 2; ++m) {
#pragma unroll
    for (int n = 0; n < Rows<kRows>::kTiles; ++n) {
      products[m][n][0] = products[m][n][2] = start[n][0];
      products[m][n][1] = products[m][n][3] = start[n][1];
    }
    auto upper = keys.row(16 * m + g, false);
    auto lower = keys.row(16 * m + g + 8, true);
#pragma unroll
    for (int k = 0; k < D / 32; ++k) {
      uint32_t a[4], b[4];
      upper.template next<T>(k, a);
      lower.template next<T>(k, b);
#pragma unroll
      for (int n = 0; n < Rows<kRows>::kTiles; ++n) {
        mma_16x8x16<T>(products[m][n], a[0], b[0], a[1], b[1], q[n][k][0], q[n][k][1]);
        mma_16x8x16<T>(products[m][n], a[2], b[2], a[3], b[3], q[n][k][2], q[n][k][3]);
      }
    }
  }
  share_out<kRows>(products, scores, t);
}

// Probabilities of tokens 8 step to 8 step + 7 as B operand, of columns (row, parity).
template <typename T>
__device__ __forceinline__ void parity_operand(const Scores<4>& scores, int step, int g, uint32_t (&b)[2]) {
  const float* p = &scores[0][0][2 * (step % 2)];
  uint32_t both = transpose_8x8(T::pack(p[0], p[1]));  // tokens 2t (low), 2t + 1 of column g
  // Rows of the first 16 tokens are in the lower lanes, those of the others in the upper ones.
  const int lane = threadIdx.x % 32;
  both = __shfl_sync(0xffffffffu, both, step < 2 ? lane & 15 : lane | 16);
  b[0] = permute_bytes(both, 0, g < 4 ? 0x4410 : 0x1044);
  b[1] = permute_bytes(both, 0, g < 4 ? 0x4432 : 0x3244);
}

// `scores` holds probabilities. `values.row(first, at)` is the row at position first + at, of which `at` is
// known to the compiler.
template <typename T, int D, int kRows, typename Values>
__device__ __forceinline__ void accumulate_tile(const Values& values, const Scores<kRows>& scores,
                                                Output<D, kRows>& out, int g, int t) {
  if constexpr (kRows == 4) {
    constexpr int kHalf = D / 32;
#pragma unroll
    for (int step = 0; step < 4; ++step) {  // 8 tokens each; the lane's are 2t and 2t + 1
      uint32_t first[D / 16], second[D / 16];
      auto first_row = values.row(2 * t, 8 * step);
      auto second_row = values.row(2 * t, 8 * step + 1);
      first_row.template load<T>(first);
      second_row.template load<T>(second);
      uint32_t b[2];
      parity_operand<T>(scores, step, g, b);
#pragma unroll
      for (int i = 0; i < kHalf; ++i) {
        mma_16x8x16<T>(out[i][0], first[i], first[i + kHalf], second[i], second[i + kHalf], b[0], b[1]);
      }
    }
  } else {
#pragma unroll
    for (int step = 0; step < 2; ++step) {  // 16 tokens each; the lane's are 2t, 2t + 1, 2t + 8, 2t + 9
      uint32_t b[Rows<kRows>::kTiles][2];
#pragma unroll
      for (int n = 0; n < Rows<kRows>::kTiles; ++n) {
        b[n][0] = transpose_8x8(T::pack(scores[step][n][0], scores[step][n][1]));
        b[n][1] = transpose_8x8(T::pack(scores[step][n][2], scores[step][n][3]));
      }
      auto near_rows = values.two_rows(2 * t, 16 * step);
      auto far_rows = values.two_rows(2 * t, 16 * step + 8);
#pragma unroll
      for (int k = 0; k < D / 32; ++k) {
        uint32_t x[4], y[4];
        near_rows.template next<T>(k, x);
        far_rows.template next<T>(k, y);
#pragma unroll
        for (int n = 0; n < Rows<kRows>::kTiles; ++n) {
          mma_16x8x16<T>(out[2 * k][n], x[0], x[1], y[0], y[1], b[n][0], b[n][1]);
          mma_16x8x16<T>(out[2 * k + 1][n], x[2], x[3], y[2], y[3], b[n][0], b[n][1]);
        }
      }
    }
  }
}

}  // namespace mustafar
