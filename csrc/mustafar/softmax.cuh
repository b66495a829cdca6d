// Online softmax of a warp, in base 2.
#pragma once

#include "mustafar/tile.cuh"

namespace mustafar {

constexpr float kLog2e = 1.4426950408889634f;
constexpr float kLn2 = 0.6931471805599453f;
constexpr float kLowest = -3.402823466e+38f;  // below every finite score; subtracting from it gives no NaN

// State of the query columns 2t, 2t + 1 of each score tile.
template <int kRows>
struct Softmax {
  static constexpr int kTiles = Rows<kRows>::kTiles;
  static constexpr int kTokenTiles = Rows<kRows>::kTokenTiles;

  // The reference is raised only when a score exceeds it by more than this (in base 2), so that most tiles
  // need neither a reduction across lanes nor a rescaled output. Probabilities stay at or below 2^8, which
  // f16 holds.
  static constexpr float kSlack = 8.0f;

  float reference[kTiles][2];  // equal in all lanes with the same rows
  float sum[kTiles][2];        // of this lane's tokens only

  __device__ __forceinline__ void init() {
#pragma unroll
    for (int n = 0; n < kTiles; ++n) {
      reference[n][0] = reference[n][1] = kLowest;
      sum[n][0] = sum[n][1] = 0.0f;
    }
  }

  // Turns scores (times log2(e)) into probabilities relative to the reference, rescaling `out` when that
  // changes.
  template <int D>
  __device__ __forceinline__ void update(Scores<kRows>& scores, Output<D, kRows>& out) {
    float top[kTiles][2];
    bool raise = false;
#pragma unroll
    for (int n = 0; n < kTiles; ++n) {
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        top[n][j] = fmaxf(scores[0][n][j], scores[0][n][j + 2]);
        if constexpr (kTokenTiles == 2) {
          top[n][j] = fmaxf(top[n][j], fmaxf(scores[1][n][j], scores[1][n][j + 2]));
        }
        raise |= top[n][j] > reference[n][j] + kSlack;
      }
    }
    if (__any_sync(0xffffffffu, raise)) {
      raise_reference<D>(top, out);
    }
#pragma unroll
    for (int n = 0; n < kTiles; ++n) {
#pragma unroll
      for (int m = 0; m < kTokenTiles; ++m) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          scores[m][n][i] = exp2_approx(scores[m][n][i] - reference[n][i & 1]);
          sum[n][i & 1] += scores[m][n][i];
        }
      }
    }
  }

  // As update, for value rows that are yet to be multiplied by scales, those of the lane's tokens: what
  // `scores` gets is the probabilities times the scales, relative to a reference that follows those products.
  // `weights` gets, as `sum`, the sums of what is in `scores`, in f16.
  template <int D>
  __device__ __forceinline__ void update(Scores<kRows>& scores, const float (&scale)[2 * kTokenTiles],
                                         Output<D, kRows>& out, float (&weights)[kTiles][2]) {
    // Far from 1 a scale no longer moves the reference, so that sums neither overflow nor lose other tokens.
    float moved[2 * kTokenTiles];
#pragma unroll
    for (int r = 0; r < 2 * kTokenTiles; ++r) {
      moved[r] = fminf(fmaxf(log2_approx(scale[r]), -100.0f), 60.0f);
    }
    float top[kTiles][2];
    bool raise = false;
#pragma unroll
    for (int n = 0; n < kTiles; ++n) {
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        top[n][j] = fmaxf(scores[0][n][j] + moved[0], scores[0][n][j + 2] + moved[1]);
        if constexpr (kTokenTiles == 2) {
          top[n][j] = fmaxf(top[n][j], fmaxf(scores[1][n][j] + moved[2], scores[1][n][j + 2] + moved[3]));
        }
        raise |= top[n][j] > reference[n][j] + kSlack;
      }
    }
    if (__any_sync(0xffffffffu, raise)) {
      raise_reference<D>(top, out, weights);
    }
#pragma unroll
    for (int n = 0; n < kTiles; ++n) {
#pragma unroll
      for (int m = 0; m < kTokenTiles; ++m) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const float probability = exp2_approx(scores[m][n][i] - reference[n][i & 1]);
          sum[n][i & 1] += probability;
          scores[m][n][i] = probability * scale[2 * m + i / 2];
        }
#pragma unroll
        for (int i = 0; i < 4; i += 2) {
          const uint32_t pair = f16::pack(scores[m][n][i], scores[m][n][i + 1]);
          weights[n][0] += f16::to_float(static_cast<uint16_t>(pair));
          weights[n][1] += f16::to_float(static_cast<uint16_t>(pair >> 16));
        }
      }
    }
  }

  template <int D>
  __device__ __forceinline__ void raise_reference(const float (&top)[kTiles][2], Output<D, kRows>& out,
                                                  float (*weights)[2] = nullptr) {
#pragma unroll
    for (int n = 0; n < kTiles; ++n) {
      float scale[2];
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        float highest = fmaxf(top[n][j], reference[n][j]);
#pragma unroll
        for (int lanes = Rows<kRows>::kFirstLane; lanes < 32; lanes *= 2) {
          highest = fmaxf(highest, __shfl_xor_sync(0xffffffffu, highest, lanes));
        }
        scale[j] = exp2_approx(reference[n][j] - highest);
        reference[n][j] = highest;
        sum[n][j] *= scale[j];
        if (weights != nullptr) {
          weights[n][j] *= scale[j];
        }
      }
#pragma unroll
      for (int i = 0; i < kOutProducts<D, kRows>; ++i) {
        out[i][n][0] *= scale[0];
        out[i][n][1] *= scale[1];
        out[i][n][2] *= scale[0];
        out[i][n][3] *= scale[1];
      }
    }
  }

  // From sums over a lane's tokens to sums over all of them, in every lane.
  static __device__ __forceinline__ void finish(float (&sums)[kTiles][2]) {
#pragma unroll
    for (int n = 0; n < kTiles; ++n) {
#pragma unroll
      for (int j = 0; j < 2; ++j) {
#pragma unroll
        for (int lanes = Rows<kRows>::kFirstLane; lanes < 32; lanes *= 2) {
          sums[n][j] += __shfl_xor_sync(0xffffffffu, sums[n][j], lanes);
        }
      }
    }
  }
};

}  // namespace mustafar
