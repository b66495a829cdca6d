// Tiles of compressed tokens in ragged pages. One side may be uniform: then the same code runs on row offsets
// that are computed instead of loaded.
//
// The values that a tile has in a page are one run of data-dependent length. They are copied in chunks of 8
// rows, each by 8 lanes and in whole pieces of 16 bytes; a piece that two chunks share is copied by both. In
// shared memory chunks start a quarter of the banks apart, so that rows which are read together, see
// ChunkOrder, rarely meet in a bank. A slot holds the 32 bitmap rows, where the values of each row are, and
// then the run; two runs where pages have 16 tokens. Offsets of a damaged page are clamped, so that whatever
// they say nothing outside the page or (2 * D bytes beyond) the slot is read. ragged_codes.cuh is about
// values of 8 bits.
//
// Lane r looks after row r of the tile, and copies its share of the chunk that holds row r.
#pragma once

#include "mustafar/pages.cuh"

namespace mustafar {

constexpr int kChunkRows = 8;
constexpr int kChunks = kTileTokens / kChunkRows;
// Bytes by which a chunk lies further from the one before than in the page, and then up to 112 more to
// the bank where it starts.
constexpr int kChunkApart = 128;

// Registers that a thread needs on top of those for uniform pages.
constexpr int ragged_registers(int rows) { return rows == 4 ? 0 : 4; }

// The products take keys 8 rows at a time, two of each chunk, and values 4 rows, one of each.
struct ChunkOrder {
  static __device__ __forceinline__ int row_of(int position) {
    return kChunkRows * (position / 2 % 4) + 4 * (position / 16) + 2 * (position % 2) + position / 8 % 2;
  }

  static __device__ __forceinline__ int position_of(int row) {
    return 16 * (row / 4 % 2) + 8 * (row % 2) + 2 * (row / kChunkRows) + row / 2 % 2;
  }
};

// Where the values of a row start and end in the page.
struct Span {
  int begin, end;
};

// What row `lane` of a tile is copied from.
struct RaggedTile {
  const uint8_t* page;
  Span span;
};

// What does not depend on how values expand, which take kValueBytes each.
template <int D, int kValueBytes>
struct RaggedSlots : ChunkOrder {
  static constexpr int kBits = D / 8;
  static constexpr int kSpansAt = kTileTokens * kBits;  // in the slot: 8 bytes per row, by position
  static constexpr int kValuesAt = kSpansAt + kTileTokens * 8;
  // Spans in the slot are addresses of first values, or of 16-bit ones those of the values in front of them.
  static constexpr int kInFront = kValueBytes == 2 ? 2 : 0;

  // Where the bitmap of the row at a position lies among those of the slot: by position if it has whole
  // pieces, else as in the page.
  static __device__ __forceinline__ int bits_of(int position) {
    return kBits % 16 == 0 ? position : row_of(position);
  }

  static __device__ __forceinline__ int slot_bytes(const AttendPool& pool, int page_tokens) {
    return kValuesAt + (page_tokens == 16 ? 2 : 1) * pool.run_bytes + kChunks * kChunkApart;
  }

  // What is known ahead, so that no copy waits for a chain of loads: the pages and the spans of the tile that
  // is copied next, and the number of the page of the one after it. As soon as a side's are used, those of
  // the tile after are asked for. The last token stands for those behind it.
  struct Next {
    struct Side {
      const AttendPool& pool;
      const uint8_t* pages;  // of the head
      RaggedTile tile;
    };

    const PageTable& table;
    const int length, lane;
    int token;  // of the tile that is copied next
    int page_after;
    Side k;
    Side v;

    __device__ __forceinline__ Next(const AttendParams& p, const PageTable& pages, int head, int first,
                                    int end, int thread)
        : table(pages),
          length(end),
          lane(thread),
          token(first),
          page_after(0),
          k{p.k, p.k.pages + head * p.k.head_stride_bytes, {}},
          v{p.v, p.v.pages + head * p.v.head_stride_bytes, {}} {
      if (first < end) {
        page_after = find(first);
        seek(k, first);
        seek(v, first);
        page_after = find(first + kStep);
      }
    }

