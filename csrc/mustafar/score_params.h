// Parameter structs of the kernels of score.cu. The rules of params.h hold; the launching side mirrors these
// field by field.
#pragma once

#include "mustafar/params.h"

namespace mustafar {

// Queries of one sequence, [token, query head, dim]; those of KV head h are the query heads h * group and on.
struct QueriesParams {
  const void* q;
  int64_t token_stride;
  int64_t head_stride;
  int32_t tokens;  // 0: there are none
  int32_t group;   // query heads per KV head
  int32_t dtype;   // Dtype
  int32_t reserved;
};

// query_weights. Grid (dim / kScoreChannels, kv_heads); block kScoreChannels * kScoreLanes threads.
struct QueryWeightsParams {
  QueriesParams queries;
  float* out;  // [kv_heads, dim]
  int32_t dim;
  int32_t reserved;
};

// Some of the tokens that are judged: f16 or bf16 [token, kv_head, dim].
struct ScoredPart {
  const uint16_t* x;
  int64_t token_stride;
  int64_t head_stride;
  int32_t tokens;
  int32_t reserved;
};

// channel_scores: the sum of squares of each channel over the tokens of both parts, times that over the
// queries if there are any. Grid and block as query_weights. choose_channels turns what it has written into
// weights in place: grid kv_heads, block dim threads.
struct ChannelScoresParams {
  ScoredPart part[2];
  QueriesParams queries;
  const float* center;  // [kv_heads, dim], subtracted from x first; null: none
  float* out;           // [kv_heads, dim]
  int32_t dim;
  int32_t dtype;  // of x: kF16 or kBf16
  int32_t keep;   // channels of a KV head, 1 to dim
  int32_t reserved;
};

// token_weights. Grid (ceil(tokens / kWeighedTokens), kv_heads); block 1, 2 or kWeighTeams times
// kWeighThreads threads: more than the queries of a KV head fill, 32 each, have nothing to do.
struct TokenWeightsParams {
  QueriesParams queries;
  const float* lse;  // [token, query head]
  const void* k;     // [token, kv_head, dim]
  float* out;        // [tokens, kv_heads]
  int64_t lse_token_stride;
  int64_t lse_head_stride;
  int64_t k_token_stride;
  int64_t k_head_stride;
  int32_t q_position;  // of the newest query
  int32_t k_position;  // of the first key
  int32_t tokens;
  int32_t kv_heads;
  int32_t dim;
  int32_t k_dtype;  // Dtype
  int32_t sliding_window;
  float scale;
  float softcap;  // 0: off
  int32_t reserved;
};

constexpr int kScoreChannels = 16;  // a sector of 16-bit elements
constexpr int kScoreLanes = 32;     // LANES of src/cpu/lanes.rs
constexpr int kWeighedTokens = 64;
constexpr int kWeighThreads = 128;
constexpr int kWeighTeams = 4;

static_assert(sizeof(QueriesParams) == 3 * 8 + 4 * 4, "QueriesParams has padding");
static_assert(sizeof(QueryWeightsParams) == 40 + 8 + 2 * 4, "QueryWeightsParams has padding");
static_assert(sizeof(ScoredPart) == 3 * 8 + 2 * 4, "ScoredPart has padding");
static_assert(sizeof(ChannelScoresParams) == 2 * 32 + 40 + 2 * 8 + 4 * 4, "ChannelScoresParams has padding");
static_assert(sizeof(TokenWeightsParams) == 40 + 7 * 8 + 10 * 4, "TokenWeightsParams has padding");

}  // namespace mustafar
