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

  // Every eighth lane copies the scales of 8 keys, from its own row on, and the lane after it those of the
  // values.
  struct Scales {
    const uint32_t to;

    __device__ __forceinline__ Scales(const AttendParams&, int, uint32_t scales, int) : to(scales) {}

    __device__ __forceinline__ void copy(const typename Slots::Next& next, int page_tokens, int token,
                                         int length, int lane) const {
      const auto& side = lane % 2 == 0 ? next.k : next.v;
      const int row = lane & -8;
      const uint32_t in_page = (token + row) & (page_tokens - 1);
      const uint32_t at = side.pool.values_offset_bytes - 2 * page_tokens + 2 * in_page;
      copy16_async_if(lane % 8 < 2 && token + row < length, to + kScaleBytes * (lane % 2) + 2 * row,
                      side.tile.page + at);
    }
  };

  struct Keys {
    const AttendPool& pool;
    uint32_t slot;
    const LaneTable& table;
    int t;

    __device__ __forceinline__ CodeKeyRow<D, Codes> row(int position, bool) const {
      const uint2 span = load_shared_v2(slot + kSpansAt + 8 * position);
      CodeKeyRow<D, Codes> row{{}, span.x, span.y, low_bits(8 * t), table, static_cast<uint32_t>(8 * t)};
      row.bits.load(slot + Slots::bits_of(position) * kBits);
      return row;
    }
  };

  struct Values {
    const AttendPool& pool;
    uint32_t slot;
    const LaneTable& table;
    int g;

    __device__ __forceinline__ CodeValueRow<D, Codes> row(int first, int at) const {
      const int position = first + at;
      const uint32_t span = slot + kSpansAt + 8 * position;
      return {slot + Slots::bits_of(position) * kBits, load_shared_u32(g < 4 ? span : span + 4), g, table};
    }

    __device__ __forceinline__ CodeValueRows<D, Codes> two_rows(int first, int at) const {
      return {row(first, at), row(first, at + 1), {}, {}};
    }
  };
};

}  // namespace mustafar
