// Parameter structs of the kernels that compute attention: attend, combine, merge. The rules of params.h
// hold; the launching side mirrors these field by field.
#pragma once

#include "mustafar/params.h"

namespace mustafar {

// The pages of one side (K or V) of a pool.
struct AttendPool {
  const uint8_t* pages;  // page p of head h starts at pages + p * page_stride_bytes + h * head_stride_bytes
  int64_t page_stride_bytes;    // multiple of 16
  int64_t head_stride_bytes;    // multiple of 16
  int32_t row_bytes;            // values of a row; 0 for ragged pages
  int32_t values_offset_bytes;  // where the values of a page start
  // Not read by the ragged kernels. Rows whose length is a power of two would start in the same few banks of
  // shared memory; there they lie 16 bytes further apart.
  int32_t shared_row_bytes;  // row_bytes, + 16 if that is 32, 64, 128, 256 or 512
  int32_t row_shift;         // log2(row_bytes / 16) where rows are moved apart, 31 elsewhere
  int32_t capacity;          // values of a page; of uniform ones page_tokens * keep
  // Read by the ragged kernels only: what the values that a tile has in one page can take in shared memory,
  // wherever in 16 bytes they start: (n - 1) * b + 16 rounded up to 16, where b are the bytes of a value and
  // with r = min(page_tokens, 32) n is r * keep for uniform pages and min(r * dim, capacity) for ragged ones.
  int32_t run_bytes;
};

// Dense tokens: sinks or window. K and V are [row, token, kv_head, dim], the last dimension contiguous.
struct DenseParams {
  const void* k;
  const void* v;
  const int32_t* lens;  // [batch]; null: there are no such tokens
  const int32_t* rows;  // [batch] row of each sequence; null: row b
  int64_t k_row_stride;
  int64_t k_token_stride;
  int64_t k_head_stride;
  int64_t v_row_stride;
  int64_t v_token_stride;
  int64_t v_head_stride;
  int32_t k_dtype;  // Dtype
  int32_t v_dtype;
};

// attend_f16.cu and attend_bf16.cu, mst_attend_<dtype>_d<dim>_r<kRows>. Grid (kv_heads * row_tiles, batch,
// items), block 128 threads, and shared memory of the larger of
//   4 * (8 * dim + 32 * (k.shared_row_bytes + v.shared_row_bytes)) + 2 * dim + 16 and
//   16 * kRows * (dim + 2) bytes;
// the 2 * dim + 16 are what a damaged bitmap can make a lane read past its slot.
//
// attend_ragged_f16.cu and attend_ragged_bf16.cu, mst_attend_ragged_<dtype>_d<dim>_r<kRows>: K or V or both
// are ragged pages. The same but for the first number of bytes, which is
//   4 * (8 * dim + 1536 + parts * (k.run_bytes + v.run_bytes)) + 2 * dim + 16
// with parts = 2 for pages of 16 tokens and 1 for others.
//
// attend_e4m3.cu and attend_int8.cu, mst_attend_<values>_d<dim>_r<kRows>: uniform pages with 8-bit values.
// The first number of bytes is
//   4 * (8 * dim + 128 + 32 * (k.shared_row_bytes + v.shared_row_bytes)) + 2 * dim + 16.
//
// attend_ragged_e4m3.cu and attend_ragged_int8.cu, mst_attend_ragged_<values>_d<dim>_r<kRows>: the same where
// K or V or both are ragged pages. The first number of bytes is
//   4 * (8 * dim + 128 + 1536 + parts * (k.run_bytes + v.run_bytes)) + 2 * dim + 16.
//
// The rows of a KV head are its (query token, query head of the group) pairs, row = token * group + head, and
// a row tile is kRows of them (kRows of the kernel: 4, 8 or 16). An item is a range of tokens:
// items below long_items cover `split` compressed tokens each, those from there to page_items `short_split`,
// and item page_items + i covers dense_split tokens of the sinks and of the window from i * dense_split on.
// Each CTA writes one partial result per row, also when it saw no token (then only its log-sum-exp, -inf).
struct AttendParams {
  AttendPool k;  // pages null: no compressed tokens
  AttendPool v;
  SequencesParams sequences;
  DenseParams sinks;
  DenseParams window;
  const void* q;            // [total_q, kv_heads * group, dim]
  const int32_t* q_indptr;  // [batch + 1]; null: sequence b has query tokens b * max_q_len ...
  const int32_t* first;     // [batch] first visible position; null: 0
  const float* center;      // [batch or 1, kv_heads, dim]; null: none
  float* partial_out;       // [total_q, q_heads, items, dim], normalised
  float* partial_lse;  // [total_q, q_heads, items], log2 of the sum of exp2(score * log2(e)); kLowest where
                       // that is -inf and an infinite or NaN value gets weight 0
  int64_t q_token_stride;
  int64_t q_head_stride;
  int64_t center_batch_stride;  // 0: one centre for all sequences
  int32_t q_dtype;              // Dtype
  int32_t group;                // query heads per KV head, 1 to 16
  int32_t kv_heads;
  int32_t max_q_len;  // query tokens per sequence at most; all of them when q_indptr is null
  int32_t row_tiles;  // ceil(max_q_len * group / kRows)
  int32_t page_items;
  int32_t long_items;
  int32_t dense_split;     // tokens, multiple of 32
  int32_t split;           // tokens, multiple of 32
  int32_t short_split;     // tokens, multiple of 32
  int32_t sliding_window;  // positions a query sees up to its own; INT32_MAX: all
  float scale;             // factor of q.k
  float softcap;           // 0: none
  int32_t max_len;         // upper bound of the compressed tokens
  int32_t items;
  int32_t dense_dtype;  // Dtype, kF16 or kBf16: what kernels for 8-bit values round dense tokens to
};

// merge.cu, mst_combine: one CTA of 256 threads per (query token, query head): grid (q_heads, total_q).
struct CombineParams {
  const float* partial_out;  // as in AttendParams
  const float* partial_lse;
  void* out;   // [total_q, q_heads, dim]
  float* lse;  // [total_q, q_heads], natural log; null: not wanted
  int64_t out_token_stride;
  int64_t out_head_stride;
  int64_t lse_token_stride;
  int64_t lse_head_stride;
  int32_t items;
  int32_t dim;        // multiple of 4, at most 256
  int32_t out_dtype;  // Dtype
  int32_t rehearse;   // 1: where blocks start while attend still runs, 0 otherwise
};

// One operand of merge: [tokens, heads, dim] and its natural log-sum-exp [tokens, heads].
struct MergeOperand {
  const void* values;
  const float* lse;
  int64_t token_stride;
  int64_t head_stride;
  int64_t lse_token_stride;
  int64_t lse_head_stride;
  int32_t dtype;  // Dtype
  int32_t reserved;
};

// merge.cu, mst_merge: grid (heads, tokens), block 128 threads.
struct MergeParams {
  MergeOperand a;
  MergeOperand b;
  void* out;
  float* lse;  // null: not wanted
  int64_t out_token_stride;
  int64_t out_head_stride;
  int64_t lse_token_stride;
  int64_t lse_head_stride;
  int32_t out_dtype;  // Dtype
  int32_t dim;
};

static_assert(sizeof(AttendPool) == 48, "AttendPool has padding");
static_assert(sizeof(DenseParams) == 88, "DenseParams has padding");
static_assert(sizeof(AttendParams) == 2 * 48 + 32 + 2 * 88 + 6 * 8 + 3 * 8 + 16 * 4,
              "AttendParams has padding");
static_assert(sizeof(CombineParams) == 80, "CombineParams has padding");
static_assert(sizeof(MergeParams) == 2 * 56 + 56, "MergeParams has padding");

}  // namespace mustafar
