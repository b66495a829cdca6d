// spmv_key and spmv_value: products of stored tokens with queries and with weights, in float32 and without a
// softmax. Attention proper is attend; these serve what needs scores.

#include "mustafar/spmv_params.h"
#include "mustafar/stored.cuh"

namespace mustafar {

// A warp reads as many rows at a time as its lanes hold.
template <int kDim>
using SpmvTile = StoredTile<kDim, Lanes<kDim>::kRows>;

// What a CTA works on. The CTAs of one head's row tiles, and of one row tile's blocks of tokens, are
// neighbours.
struct SpmvUnit {
  int64_t sequence;
  int head;
  int row0;  // first query row
  int rows;
  int block;         // of tokens
  uint32_t* errors;  // null in all but one row tile, so that nothing is counted twice

  // Offset of query row `row` of the unit.
  __device__ __forceinline__ int64_t row_offset(int row, int group, int64_t batch_stride,
                                                int64_t token_stride, int64_t head_stride) const {
    const int64_t token = (row0 + row) / group;
    const int64_t q_head = static_cast<int64_t>(head) * group + (row0 + row) % group;
    return sequence * batch_stride + token * token_stride + q_head * head_stride;
  }
};

// `blocks`: of the tokens of a head.
template <int kTileRows, typename Params>
__device__ __forceinline__ SpmvUnit spmv_unit(const Params& p, uint32_t blocks) {
  const int all_rows = p.q_len * p.group;
  const uint32_t tiles = (all_rows + kTileRows - 1) / kTileRows;
  const uint32_t tile = blockIdx.x / blocks % tiles;
  const uint32_t of_all = blockIdx.x / blocks / tiles;  // sequence * heads + head
  SpmvUnit unit;
  unit.sequence = of_all / static_cast<uint32_t>(p.heads);
  unit.head = of_all % static_cast<uint32_t>(p.heads);
  unit.row0 = tile * kTileRows;
  unit.rows = min(all_rows - unit.row0, kTileRows);
  unit.block = blockIdx.x % blocks;
  unit.errors = tile == 0 ? p.errors : nullptr;
  return unit;
}

// Reads the tile of tokens at `token` and calls `use(row, present, values)` in each lane: its row, counted
// from `token`, whether that lies below the length, and its chunks of the row, zeros if not. Called by the
// whole warp.
template <typename T, int kDim, typename Params, typename Use>
__device__ __forceinline__ void read_tile(const Params& p, const SpmvUnit& unit, int token, int len,
                                          uint16_t* stage, int lane, Use use) {
  using L = Lanes<kDim>;
  const int page_tokens = p.sequences.page_tokens;
  const int row0 = token % page_tokens;
  const uint8_t* page = stored_page(p, unit.sequence, unit.head, token);
  if (page == nullptr) {
    if (lane == 0 && row0 == 0) {
      count_error(unit.errors);
    }
    return;
  }
  const int rows = min(len - token, L::kRows);
  const int row = lane / L::kPerRow;
  __syncwarp();  // everyone has read what was staged before
  const SpmvTile<kDim> tile(p.pool, page, page_tokens, p.capacity, row0, rows, stage, lane);
  uint32_t words[L::kWords];
  const bool right = tile.expand(row, lane % L::kPerRow, words);
  if (!right && lane % L::kPerRow == 0) {
    count_error(unit.errors);
  }
  const float code = code_unit(p.pool.value_type);
  const float scale = tile.scale(row, right);
  float values[2 * L::kWords];
#pragma unroll
  for (int m = 0; m < L::kWords; ++m) {
    values[2 * m] = scale * (code * T::to_float(static_cast<uint16_t>(words[m])));
    values[2 * m + 1] = scale * (code * T::to_float(static_cast<uint16_t>(words[m] >> 16)));
  }
  use(row, row < rows, values);
}

template <int kDim>
struct SpmvKeyShared {
  __align__(16) float q[kKeyRows][kDim];
  float bias[kKeyRows];  // q . c
  float* scores[kKeyRows];
  __align__(16) uint16_t stage[kKeyWarps][SpmvTile<kDim>::kStage];
};

template <typename T, int kDim>
__device__ __forceinline__ void spmv_key(const SpmvKeyParams& p, SpmvKeyShared<kDim>& shared) {
  using L = Lanes<kDim>;
  const int lane = threadIdx.x % 32;
  const int warp = threadIdx.x / 32;
  const int t = lane % L::kPerRow;
  const SpmvUnit unit = spmv_unit<kKeyRows>(p, (p.max_len + kKeyTokens - 1) / kKeyTokens);
  const int len = stored_length(p, unit.sequence, unit.head);
  if (len < 0 && unit.block == 0 && threadIdx.x == 0) {
    count_error(unit.errors);
  }
  const int begin = unit.block * kKeyTokens;
  if (len <= begin) {
    return;
  }

  const float* center = p.center;
  if (center != nullptr) {
    center += ((p.center_batch > 1 ? unit.sequence : 0) * p.heads + unit.head) * kDim;
  }
  for (int row = warp; row < unit.rows; row += kKeyWarps) {
    const int64_t at = unit.row_offset(row, p.group, p.q_batch_stride, p.q_token_stride, p.q_head_stride);
    float bias = 0.0f;
    for (int channel = lane; channel < kDim; channel += 32) {
      const float q = load_as_float(p.q, at + channel, p.q_dtype);
      shared.q[row][channel] = q;
      bias += center != nullptr ? q * center[channel] : 0.0f;
    }
    bias = row_sum<32>(bias);
    if (lane == 0) {
      shared.bias[row] = bias;
      shared.scores[row] = p.scores + unit.row_offset(row, p.group, p.scores_batch_stride,
                                                      p.scores_token_stride, p.scores_head_stride);
    }
  }
  __syncthreads();

  const int end = min(len, begin + kKeyTokens);
#pragma unroll 1
  for (int token = begin + warp * L::kRows; token < end; token += kKeyWarps * L::kRows) {
    read_tile<T, kDim>(p, unit, token, end, shared.stage[warp], lane,
                       [&](int row, bool present, const float (&values)[2 * L::kWords]) {
#pragma unroll 1
                         for (int r = 0; r < unit.rows; ++r) {
                           float sum = 0.0f;
#pragma unroll
                           for (int m = 0; m < L::kWords / 2; ++m) {
                             const float4 q = *reinterpret_cast<const float4*>(
                                 &shared.q[r][(m / 2) * L::kStep + 8 * t + m % 2 * 4]);
                             sum += q.x * values[4 * m] + q.y * values[4 * m + 1];
                             sum += q.z * values[4 * m + 2] + q.w * values[4 * m + 3];
                           }
                           sum = row_sum<L::kPerRow>(sum);
                           if (t == 0 && present) {
                             shared.scores[r][token + row] = p.scale * (sum + shared.bias[r]);
                           }
                         }
                       });
  }
}

template <int kDim>
struct SpmvValueShared {
  __align__(16) uint16_t stage[kValueWarps][SpmvTile<kDim>::kStage];
  float sums[kValueRows][kDim];
};

// Adds up the first kCount values of lanes that are a multiple of kFirst apart, from 16 on down, in pairs:
// each lane of a pair goes on with half of the values. Returns the number of the value that values[0] is in
// the end.
template <int kCount, int kLanes, int kFirst>
__device__ __forceinline__ int add_lanes(float* values, int lane) {
  if constexpr (kLanes < kFirst) {
    return 0;
  } else {
    constexpr int kHalf = kCount / 2;
    const bool upper = lane & kLanes;
#pragma unroll
    for (int i = 0; i < kHalf; ++i) {
      const float given = upper ? values[i] : values[i + kHalf];
      const float kept = upper ? values[i + kHalf] : values[i];
      values[i] = kept + __shfl_xor_sync(kFullWarp, given, kLanes);
    }
    return (upper ? kHalf : 0) + add_lanes<kHalf, kLanes / 2, kFirst>(values, lane);
  }
}

template <typename T, int kDim>
__device__ __forceinline__ void spmv_value(const SpmvValueParams& p, SpmvValueShared<kDim>& shared) {
  using L = Lanes<kDim>;
  const int lane = threadIdx.x % 32;
  const int warp = threadIdx.x / 32;
  const int t = lane % L::kPerRow;
  const SpmvUnit unit = spmv_unit<kValueRows>(p, 1);
  const int len = stored_length(p, unit.sequence, unit.head);
  if (len < 0 && threadIdx.x == 0) {
    count_error(unit.errors);
  }
  const float* weights[kValueRows];
#pragma unroll
  for (int r = 0; r < kValueRows; ++r) {
    // A row that does not exist repeats the last one and is not stored.
    weights[r] = p.weights + unit.row_offset(min(r, unit.rows - 1), p.group, p.weights_batch_stride,
                                             p.weights_token_stride, p.weights_head_stride);
  }
  constexpr int kValues = 2 * L::kWords;  // of a row, in a lane
  constexpr int kSums = kValueRows * kValues;
  float sums[kSums] = {};
#pragma unroll 1
  for (int token = warp * L::kRows; token < len; token += kValueWarps * L::kRows) {
    read_tile<T, kDim>(p, unit, token, len, shared.stage[warp], lane,
                       [&](int row, bool present, const float (&values)[kValues]) {
#pragma unroll
                         for (int r = 0; r < kValueRows; ++r) {
                           const float weight = present ? weights[r][token + row] : 0.0f;
#pragma unroll
                           for (int m = 0; m < kValues; ++m) {
                             sums[r * kValues + m] += weight * values[m];
                           }
                         }
                       });
  }

  // Lanes of equal t hold sums of the same channels.
  const int first = add_lanes<kSums, 16, L::kPerRow>(sums, lane);
  // Then the warps add up, one after the other.
#pragma unroll 1
  for (int turn = 0; turn < kValueWarps; ++turn) {
    if (warp == turn) {
#pragma unroll
      for (int i = 0; i < kSums / L::kRows; ++i) {
        const int m = (first + i) % kValues;
        float& sum = shared.sums[(first + i) / kValues][m / 8 * L::kStep + 8 * t + m % 8];
        sum = turn == 0 ? sums[i] : sum + sums[i];
      }
    }
    __syncthreads();
  }
  for (int i = threadIdx.x; i < unit.rows * kDim; i += 32 * kValueWarps) {
    const int row = i / kDim;
    const int64_t at =
        unit.row_offset(row, p.group, p.out_batch_stride, p.out_token_stride, p.out_head_stride);
    store_from_float(p.out, at + i % kDim, p.out_dtype, shared.sums[row][i % kDim]);
  }
}

}  // namespace mustafar

#define MST_VARIANT(dtype, dim)                                                                   \
  extern "C" __global__ void __launch_bounds__(32 * mustafar::kKeyWarps)                          \
      mst_spmv_key_##dtype##_d##dim(const __grid_constant__ mustafar::SpmvKeyParams params) {     \
    __shared__ mustafar::SpmvKeyShared<dim> shared;                                               \
    mustafar::spmv_key<mustafar::dtype, dim>(params, shared);                                     \
  }                                                                                               \
  extern "C" __global__ void __launch_bounds__(32 * mustafar::kValueWarps)                        \
      mst_spmv_value_##dtype##_d##dim(const __grid_constant__ mustafar::SpmvValueParams params) { \
    __shared__ mustafar::SpmvValueShared<dim> shared;                                             \
    mustafar::spmv_value<mustafar::dtype, dim>(params, shared);                                   \
  }
#include "variants.inc"
#undef MST_VARIANT