    // The arguments are those of the constructor, with the token of the tile that is copied next.
    __device__ __forceinline__ void advance(const AttendParams&, const PageTable&, int, int next, int, int) {
      token = next;
      if (next < length) {
        page_after = find(next + kStep);
      }
    }

    __device__ __forceinline__ RaggedTile key() { return take(k); }
    __device__ __forceinline__ RaggedTile value() { return take(v); }
    __device__ __forceinline__ const Next& scales() const { return *this; }

    __device__ __forceinline__ RaggedTile take(Side& side) const {
      const RaggedTile tile = side.tile;
      if (token < length) {
        seek(side, token + kStep);
      }
      return tile;
    }

    // Number of the page that holds row `lane` of the tile at token `at`.
    __device__ __forceinline__ int find(int at) const {
      const int first = table.page_tokens == 16 ? lane & 16 : 0;
      return table.page(min(at + first, length - 1));
    }

    // Makes the tile at token `at`, which lies in page page_after, that which is copied next.
    __device__ __forceinline__ void seek(Side& side, int at) const {
      const AttendPool& pool = side.pool;
      const uint32_t row = min(at + lane, length - 1) & (table.page_tokens - 1);
      side.tile.page = side.pages + page_offset(page_after, page_stride(pool));
      if (pool.row_bytes > 0) {
        const int keep = pool.row_bytes / kValueBytes;
        side.tile.span.begin = row * keep;
        side.tile.span.end = row * keep + keep;
      } else {
        const uint32_t at_row = table.page_tokens * kBits + 2 * row;
        const uint16_t* offsets = reinterpret_cast<const uint16_t*>(side.tile.page + at_row);
        side.tile.span = {offsets[0], offsets[1]};
      }
    }
  };

  // Copies one side of the tiles of a sequence and KV head into a slot.
  struct Copier {
    uint32_t slot;
    int values_at;

    // Values start `at` bytes into the slot.
    __device__ __forceinline__ Copier(const AttendPool&, int, uint32_t to, int, int at = kValuesAt)
        : slot(to), values_at(at) {}

    // Each half of the lanes copies the bitmaps of 16 rows; `row` is in the page the lane's own.
    __device__ __forceinline__ void copy_bits(const uint8_t* page, uint32_t row, int lane) const {
      constexpr int kHalf = 16 * kBits;
      const int share = 16 * (lane % 16);
      const uint8_t* from = page + (row % 16 * 16 + row / 16 * kHalf);
      const int first = lane / 16 * 16 + share / kBits;
      const uint32_t to =
          slot + (kBits % 16 == 0 ? position_of(first) * kBits + share % kBits : lane / 16 * kHalf + share);
#pragma unroll
      for (int i = 0; i < kHalf; i += 256) {
        copy16_async_if(i + 256 <= kHalf || i + share < kHalf, to + position_of(i / kBits) * kBits, from + i);
      }
    }

    // Starts copying the tile at `token`, nothing if that is at or past `length`. Of bitmaps also rows past
    // the length are copied, which lie inside the page.
    __device__ __forceinline__ void copy(const AttendPool& pool, const RaggedTile& tile, int page_tokens,
                                         int token, int length, int lane) const {
      if (token < length) {
        copy_bits(tile.page, (token + lane) & (page_tokens - 1), lane);
        // Rows past the length must not be copied over others.
        const Span span = {token + lane < length ? tile.span.begin : tile.span.end, tile.span.end};
        copy_values(pool, {tile.page, span}, page_tokens == 16 ? lane & 16 : 0, lane);
      }
      copy_commit();
    }

