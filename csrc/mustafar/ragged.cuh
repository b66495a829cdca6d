// Tiles of compressed tokens in ragged pages. One side may be uniform: then the same code runs on row offsets
// that are computed instead of loaded.
//
// The values that a tile has in a page are one run of data-dependent length, of which the whole 16-byte
// pieces are copied. A slot in shared memory holds the 32 bitmap rows, where the values of each row are, and
// then the run; two runs where pages have 16 tokens. Offsets of a damaged page are clamped, so that whatever
// they say nothing outside the page or (2 * D bytes beyond) the slot is read. ragged_codes.cuh is about
// values of 8 bits.
//
// Lane r looks after row r of the tile, and copies its share of the page that holds row r.
#pragma once

#include "mustafar/pages.cuh"

namespace mustafar {

// Registers that a thread needs on top of those for uniform pages.
constexpr int ragged_registers(int rows) { return rows == 4 ? 0 : 4; }

// Where the values of a row start and end in the page.
struct Span {
  int begin, end;
};

struct RaggedTile {
  int page;
  Span span;
};

// What does not depend on how values expand, which take kValueBytes each.
template <int D, int kValueBytes>
struct RaggedSlots {
  static constexpr int kBits = D / 8;
  static constexpr int kSpansAt = kTileTokens * kBits;  // in the slot: 8 bytes per row
  static constexpr int kValuesAt = kSpansAt + kTileTokens * 8;
  // Spans in the slot are addresses of first values, or of 16-bit ones those of the values in front of them.
  static constexpr int kInFront = kValueBytes == 2 ? 2 : 0;

  static __device__ __forceinline__ int slot_bytes(const AttendPool& pool, int page_tokens) {
    return kValuesAt + (page_tokens == 16 ? 2 : 1) * pool.run_bytes;
  }

  // Pages of a head, 16 bytes further on for each lane.
  static __device__ __forceinline__ const uint8_t* lane_pages(const AttendPool& pool, int head, int lane) {
    return pool.pages + head * pool.head_stride_bytes + 16 * lane;
  }

  // First row of those that share a page with row `lane` of a tile.
  static __device__ __forceinline__ int first_row(int page_tokens, int lane) {
    return page_tokens == 16 ? lane & 16 : 0;
  }

  static __device__ __forceinline__ const uint8_t* page_of(const uint8_t* pages, const AttendPool& pool,
                                                           int page) {
    return pages + page_offset(page, page_stride(pool));
  }

  // What is known ahead, so that no copy waits for a chain of loads: the page and the spans of the tile that
  // is copied next, and the page of the one after it. As soon as spans are used, those of the tile after are
  // asked for.
  struct Next {
    const AttendParams& p;
    const PageTable& table;
    const int head, length, lane;
    int token;  // of the tile that is copied next
    int page;
    int page_after;
    Span keys;
    Span values;

    __device__ __forceinline__ Next(const AttendParams& params, const PageTable& pages, int kv_head,
                                    int first, int end, int thread)
        : p(params),
          table(pages),
          head(kv_head),
          length(end),
          lane(thread),
          token(first),
          page(find(first)),
          page_after(find(first + kStep)),
          keys(span(p.k, page, first)),
          values(span(p.v, page, first)) {}

    // The arguments are those of the constructor, with the token of the tile that is copied next.
    __device__ __forceinline__ void advance(const AttendParams&, const PageTable&, int, int next, int, int) {
      token = next;
      page = page_after;
      page_after = find(next + kStep);
    }

    __device__ __forceinline__ RaggedTile key() {
      const RaggedTile tile = {page, keys};
      keys = span(p.k, page_after, token + kStep);
      return tile;
    }

    __device__ __forceinline__ RaggedTile value() {
      const RaggedTile tile = {page, values};
      values = span(p.v, page_after, token + kStep);
      return tile;
    }

    __device__ __forceinline__ int scales() const { return page; }

    // Number of the page that holds row `lane` of the tile at token `at`.
    __device__ __forceinline__ int find(int at) const {
      const int first = at + first_row(table.page_tokens, lane);
      if (first >= length) {
        return 0;
      }
      return table.page(first);
    }

    // The span of row `lane` of the tile at token `at`, which lies in page `number`.
    __device__ __forceinline__ Span span(const AttendPool& pool, int number, int at) const {
      if (at + lane >= length) {
        return {0, 0};
      }
      const int row = (at + lane) & (table.page_tokens - 1);
      if (pool.row_bytes > 0) {
        const int keep = pool.row_bytes / kValueBytes;
        return {row * keep, row * keep + keep};
      }
      const uint8_t* bits = page_of(pool.pages + head * pool.head_stride_bytes, pool, number);
      const uint16_t* offsets = reinterpret_cast<const uint16_t*>(bits + table.page_tokens * kBits) + row;
      return {offsets[0], offsets[1]};
    }
  };

