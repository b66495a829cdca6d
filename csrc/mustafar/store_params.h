// Parameter structs of the kernels that store and read back pages: append, prune, compress, decompress,
// validate. The rules of params.h hold; the launching side mirrors these field by field.
#pragma once

#include "mustafar/params.h"

namespace mustafar {

// Each warp of these kernels takes this many consecutive tokens of one head. Pages hold a multiple of it, so
// the values of a full tile are whole 32-byte sectors.
constexpr int kTileRows = 16;

// Warps of a CTA of append, prune (token direction), compress and decompress; they share nothing but
// compress's page.
constexpr int kStoreWarps = 4;

// The pages of one side (K or V).
struct StorePool {
  uint8_t* pages;  // page p of head h starts at pages + p * page_stride_bytes + h * head_stride_bytes
  int64_t page_stride_bytes;    // multiple of 16
  int64_t head_stride_bytes;    // multiple of 16
  int32_t keep;                 // values per row; 0 for ragged pages
  int32_t values_offset_bytes;  // where the values of a page start
  int32_t value_type;  // ValueType; scales of 8-bit values lie right before the values, one for each token
  int32_t reserved;
};

// One side (K or V) of append.
struct AppendSide {
  const uint16_t* x;     // [tokens, heads, dim]
  const float* weights;  // [heads, dim], each >= 0; null: plain magnitude. Only append_weighted reads them
  const float* center;   // [center_batch, heads, dim]; null: none
  StorePool pool;        // uniform pages
  int64_t x_token_stride;
  int64_t x_head_stride;
  int32_t center_batch;  // 1, or more: then `sequence` says which one a token uses
  int32_t reserved;
};

// append.cu: append, and append_weighted when a side has weights. Grid (ceil(units / kStoreWarps), sides),
// units = ceil(tokens / kTileRows) * heads < 2^31; block 32 * kStoreWarps threads. Slots of one call are
// distinct: a slot given twice leaves its row a mixture of both tokens.
struct AppendParams {
  AppendSide side[2];       // side[blockIdx.y]
  const int64_t* slots;     // [tokens]: page * page_tokens + row; negative: skip the token
  const int32_t* sequence;  // [tokens]; null when no side has center_batch > 1
  uint32_t* errors;         // counts tokens skipped for a slot or sequence out of range; null: not counted
  int64_t num_slots;        // pages of the smaller pool * page_tokens
  int32_t tokens;
  int32_t heads;
  int32_t page_tokens;  // 16, 32, 64 or 128
  int32_t reserved;
};

// prune.cu, prune_token: grid ceil(units / kStoreWarps), units = batch * ceil(tokens / kTileRows) * heads <
// 2^31; block 32 * kStoreWarps threads. prune_channel: grid ceil(units / kStoreWarps), units = batch *
// (tokens / 32) * heads * ceil(dim / 64) < 2^31; same block.
struct PruneParams {
  uint16_t* x;           // [batch, tokens, heads, dim], changed in place
  const float* weights;  // each >= 0; [heads, dim], by channel [batch, tokens, heads]; null: plain magnitude.
                         // Not with all_ties
  uint8_t* mask;         // contiguous [batch, tokens, heads, dim / 8]; null: not wanted
  int64_t x_batch_stride;
  int64_t x_token_stride;
  int64_t x_head_stride;
  int32_t batch;
  int32_t tokens;  // by channel: a multiple of 32
  int32_t heads;
  int32_t keep;      // per row, 1 to dim; by channel: per 32 tokens, 1 to 32
  int32_t all_ties;  // 1: everything that equals the keep-th largest magnitude survives with it
  int32_t reserved;
};

// compress.cu. Grid pages * heads, block 32 * kStoreWarps threads.
struct CompressParams {
  const uint16_t* x;            // [tokens, heads, dim]
  const uint8_t* mask;          // contiguous [tokens, heads, dim / 8]; null: everything but +0 and -0
  const int32_t* page_numbers;  // [pages], no page twice
  uint32_t* needed;  // [pages, heads] values per page, also of pages that do not fit; null: not wanted
  uint32_t* errors;  // counts pages (of one head) left unwritten: too full, or number out of range; or null
  StorePool pool;    // ragged pages
  int64_t x_token_stride;
  int64_t x_head_stride;
  int32_t tokens;
  int32_t heads;
  int32_t pages;      // ceil(tokens / page_tokens)
  int32_t num_pages;  // of the pool
  int32_t page_tokens;
  int32_t capacity;  // values per page
};

// decompress.cu. Grid ceil(units / kStoreWarps), units = batch * ceil(max_len / kTileRows) * heads < 2^31;
// block 32 * kStoreWarps threads.
struct DecompressParams {
  StorePool pool;
  SequencesParams sequences;
  const float* center;  // [center_batch, heads, dim]; null: none
  void* out;            // [batch, >= max_len, heads, dim]
  uint32_t* errors;     // counts wrong lengths and page numbers, whose tokens are not written, and rows with
                        // another number of bits than values, which read as +0; null: not counted
  int64_t out_batch_stride;
  int64_t out_token_stride;
  int64_t out_head_stride;
  int32_t center_batch;  // 1, or batch
  int32_t out_dtype;     // Dtype
  int32_t batch;
  int32_t heads;
  int32_t max_len;
  int32_t num_pages;
  int32_t capacity;  // values of a ragged page
  int32_t reserved;
};

// validate.cu. Grid ceil(rows / kValidateThreads) with rows = batch * heads * max_pages * page_tokens and
// max_pages = ceil(max_len / page_tokens); block kValidateThreads threads.
struct ValidateParams {
  StorePool pool;
  SequencesParams sequences;
  uint64_t* first;  // lowered to the record of the first violation; all ones before the launch
  int32_t batch;
  int32_t heads;
  int32_t max_len;
  int32_t num_pages;
  int32_t capacity;  // values of a ragged page
  int32_t reserved;
};

constexpr int kValidateThreads = 256;

// A record is 8 * (((sequence * heads + head) * max_pages + page of the sequence) * page_tokens + row) +
// Violation.
enum Violation : uint32_t {
  kNoViolation = 0,
  kLength = 1,       // outside 0 to max_len
  kPageNumber = 2,   // outside the pool
  kBitCount = 3,     // uniform row: bits set differ from keep; ragged row: from its span of values
  kFirstOffset = 4,  // ragged: row 0 does not start at value 0
  kCapacity = 5,     // ragged: the row ends past the capacity
};

static_assert(sizeof(StorePool) == 40, "StorePool has padding");
static_assert(sizeof(AppendSide) == 3 * 8 + 40 + 3 * 8, "AppendSide has padding");
static_assert(sizeof(AppendParams) == 2 * 88 + 4 * 8 + 4 * 4, "AppendParams has padding");
static_assert(sizeof(PruneParams) == 6 * 8 + 6 * 4, "PruneParams has padding");
static_assert(sizeof(CompressParams) == 5 * 8 + 40 + 2 * 8 + 6 * 4, "CompressParams has padding");
static_assert(sizeof(DecompressParams) == 40 + 32 + 6 * 8 + 8 * 4, "DecompressParams has padding");
static_assert(sizeof(ValidateParams) == 40 + 32 + 8 + 6 * 4, "ValidateParams has padding");

}  // namespace mustafar
