// Reading stored tokens back: one warp stages the values of a tile of consecutive tokens of one page in
// shared memory and expands their rows into registers. Whatever a damaged page, length or table says, nothing
// outside the pool is read.
//
// `Params` of these functions has pool, sequences, heads, max_len and num_pages, as DecompressParams has.
#pragma once

#include "mustafar/codes.cuh"
#include "mustafar/run.cuh"
#include "mustafar/store_params.h"

namespace mustafar {

__device__ __forceinline__ void count_error(uint32_t* errors) {
  if (errors != nullptr) {
    atomicAdd(errors, 1u);
  }
}

// Tokens of a head of a sequence; -1 if that is out of range.
template <typename Params>
__device__ __forceinline__ int stored_length(const Params& p, int64_t sequence, int head) {
  const SequencesParams& s = p.sequences;
  const int32_t len = s.lens[s.lens_per_head ? sequence * p.heads + head : sequence];
  return static_cast<uint32_t>(len) > static_cast<uint32_t>(p.max_len) ? -1 : len;
}

// Page of a token; null if its number is out of range.
template <typename Params>
__device__ __forceinline__ const uint8_t* stored_page(const Params& p, int64_t sequence, int head,
                                                      int token) {
  const SequencesParams& s = p.sequences;
  const int64_t entry = sequence * s.table_stride + token / s.page_tokens;
  const int64_t number = s.table != nullptr ? s.table[entry] : entry;
  if (number < 0 || number >= p.num_pages) {
    return nullptr;
  }
  return p.pool.pages + number * p.pool.page_stride_bytes + head * p.pool.head_stride_bytes;
}

// A tile of up to kTile tokens.
template <int kDim, int kTile>
struct StoredTile {
  // Values of the stage: shifted by up to 7, or 15 codes, to line up with their place in the page.
  static constexpr int kStage = kTile * kDim + 8;

  const uint8_t* bitmap;    // of the tile's first row
  const uint16_t* offsets;  // of the tile's first row; ragged pages
  const uint16_t* scales;   // of the tile's first row; codes
  const void* packed;       // the tile's values, in the stage
  int32_t value_type;
  int keep;  // 0 in ragged pages
  int rows;
  int start;  // where the tile's values start in the page
  int size;   // their number

  // Stages `tile_rows` rows of `page` from `row0` on; `stage` is on a multiple of 16 bytes. Called by the
  // whole warp, as is expand().
  __device__ __forceinline__ StoredTile(const StorePool& pool, const uint8_t* page, int page_tokens,
                                        int capacity, int row0, int tile_rows, uint16_t* stage, int lane)
      : bitmap(page + row0 * (kDim / 8)),
        offsets(reinterpret_cast<const uint16_t*>(page + page_tokens * (kDim / 8)) + row0),
        scales(reinterpret_cast<const uint16_t*>(page + pool.values_offset_bytes) - page_tokens + row0),
        value_type(pool.value_type),
        keep(pool.keep),
        rows(tile_rows),
        start(row0 * keep),
        size(rows * keep) {
    if (keep == 0) {
      start = min(static_cast<int>(offsets[0]), capacity);
      const int end = min(static_cast<int>(offsets[rows]), capacity);
      size = min(max(end - start, 0), rows * kDim);
    }
    const uint8_t* values = page + pool.values_offset_bytes;
    if (has_codes(value_type)) {
      stage_run(values + start, reinterpret_cast<uint8_t*>(stage), lane);
    } else {
      stage_run(reinterpret_cast<const uint16_t*>(values) + start, stage, lane);
    }
    __syncwarp();
  }

  template <typename Value>
  __device__ __forceinline__ void stage_run(const Value* values, Value* stage, int lane) {
    Value* const to = stage + run_shift(values);
    packed = to;
    copy_run(to, values, size, lane);
  }

  // The chunks that lane t of row `row` of the tile holds, see lanes.cuh; +0 in rows past the last. Codes
  // come as f16. False if the row is wrong, that is, has another number of bits than values or lies outside
  // the tile's values; it then is all +0.
  __device__ __forceinline__ bool expand(int row, int t, uint32_t (&words)[Lanes<kDim>::kWords]) const {
    uint32_t kept = 0;
    int begin = 0;
    int end = 0;
    if (row < rows) {
      kept = load_kept<kDim>(bitmap + row * (kDim / 8), t);
      begin = keep > 0 ? row * keep : offsets[row] - start;
      end = keep > 0 ? begin + keep : offsets[row + 1] - start;
    }
    uint32_t count;
    const uint32_t starts = chunk_starts<kDim>(kept, t, count);
    const bool right = begin >= 0 && end - begin == static_cast<int>(count) && end <= size;
    kept = right ? kept : 0;
    begin = right ? begin : 0;
    if (has_codes(value_type)) {
      unpack_codes<kDim>(words, kept, starts, static_cast<const uint8_t*>(packed) + begin, value_type);
    } else {
      unpack_chunks<kDim>(words, kept, starts, static_cast<const uint16_t*>(packed) + begin);
    }
    return right;
  }

  // What the elements of a right row are multiplied by. 1 for 16-bit values.
  __device__ __forceinline__ float scale(int row, bool right) const {
    return !has_codes(value_type) || !right || row >= rows ? 1.0f : bf16::to_float(scales[row]);
  }
};

}  // namespace mustafar
