// Scores of the strategies that look beyond magnitudes, to the bit as on the CPU: query_weights,
// channel_scores and choose_channels (structured_weights), token_weights.
//
// The order of sums is that of src/cpu/lanes.rs: row r goes to lane r % 32, then the lanes are halved.
#include "mustafar/dtype.cuh"
#include "mustafar/rounded.cuh"
#include "mustafar/score_params.h"

namespace mustafar {
namespace {

// What could be anything is kept.
__device__ __forceinline__ float defined(float x) { return x != x ? INFINITY : x; }

// ---- Sums over rows: half a warp is a lane of the sum, its threads are channels ----

struct Column {
  int lane;
  int head;
  int channel;

  __device__ __forceinline__ Column()
      : lane(threadIdx.x / kScoreChannels),
        head(blockIdx.y),
        channel(blockIdx.x * kScoreChannels + threadIdx.x % kScoreChannels) {}
};

// The sum of all lanes, for the threads of lane 0; the others get 0. Call with the whole CTA.
__device__ __forceinline__ double halve_lanes(double sum) {
  __shared__ double sums[kScoreLanes][kScoreChannels];
  const int lane = threadIdx.x / kScoreChannels;
  const int channel = threadIdx.x % kScoreChannels;
  sums[lane][channel] = sum;
#pragma unroll
  for (int half = kScoreLanes / 2; half > 0; half /= 2) {
    __syncthreads();
    if (lane < half) {
      sums[lane][channel] += sums[lane + half][channel];
    }
  }
  const double total = lane == 0 ? sums[0][channel] : 0.0;
  __syncthreads();  // the array may be used again
  return total;
}

// Sums `f` of the queries of a KV head.
template <typename F>
__device__ __forceinline__ double sum_queries(const QueriesParams& queries, const Column& column, F f) {
  double sum = 0.0;
  const int rows = queries.tokens * queries.group;
#pragma unroll 4
  for (int row = column.lane; row < rows; row += kScoreLanes) {
    const int64_t head = column.head * queries.group + row % queries.group;
    const int64_t at = row / queries.group * queries.token_stride + head * queries.head_stride;
    sum += f(static_cast<double>(load_as_float(queries.q, at + column.channel, queries.dtype)));
  }
  return halve_lanes(sum);
}

// In double the square of a float is exact: whether it is fused with the addition makes no difference.
__device__ __forceinline__ double square(double x) { return x * x; }

__device__ __forceinline__ float to_float(uint16_t bits, int32_t dtype) {
  return dtype == kF16 ? f16::to_float(bits) : bf16::to_float(bits);
}

// round16(x - c).
__device__ __forceinline__ float subtract_center(float x, float center, int32_t dtype) {
  const float shifted = x - center;
  const uint32_t bits = dtype == kF16 ? f16::pack(shifted, 0.0f) : bf16::pack(shifted, 0.0f);
  return to_float(static_cast<uint16_t>(bits), dtype);
}

// Tokens of a thread that are asked for before the first is waited for.
constexpr int kAhead = 16;

__device__ __forceinline__ double sum_tokens(const ChannelScoresParams& p, const Column& column) {
  const float center = p.center == nullptr ? 0.0f : p.center[column.head * p.dim + column.channel];
  double sum = 0.0;
  int first = column.lane;  // token of the part
#pragma unroll 1
  for (int i = 0; i < 2; ++i) {
    const ScoredPart& part = p.part[i];
    const uint16_t* x = part.x + column.head * part.head_stride + column.channel;
#pragma unroll 1
    for (int64_t token = first; token < part.tokens; token += kScoreLanes * kAhead) {
      uint16_t bits[kAhead];
#pragma unroll
      for (int k = 0; k < kAhead; ++k) {
        const int64_t at = token + kScoreLanes * k;
        bits[k] = at < part.tokens ? x[at * part.token_stride] : static_cast<uint16_t>(0);
      }
#pragma unroll
      for (int k = 0; k < kAhead; ++k) {
        float value = to_float(bits[k], p.dtype);
        if (p.center != nullptr) {
          value = subtract_center(value, center, p.dtype);
        }
        if (token + kScoreLanes * k < part.tokens) {
          sum += square(static_cast<double>(value));
        }
      }
    }
    // Rows go on counting from part to part.
    first = (column.lane - part.tokens) & (kScoreLanes - 1);
  }
  return halve_lanes(sum);
}

}  // namespace
}  // namespace mustafar

extern "C" __global__ void __launch_bounds__(mustafar::kScoreChannels* mustafar::kScoreLanes)
    mst_query_weights(const __grid_constant__ mustafar::QueryWeightsParams p) {
  using namespace mustafar;
  const Column column;
  const double sum = sum_queries(p.queries, column, [](double q) { return fabs(q); });
  if (column.lane == 0) {
    p.out[column.head * p.dim + column.channel] = defined(static_cast<float>(sum / p.queries.tokens));
  }
}