  // Copies one side of the tiles of a sequence and KV head into a slot.
  struct Copier {
    const uint8_t* from;
    uint32_t slot;
    int values_at;

    // Values start `at` bytes into the slot.
    __device__ __forceinline__ Copier(const AttendPool& pool, int head, uint32_t to, int lane,
                                      int at = kValuesAt)
        : from(lane_pages(pool, head, lane)), slot(to), values_at(at) {}

    // Starts copying what a page has of the tile at `token`: 32 rows, or if kSmallPages 16, by as many lanes.
    // Of bitmaps also rows past the length are copied, which lie inside the page.
    template <bool kSmallPages>
    __device__ __forceinline__ void copy_rows(const AttendPool& pool, const RaggedTile& tile, int page_tokens,
                                              int token, int length, int lane) const {
      constexpr int kRows = kSmallPages ? 16 : kTileTokens;
      constexpr int kPiece = 16 * kRows;  // bytes that the lanes copy at a time
      const int first = kSmallPages ? lane & 16 : 0;
      const int rows = min(length - token - first, kRows);  // below 1 where a second page is not needed
      const int run_begin = min(__shfl_sync(0xffffffffu, tile.span.begin, first), pool.capacity);
      const int last = __shfl_sync(0xffffffffu, tile.span.end, first + max(rows, 1) - 1);
      const int run_end = max(min(min(last, pool.capacity), run_begin + kRows * D), run_begin);
      const int start = run_begin & -(16 / kValueBytes);  // what is copied starts on 16 bytes
      const int share = 16 * (lane - first);
      const uint8_t* page = page_of(from, pool, tile.page) - 16 * first;
      const uint32_t run = slot + values_at + (first == 0 ? 0 : pool.run_bytes);

      if (!kSmallPages || rows > 0) {
        const uint8_t* bits = page + ((token + first) & (page_tokens - 1)) * kBits;
        const uint32_t to = slot + first * kBits + share;
#pragma unroll
        for (int i = 0; i < kRows * kBits; i += kPiece) {
          if (i + kPiece <= kRows * kBits || i + share < kRows * kBits) {
            copy16_async(to + i, bits + i);
          }
        }
      }
      const uint8_t* values = page + (pool.values_offset_bytes + kValueBytes * start);
      uint32_t to = run + share;
      int left = kValueBytes * (run_end - start);
#pragma unroll 1
      for (; left >= 4 * kPiece; left -= 4 * kPiece) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          copy16_async(to + kPiece * i, values + kPiece * i);
        }
        to += 4 * kPiece;
        values += 4 * kPiece;
      }
#pragma unroll 1
      for (; left > share; left -= kPiece) {
        copy16_async(to, values);
        to += kPiece;
        values += kPiece;
      }
      // As unsigned numbers, what lies before the run lies behind it too.
      const uint32_t size = run_end - start;
      const uint32_t row_begin = min(static_cast<uint32_t>(tile.span.begin - start), size);
      const uint32_t row_end = min(static_cast<uint32_t>(tile.span.end - start), size);
      store_shared_u32(slot + kSpansAt + 8 * lane, run - kInFront + kValueBytes * row_begin);
      store_shared_u32(slot + kSpansAt + 8 * lane + 4, run - kInFront + kValueBytes * row_end);
    }

    // Starts copying the tile at `token`, nothing if that is at or past `length`.
    __device__ __forceinline__ void copy(const AttendPool& pool, const RaggedTile& tile, int page_tokens,
                                         int token, int length, int lane) const {
      if (token < length) {
        if (page_tokens != 16) {
          copy_rows<false>(pool, tile, page_tokens, token, length, lane);
        } else {
          copy_rows<true>(pool, tile, page_tokens, token, length, lane);
        }
      }
      copy_commit();
    }
  };
};

template <int D>
struct RaggedPages : RaggedSlots<D, 2> {
  using Slots = RaggedSlots<D, 2>;
  using Slots::kBits, Slots::kSpansAt;

  struct Keys {
    const AttendPool& pool;
    uint32_t slot;
    int t;
    Scratch& scratch;

    __device__ __forceinline__ KeyRow<D> row(int r) const {
      KeyRow<D> row{{}, load_shared_u32(slot + kSpansAt + 8 * r), low_bits(8 * t), 0x4440u + t, scratch};
      row.bits.load(slot + r * kBits);
      return row;
    }
  };

  struct Values {
    const AttendPool& pool;
    uint32_t slot;
    int g;
    Scratch& scratch;

    __device__ __forceinline__ ValueRow<D> row(int r) const {
      const uint2 span = load_shared_v2(slot + kSpansAt + 8 * r);
      ValueRow<D> row{{}, span.x, span.y, low_bits(4 * g), g, scratch};
      row.bits.load(slot + r * kBits);
      return row;
    }
  };
};

}  // namespace mustafar
