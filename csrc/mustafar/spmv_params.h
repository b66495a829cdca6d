// Parameter structs of the kernels that multiply with stored tokens: spmv_key and spmv_value. The rules of
// params.h hold; the launching side mirrors these field by field.
#pragma once

#include "mustafar/store_params.h"

namespace mustafar {

// The query rows of a KV head are its (query token, query head of the group) pairs, row = token * group +
// head. A CTA takes this many of them, and of spmv_key this many tokens.
constexpr int kKeyRows = 8;
constexpr int kKeyTokens = 128;
constexpr int kValueRows = 2;

// Warps of a CTA.
constexpr int kKeyWarps = 4;
constexpr int kValueWarps = 12;

// spmv.cu, mst_spmv_key_<dtype>_d<dim>. Grid batch * heads * ceil(q_len * group / kKeyRows) *
// ceil(max_len / kKeyTokens) < 2^31; block 32 * kKeyWarps threads.
struct SpmvKeyParams {
  StorePool pool;
  SequencesParams sequences;
  const void* q;        // [batch, q_len, heads * group, dim]
  const float* center;  // [center_batch, heads, dim]; null: none
  float* scores;        // [batch, q_len, heads * group, >= max_len]; tokens past a length are not written
  uint32_t* errors;     // counts wrong lengths and page numbers, whose tokens are not written, and rows with
                        // another number of bits than values, which read as +0; null: not counted
  int64_t q_batch_stride;
  int64_t q_token_stride;
  int64_t q_head_stride;
  int64_t scores_batch_stride;
  int64_t scores_token_stride;
  int64_t scores_head_stride;
  int32_t center_batch;  // 1, or batch
  int32_t q_dtype;       // Dtype
  int32_t batch;
  int32_t heads;  // KV heads
  int32_t group;  // query heads per KV head
  int32_t q_len;
  int32_t max_len;
  int32_t num_pages;
  int32_t capacity;  // values of a ragged page
  float scale;
};

// spmv.cu, mst_spmv_value_<dtype>_d<dim>. Grid batch * heads * ceil(q_len * group / kValueRows) < 2^31; block
// 32 * kValueWarps threads.
struct SpmvValueParams {
  StorePool pool;
  SequencesParams sequences;
  const float* weights;  // [batch, q_len, heads * group, >= max_len]; tokens past a length are not read
  void* out;             // [batch, q_len, heads * group, dim]; 0 where there are no tokens
  uint32_t* errors;      // as in SpmvKeyParams; what has no page or length counts as no tokens
  int64_t weights_batch_stride;
  int64_t weights_token_stride;
  int64_t weights_head_stride;
  int64_t out_batch_stride;
  int64_t out_token_stride;
  int64_t out_head_stride;
  int32_t out_dtype;  // Dtype
  int32_t batch;
  int32_t heads;  // KV heads
  int32_t group;  // query heads per KV head
  int32_t q_len;
  int32_t max_len;
  int32_t num_pages;
  int32_t capacity;  // values of a ragged page
};

static_assert(sizeof(SpmvKeyParams) == 40 + 32 + 10 * 8 + 10 * 4, "SpmvKeyParams has padding");
static_assert(sizeof(SpmvValueParams) == 40 + 32 + 9 * 8 + 8 * 4, "SpmvValueParams has padding");

}  // namespace mustafar