    // `first` is the first row of the tile that lies in the lane's page.
    __device__ __forceinline__ void copy_values(const AttendPool& pool, const RaggedTile& tile, int first,
                                                int lane) const {
      constexpr int kPieceValues = 16 / kValueBytes;
      const int run_begin = min(__shfl_sync(0xffffffffu, tile.span.begin, first), pool.capacity);
      const int start = run_begin & -kPieceValues;  // what is copied starts on 16 bytes
      // All counted from there. As unsigned numbers, what lies before the run lies behind it too.
      const uint32_t most = min(pool.capacity - start, pool.run_bytes / kValueBytes);
      const uint32_t begin = min(static_cast<uint32_t>(tile.span.begin - start), most);
      const uint32_t end = min(static_cast<uint32_t>(tile.span.end - start), most);
      const uint32_t chunk =
          __shfl_sync(0xffffffffu, begin, lane & -kChunkRows) / kPieceValues * kPieceValues;
      const uint32_t chunk_end = __shfl_sync(0xffffffffu, end, lane | (kChunkRows - 1));

      // The lanes of a chunk copy a line of 128 bytes at a time, of the first line what belongs to the chunk.
      constexpr int kLine = 16 * kChunkRows;
      const uint32_t share = 16 * (lane % kChunkRows);
      const uint64_t first_piece =
          reinterpret_cast<uint64_t>(tile.page) + (pool.values_offset_bytes + kValueBytes * (start + chunk));
      const uint32_t in_line = static_cast<uint32_t>(first_piece) % kLine;
      const uint8_t* from = reinterpret_cast<const uint8_t*>(first_piece / kLine * kLine | share);
      const int q = lane / kChunkRows;
      const uint32_t run = slot + values_at + (first == 0 ? 0 : pool.run_bytes);
      // The first of what is far enough from the chunk in front and q quarters of the banks from a full turn.
      const uint32_t chunk_at =
          (run + kValueBytes * chunk + (kChunkApart - 32) * q + 127) / 128 * 128 + 32 * q;
      uint32_t to = chunk_at + share - in_line;
      int left = kValueBytes * (chunk_end - chunk) + in_line - share;
      bool inside = share >= in_line;
#pragma unroll 1
      do {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          copy16_async_if(left > kLine * i && (i > 0 || inside), to + kLine * i, from + kLine * i);
        }
        to += 4 * kLine;
        from += 4 * kLine;
        left -= 4 * kLine;
        inside = true;
      } while (__any_sync(0xffffffffu, left > 0));
      const uint32_t values = chunk_at - kValueBytes * chunk - kInFront;
      store_shared_v2(slot + kSpansAt + 8 * position_of(lane),
                      {values + kValueBytes * begin, values + kValueBytes * end});
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
    Scratch &even, &odd;  // of rows at even and at odd multiples of eight positions

    __device__ __forceinline__ KeyRow<D> row(int position, bool in_odd) const {
      const uint32_t before = load_shared_u32(slot + kSpansAt + 8 * position);
      KeyRow<D> row{{}, before, low_bits(8 * t), 0x4440u + t, in_odd ? odd : even};
      row.bits.load(slot + Slots::bits_of(position) * kBits);
      return row;
    }
  };

  struct Values {
    const AttendPool& pool;
    uint32_t slot;
    int g;
    Scratch &even, &odd;  // of rows at even and at odd multiples of eight positions

    __device__ __forceinline__ ValueRow<D> row(int first, int at) const {
      const int position = first + at;
      const uint2 span = load_shared_v2(slot + kSpansAt + 8 * position);
      ValueRow<D> row{{}, span.x, span.y, low_bits(4 * g), g, at / 8 % 2 == 0 ? even : odd};
      row.bits.load(slot + Slots::bits_of(position) * kBits);
      return row;
    }

    __device__ __forceinline__ ValueRows<D> two_rows(int first, int at) const {
      return {row(first, at), row(first, at + 1)};
    }
  };
};

}  // namespace mustafar