extern "C" __global__ void __launch_bounds__(mustafar::kScoreChannels* mustafar::kScoreLanes)
    mst_channel_scores(const __grid_constant__ mustafar::ChannelScoresParams p) {
  using namespace mustafar;
  const Column column;
  double score = sum_tokens(p, column);
  if (p.queries.tokens > 0) {
    score *= sum_queries(p.queries, column, square);
  }
  if (column.lane == 0) {
    p.out[column.head * p.dim + column.channel] = defined(static_cast<float>(score));
  }
}

// A channel is kept if fewer than `keep` others come before it: those of a larger score, and the lower ones
// of the same.
extern "C" __global__ void mst_choose_channels(const __grid_constant__ mustafar::ChannelScoresParams p) {
  __shared__ float scores[256];
  const int channel = threadIdx.x;
  float* const out = p.out + static_cast<int64_t>(blockIdx.x) * p.dim;
  const float mine = out[channel];
  scores[channel] = mine;
  __syncthreads();
  int before = 0;
  for (int other = 0; other < p.dim; ++other) {
    before += scores[other] > mine || (scores[other] == mine && other < channel) ? 1 : 0;
  }
  out[channel] = before < p.keep ? INFINITY : 0.0f;
}

namespace mustafar {
namespace {

// ---- Attention weights: 64 keys of a KV head times its queries ----
//
// Rows of queries come in chunks of 32; a team of 128 threads takes every fourth chunk (or fewer teams take
// more). Each thread has 4 keys times 4 rows, and channels pass through shared memory 32 at a time.

constexpr int kRows = kScoreLanes;
constexpr int kTokens = kWeighedTokens;
constexpr int kSlice = 32;              // channels in shared memory
constexpr int kTile = 4;                // keys, and rows, of a thread
constexpr int kKeyPitch = kTokens + 4;  // floats of a channel: whole vectors, fewer bank conflicts
constexpr int kRowPitch = kRows + 4;

// What is to know of the rows of a chunk.
struct Chunk {
  int64_t q[kRows];  // element of the first channel
  float lse[kRows];
  int position[kRows];  // a row that is not there sees nothing
};

__device__ __forceinline__ float weight_of(const TokenWeightsParams& p, float dot, float lse) {
  float score = __fmul_rn(dot, p.scale);
  if (p.softcap != 0.0f) {
    score = __fmul_rn(p.softcap, rounded_tanh(__fdiv_rn(score, p.softcap)));
  }
  const float exponent = __fadd_rn(score, -lse);
  return exponent > 88.0f ? INFINITY : rounded_exp(exponent);
}

// By one warp.
__device__ __forceinline__ void find_rows(const TokenWeightsParams& p, int first, int lane, Chunk& chunk) {
  const QueriesParams& queries = p.queries;
  const int row = first + lane;
  const bool present = row < queries.tokens * queries.group;
  const int64_t token = present ? row / queries.group : 0;
  const int64_t head = static_cast<int64_t>(blockIdx.y) * queries.group + (present ? row % queries.group : 0);
  chunk.q[lane] = token * queries.token_stride + head * queries.head_stride;
  chunk.lse[lane] = p.lse[token * p.lse_token_stride + head * p.lse_head_stride];
  chunk.position[lane] = present ? p.q_position - (queries.tokens - 1 - static_cast<int>(token)) : -1;
}

// kCount rows of 32 channels from `base` on, as floats: row i starts at element `at(i)` and goes to
// to[...][i]. All are asked for before the first is waited for. Each warp takes rows `first`, `first` +
// `step`, ...
template <int kCount, int kPitch, typename At>
__device__ __forceinline__ void load_slice(const void* base, int32_t dtype, int first, int step, At at,
                                           float (*to)[kPitch]) {
  const int lane = threadIdx.x % 32;
  float values[kCount];
  if (dtype == kF32) {
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      values[i] = static_cast<const float*>(base)[at(first + i * step) + lane];
    }
  } else {
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      values[i] = to_float(static_cast<const uint16_t*>(base)[at(first + i * step) + lane], dtype);
    }
  }
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
    to[lane][first + i * step] = values[i];
  }
}

