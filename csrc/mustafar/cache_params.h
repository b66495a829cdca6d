// Parameter structs of the kernels that a cache needs besides the ops: copy, widen and median. The rules of
// params.h hold; the launching side mirrors these field by field.
#pragma once

#include "mustafar/params.h"

namespace mustafar {

// One run of tokens to copy.
struct CopyPlace {
  int32_t from_row;
  int32_t from_token;
  int32_t to_row;
  int32_t to_token;
  int32_t tokens;
};

// Tensors [row, token, head, dim], the last dimension contiguous. copy: both of 16-bit elements; widen: to
// floats from any Dtype.
struct CopySide {
  const void* from;
  void* to;
  int64_t from_row_stride;
  int64_t from_token_stride;
  int64_t from_head_stride;
  int64_t to_row_stride;
  int64_t to_token_stride;
  int64_t to_head_stride;
  int32_t dim;
  int32_t from_dtype;  // read by widen
};

// copy.cu, copy and widen. Grid (ceil(units / kCopyWarps), sides), units = places * max_tokens * heads <
// 2^31; block 32 * kCopyWarps threads. What is written is not read.
struct CopyParams {
  CopySide side[2];  // side[blockIdx.y]
  const CopyPlace* places;
  int32_t num_places;
  int32_t max_tokens;  // of a place
  int32_t heads;
  int32_t reserved;
};

constexpr int kCopyWarps = 4;

// Some of the tokens whose median is wanted: f16 or bf16 [token, head, dim], the last dimension contiguous.
struct MedianPart {
  const uint16_t* x;
  int64_t token_stride;
  int64_t head_stride;
  int32_t tokens;
  int32_t reserved;
};

// median.cu: the lower median of each channel over the tokens of both parts, of which there is at least one.
// Grid (dim / kMedianChannels, heads); block kMedianThreads threads.
struct MedianParams {
  MedianPart part[2];
  float* out;  // [heads, dim]
  int32_t dim;
  int32_t dtype;  // Dtype: kF16 or kBf16
};

constexpr int kMedianChannels = 32;
constexpr int kMedianThreads = 512;

static_assert(sizeof(CopyPlace) == 5 * 4, "CopyPlace has padding");
static_assert(sizeof(CopySide) == 8 * 8 + 2 * 4, "CopySide has padding");
static_assert(sizeof(CopyParams) == 2 * 72 + 8 + 4 * 4, "CopyParams has padding");
static_assert(sizeof(MedianPart) == 3 * 8 + 2 * 4, "MedianPart has padding");
static_assert(sizeof(MedianParams) == 2 * 32 + 8 + 2 * 4, "MedianParams has padding");

}  // namespace mustafar
