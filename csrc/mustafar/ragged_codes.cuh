// Tiles of compressed tokens in ragged pages with 8-bit values: the slots of ragged.cuh, in that of the keys
// the scales of the 32 keys and of the values that belong to them in front of the run.
#pragma once

#include "mustafar/code_pages.cuh"
#include "mustafar/ragged.cuh"

namespace mustafar {

template <int D, typename Codes>
struct RaggedCodePages : RaggedSlots<D, 1> {
  using Slots = RaggedSlots<D, 1>;
  using Slots::kBits, Slots::kSpansAt;

  static constexpr int kScalesAt = Slots::kValuesAt;
  static constexpr int kKeyCodesAt = kScalesAt + 2 * kScaleBytes;
  static constexpr int kValueCodesAt = Slots::kValuesAt;

  static __device__ __forceinline__ int key_slot_bytes(const AttendPool& pool, int page_tokens) {
    return 2 * kScaleBytes + Slots::slot_bytes(pool, page_tokens);
  }

  static __device__ __forceinline__ int value_slot_bytes(const AttendPool& pool, int page_tokens) {
    return Slots::slot_bytes(pool, page_tokens);
  }

  // As ScaleCopier, a lane for each 8 rows of both sides; pages of 16 tokens have two such lanes each.
  struct Scales {
    const AttendParams& p;
    const int head;
    const uint32_t to;

    __device__ __forceinline__ Scales(const AttendParams& params, int kv_head, uint32_t scales, int)
        : p(params), head(kv_head), to(scales) {}

    // `page` holds row `lane` of the tile at `token`.
    __device__ __forceinline__ void copy(int page, int page_tokens, int token, int length, int lane) const {
      const int first = Slots::first_row(page_tokens, lane);
      const int eight = lane - first;
      const int row = first + 8 * eight;
      if (eight < min(page_tokens, kTileTokens) / 8 && token + row < length) {
        const int offset = 2 * ((token + first) & (page_tokens - 1)) - 2 * page_tokens - 16 * first;
        copy_side(p.k, page, offset, lane, to + 2 * row);
        copy_side(p.v, page, offset, lane, to + kScaleBytes + 2 * row);
      }
    }

    __device__ __forceinline__ void copy_side(const AttendPool& pool, int page, int offset, int lane,
                                              uint32_t to_row) const {
      const uint8_t* from = Slots::page_of(Slots::lane_pages(pool, head, lane), pool, page);
      copy16_async(to_row, from + (pool.values_offset_bytes + offset));
    }
  };

  struct Keys {
    const AttendPool& pool;
    uint32_t slot;
    uint32_t table;
    int t;

    __device__ __forceinline__ CodeKeyRow<D, Codes> row(int r) const {
      const uint2 span = load_shared_v2(slot + kSpansAt + 8 * r);
      CodeKeyRow<D, Codes> row{{}, span.x, span.y, low_bits(8 * t), table, static_cast<uint32_t>(8 * t)};
      row.bits.load(slot + r * kBits);
      return row;
    }
  };

  struct Values {
    const AttendPool& pool;
    uint32_t slot;
    uint32_t table;
    int g;

    __device__ __forceinline__ CodeValueRow<D, Codes> row(int r) const {
      const uint32_t span = slot + kSpansAt + 8 * r;
      return {slot + r * kBits, load_shared_u32(g < 4 ? span : span + 4), g, table};
    }
  };
};

}  // namespace mustafar