__device__ __forceinline__ void multiply(const float (*keys)[kKeyPitch], const float (*rows)[kRowPitch],
                                         float (&dots)[kTile][kTile]) {
#pragma unroll 8
  for (int c = 0; c < kSlice; ++c) {
    const float4 k = *reinterpret_cast<const float4*>(keys[c]);
    const float4 q = *reinterpret_cast<const float4*>(rows[c]);
    const float key[kTile] = {k.x, k.y, k.z, k.w};
    const float row[kTile] = {q.x, q.y, q.z, q.w};
#pragma unroll
    for (int i = 0; i < kTile; ++i) {
#pragma unroll
      for (int j = 0; j < kTile; ++j) {
        dots[i][j] = multiply_add(row[j], key[i], dots[i][j]);
      }
    }
  }
}

}  // namespace
}  // namespace mustafar

extern "C" __global__ void __launch_bounds__(mustafar::kWeighTeams* mustafar::kWeighThreads, 2)
    mst_token_weights(const __grid_constant__ mustafar::TokenWeightsParams p) {
  using namespace mustafar;
  __shared__ __align__(16) float keys[kSlice][kKeyPitch];
  __shared__ __align__(16) float queries[kWeighTeams][kSlice][kRowPitch];
  __shared__ float sums[kRows][kKeyPitch];
  __shared__ Chunk chunks[kWeighTeams];
  const int teams = blockDim.x / kWeighThreads;
  const int team = threadIdx.x / kWeighThreads;
  const int warp = threadIdx.x / 32;
  const int in_team = threadIdx.x % kWeighThreads;
  const int my_key = in_team % (kTokens / kTile) * kTile;
  const int my_row = in_team / (kTokens / kTile) * kTile;
  const int first = blockIdx.x * kTokens;
  const int rows = p.queries.tokens * p.queries.group;
  for (int i = threadIdx.x; i < kRows * kTokens; i += blockDim.x) {
    sums[i / kTokens][i % kTokens] = 0.0f;
  }
  // Tokens past the last are the last: what they get is not written.
  const auto key_at = [&](int i) {
    const int64_t token = min(static_cast<int64_t>(first) + i, static_cast<int64_t>(p.tokens) - 1);
    return token * p.k_token_stride + blockIdx.y * p.k_head_stride;
  };

#pragma unroll 1
  for (int round = 0; round < rows; round += teams * kRows) {
    Chunk& chunk = chunks[team];
    __syncthreads();  // the last round's is no longer needed
    if (in_team < 32) {
      find_rows(p, round + team * kRows, in_team, chunk);
    }
    float dots[kTile][kTile] = {};
#pragma unroll 1
    for (int slice = 0; slice < p.dim; slice += kSlice) {
      __syncthreads();
      constexpr int kWarps = kWeighThreads / 32;
      // Each warp of each team has its share of the keys, and of the team's queries.
#pragma unroll 1
      for (int i = warp; i < kTokens; i += 4 * kWarps * teams) {
        load_slice<4, kKeyPitch>(
            p.k, p.k_dtype, i, kWarps * teams, [&](int token) { return key_at(token) + slice; }, keys);
      }
      load_slice<kRows / kWarps, kRowPitch>(
          p.queries.q, p.queries.dtype, warp % kWarps, kWarps, [&](int row) { return chunk.q[row] + slice; },
          queries[team]);
      __syncthreads();
      const float (*my_keys)[kKeyPitch] = reinterpret_cast<const float (*)[kKeyPitch]>(&keys[0][my_key]);
      multiply(my_keys, reinterpret_cast<const float (*)[kRowPitch]>(&queries[team][0][my_row]), dots);
    }
    // Chunks are added in order.
#pragma unroll 1
    for (int turn = 0; turn < teams; ++turn) {
      __syncthreads();
      if (turn != team) {
        continue;
      }
#pragma unroll
      for (int j = 0; j < kTile; ++j) {
        const int own = chunk.position[my_row + j];
        const float lse = chunk.lse[my_row + j];
#pragma unroll
        for (int i = 0; i < kTile; ++i) {
          const int64_t key = static_cast<int64_t>(p.k_position) + first + my_key + i;
          if (key <= own && own - key < p.sliding_window) {
            float& sum = sums[my_row + j][my_key + i];
            sum = __fadd_rn(sum, weight_of(p, dots[i][j], lse));
          }
        }
      }
    }
  }

  __syncthreads();
  const int64_t token = static_cast<int64_t>(first) + threadIdx.x;
  if (threadIdx.x < kTokens && token < p.tokens) {
    float lanes[kRows];
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
      lanes[i] = sums[i][threadIdx.x];
    }
#pragma unroll
    for (int half = kRows / 2; half > 0; half /= 2) {
#pragma unroll
      for (int i = 0; i < kRows / 2; ++i) {
        if (i < half) {
          lanes[i] = __fadd_rn(lanes[i], lanes[i + half]);
        }
      }
    }
    p.out[token * p.kv_heads + blockIdx.y] = defined(lanes[0]);
  }
}
