// Tiles of compressed tokens in ragged pages. One side may be uniform: then the same code runs on row offsets
// that are computed instead of loaded.
//
// The values that a tile has in a page are one run of data-dependent length, of which the whole 16-byte
// pieces are copied. A slot in shared memory holds the 32 bitmap rows, where the values of each row are, and
// then the run; two runs where pages have 16 tokens. Offsets of a damaged page are clamped, so that whatever
// they say nothing outside the page or (2 * D bytes beyond) the slot is read.
//
// Lane r looks after row r of the tile, and copies its share of the page that holds row r.
#pragma once

#include "mustafar/pages.cuh"

namespace mustafar {

// Registers that a thread needs on top of those for uniform pages.
constexpr int kRaggedRegisters = 4;

// Where the values of a row start and end in the page.
struct Span {
  int begin, end;
};

struct RaggedTile {
  int page;
  Span span;
};

template <int D>
struct RaggedPages {
  static constexpr int kBits = D / 8;
  static constexpr int kSpansAt = kTileTokens * kBits;  // in the slot: 8 bytes per row
  static constexpr int kValuesAt = kSpansAt + kTileTokens * 8;

  static __device__ __forceinline__ int slot_bytes(const AttendPool& pool, int page_tokens) {
    return kValuesAt + (page_tokens == 16 ? 2 : 1) * pool.run_bytes;
  }

  // First row of those that share a page with row `lane` of a tile.
  static __device__ __forceinline__ int first_row(int page_tokens, int lane) {
    return page_tokens == 16 ? lane & 16 : 0;
  }

  static __device__ __forceinline__ const uint8_t* page_of(const uint8_t* pages, const AttendPool& pool,
                                                           int page) {
    // In units of 16 bytes a stride fits in 32 bits, and one instruction multiplies to 64.
    const uint64_t offset = static_cast<uint64_t>(static_cast<uint32_t>(page)) *
                            static_cast<uint32_t>(pool.page_stride_bytes >> 4);
    return pages + (offset << 4);
  }

  // What is known ahead, so that no copy waits for a chain of loads: the spans of the tile that is copied
  // next, and the page of the one after it, which its spans will be loaded from.
  struct Next {
    int page;
    int page_after;
    Span keys;
    Span values;

    __device__ __forceinline__ Next(const AttendParams& p, const PageTable& table, int head, int token,
                                    int length, int lane)
        : page_after(find(table, token, length, lane)) {
      advance(p, table, head, token, length, lane);
    }

    // Goes on to the tile at `token`.
    __device__ __forceinline__ void advance(const AttendParams& p, const PageTable& table, int head,
                                            int token, int length, int lane) {
      page = page_after;
      keys = values = {0, 0};
      if (token + lane < length) {
        const int row = (token + lane) & (table.page_tokens - 1);
        keys = span(p.k, head, page, table.page_tokens, row);
        values = span(p.v, head, page, table.page_tokens, row);
      }
      page_after = find(table, token + kStep, length, lane);
    }

    __device__ __forceinline__ RaggedTile key() const { return {page, keys}; }
    __device__ __forceinline__ RaggedTile value() const { return {page, values}; }

    static __device__ __forceinline__ int find(const PageTable& table, int token, int length, int lane) {
      const int first = token + first_row(table.page_tokens, lane);
      return first < length ? table.page(first) : 0;
    }

    static __device__ __forceinline__ Span span(const AttendPool& pool, int head, int page, int page_tokens,
                                                int row) {
      if (pool.row_bytes > 0) {
        const int keep = pool.row_bytes / 2;
        return {row * keep, row * keep + keep};
      }
      const uint8_t* from = page_of(pool.pages + head * pool.head_stride_bytes, pool, page);
      const uint16_t* offsets = reinterpret_cast<const uint16_t*>(from + page_tokens * kBits) + row;
      return {offsets[0], offsets[1]};
    }
  };

  // Copies one side of the tiles of a sequence and KV head into a slot.
  struct Copier {
    const uint8_t* from;  // pages of the head
    uint32_t slot;

    __device__ __forceinline__ Copier(const AttendPool& pool, int head, uint32_t to, int)
        : from(pool.pages + head * pool.head_stride_bytes), slot(to) {
      keep_in_register(from);
      keep_in_register(slot);
    }

    // Starts copying the tile at `token`, nothing if that is at or past `length`. Of bitmaps also rows past
    // the length are copied, which lie inside the page.
    __device__ __forceinline__ void copy(const AttendPool& pool, const RaggedTile& tile, int page_tokens,
                                         int token, int length, int lane) const {
      if (token < length) {
        const int page_rows =
            min(page_tokens, kTileTokens);  // of the tile in a page, and lanes that copy them
        const int first = first_row(page_tokens, lane);
        const int rows = min(length - token - first, page_rows);  // below 1 where a second page is not needed
        const int run_begin = min(__shfl_sync(0xffffffffu, tile.span.begin, first), pool.capacity);
        const int last = __shfl_sync(0xffffffffu, tile.span.end, first + max(rows, 1) - 1);
        const int run_end = max(min(min(last, pool.capacity), run_begin + page_rows * D), run_begin);
        const int start = run_begin & -8;  // what is copied starts on 16 bytes
        const uint8_t* page = page_of(from, pool, tile.page);
        const int share = 16 * (lane - first);
        const int stride = 16 * page_rows;

        const uint8_t* bits = page + ((token + first) & (page_tokens - 1)) * kBits;
        const int bits_bytes = rows > 0 ? page_rows * kBits : 0;
#pragma unroll 1
        for (int i = share; i < bits_bytes; i += stride) {
          copy16_async(slot + first * kBits + i, bits + i);
        }
        const uint8_t* values = page + (pool.values_offset_bytes + 2 * start);
        const uint32_t run = slot + kValuesAt + (first == 0 ? 0 : pool.run_bytes);
        const int run_bytes = 2 * (run_end - start);
#pragma unroll 4
        for (int i = share; i < run_bytes; i += stride) {
          copy16_async(run + i, values + i);
        }
        // The values in front of a row's first and of the next row's.
        const int row_begin = min(max(tile.span.begin, start), run_end) - start;
        const int row_end = min(max(tile.span.end, start), run_end) - start;
        store_shared_u32(slot + kSpansAt + 8 * lane, run + 2 * row_begin - 2);
        store_shared_u32(slot + kSpansAt + 8 * lane + 4, run + 2 * row_end - 2);
      }
      copy_commit();
    }
  };

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
