// Tiles of 32 compressed tokens: how they come into shared memory and how their rows expand into matrix
// operands.
//
// A slot in shared memory holds the 32 bitmap rows and then, of uniform pages, the 32 rows of values, both as
// they lie in the page. ragged.cuh has the slots of ragged pages.
#pragma once

#include "mustafar/bitmap.cuh"
#include "mustafar/expand.cuh"
#include "mustafar/attend_params.h"

namespace mustafar {

constexpr int kTileTokens = 32;
constexpr int kWarps = 4;
constexpr int kStep = kWarps * kTileTokens;  // from one tile of a warp to its next

// The numbers of the pages of a tile: one, or two where pages have 16 tokens.
struct TilePages {
  int page[2];
};

// From the first page to piece `piece` of 16 bytes of page `page`, in bytes. In such pieces the stride of
// pages fits in 32 bits, and one instruction multiplies to 64.
__device__ __forceinline__ uint64_t page_offset(int page, uint32_t stride, uint32_t piece = 0) {
  return (static_cast<uint64_t>(static_cast<uint32_t>(page)) * stride + piece) << 4;
}

__device__ __forceinline__ uint32_t page_stride(const AttendPool& pool) {
  return static_cast<uint32_t>(pool.page_stride_bytes >> 4);
}

// The base-2 logarithm of the tokens of a page. A division would cost 20 instructions, and a shift that is
// known ahead a register, so the compiler must not know that it can be.
__device__ __forceinline__ int page_shift(int page_tokens) {
  uint32_t below = page_tokens - 1;
  keep_in_register(below);
  return __popc(below);
}

// Block table row of one sequence.
struct PageTable {
  const SequencesParams& sequences;
  int page_tokens;
  // Where its entries are or, without a table, the number of its first page: one value, as registers are few.
  uint64_t row;

  __device__ __forceinline__ PageTable(const SequencesParams& all, int batch)
      : sequences(all), page_tokens(all.page_tokens), row(batch * all.table_stride) {
    if (all.table != nullptr) {
      row = reinterpret_cast<uint64_t>(all.table + row);
    }
  }

  __device__ __forceinline__ int page(int token) const {
    const int index = token >> page_shift(page_tokens);
    return sequences.table == nullptr ? static_cast<int>(row) + index
                                      : reinterpret_cast<const int32_t*>(row)[index];
  }

  // Pages of the tile at `token`; table entries past the end are not read.
  __device__ __forceinline__ TilePages find(int token, int length) const {
    TilePages found = {{0, 0}};
    if (token < length) {
      found.page[0] = page(token);
    }
    if (page_tokens == 16 && token + 16 < length) {
      found.page[1] = page(token + 16);
    }
    return found;
  }
};

// Copies one side of the tiles of a sequence and KV head into a slot. Its members are hidden from the
// compiler, which would rather compute them again in the loop than keep them.
template <int D>
struct TileCopier {
  static constexpr int kBits = D / 8;

  const uint8_t* from;  // pages of the head, 16 bytes further on for each lane
  uint32_t bits_to;     // where this lane's first 16 bytes go
  uint32_t values_to;
  uint32_t step;  // between two pieces of a lane, which lie 512 bytes apart in the page

  // Values start `values_at` bytes into the slot.
  __device__ __forceinline__ TileCopier(const AttendPool& pool, int head, uint32_t slot, int lane,
                                        uint32_t values_at = kTileTokens * kBits)
      : from(pool.pages + head * pool.head_stride_bytes + 16 * lane),
        bits_to(slot + 16 * lane),
        values_to(bits_to + values_at + (lane >> pool.row_shift) * 16),
        step(512 + (32 >> pool.row_shift) * 16) {
    keep_in_register(from);
    keep_in_register(bits_to);
    keep_in_register(values_to);
    keep_in_register(step);
  }

  // Starts copying 32 rows of page `page` (16 if kSmallPages) from row `row0` on to rows `at` and following.
  template <bool kSmallPages>
  __device__ __forceinline__ void copy_rows(const AttendPool& pool, int page, int row0, int at,
                                            int lane) const {
    constexpr int kRows = kSmallPages ? 16 : 32;
    const uint8_t* rows_from = from + page_offset(page, page_stride(pool), row0 * kBits / 16);
    const uint8_t* values_from =
        rows_from + static_cast<uint32_t>(pool.values_offset_bytes + row0 * (pool.row_bytes - kBits));
    uint32_t to = values_to + at * pool.shared_row_bytes;
    int left = kRows * pool.row_bytes - 16 * lane;
#pragma unroll
    for (int i = 0; i < kRows * kBits; i += 512) {
      copy16_async_if(i + 512 <= kRows * kBits || i + 16 * lane < kRows * kBits, bits_to + at * kBits + i,
                      rows_from + i);
    }
    const auto copy_four = [&] {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        copy16_async_if(left > 512 * i, to + i * step, values_from + 512 * i);
      }
    };
    // The first ones next to those of the bitmaps: the assembler puts three empty loads in front of the
    // copies of each stretch without branches. Whole pieces of the warp are counted: as many in all lanes.
    copy_four();
#pragma unroll 1
    for (int pieces = kRows * pool.row_bytes - 2048; pieces > 0; pieces -= 2048) {
      to += 4 * step;
      values_from += 2048;
      left -= 2048;
      keep_in_register(values_from);  // or each copy adds to it for itself
      copy_four();
    }
  }

  // Starts copying the tile at `token`, nothing if that is at or past `length`. Whole pages (or 32 rows of
  // one) are copied, also rows past the length, which lie inside the page.
  __device__ __forceinline__ void copy(const AttendPool& pool, const TilePages& tile, int page_tokens,
                                       int token, int length, int lane) const {
    if (token < length) {
      if (page_tokens != 16) {
        copy_rows<false>(pool, tile.page[0], token & (page_tokens - 1), 0, lane);
      } else {
#pragma unroll 1
        for (int at = 0; at < kTileTokens && token + at < length; at += 16) {
          copy_rows<true>(pool, at == 0 ? tile.page[0] : tile.page[1], 0, at, lane);
        }
      }
    }
    copy_commit();
  }
};

// The row of a tile that the products take at a position, and the place of its bitmap in the slot: as they
// come.
struct RowOrder {
  static __device__ __forceinline__ int row_of(int position) { return position; }
  static __device__ __forceinline__ int bits_of(int position) { return position; }
};

// A key row. Lane t of a quad takes the channels 32 k + 8 t + (0 to 7), for each k.
template <int D>
struct KeyRow {
  RowBits<D> bits;
  uint32_t before;  // address of the value in front of those of word k
  uint32_t below;   // bits of a word below this lane's
  uint32_t select;  // of this lane's byte
  Scratch& scratch;

  template <typename T>
  __device__ __forceinline__ void next(int k, uint32_t (&pairs)[4]) {
    const uint32_t word = bits.word[k];
    expand8(permute_bytes(word, 0, select), before + 2 * __popc(word & below), scratch, pairs);
    before += 2 * __popc(word);
  }
};

// A value row. The 8 lanes of equal t share it; lane g takes the channels 32 k + 4 g + (0 to 3), for each k:
// that close together, the lanes mostly hit the same words of shared memory or neighbouring ones.
template <int D>
struct ValueRow {
  RowBits<D> bits;
  uint32_t before;  // address of the value in front of those of word k
  uint32_t last;    // address of the row's last value
  uint32_t below;   // bits of a word below this lane's
  int g;
  Scratch& scratch;

  // Address of the value in front of those of the lane's run in word k.
  __device__ __forceinline__ uint32_t start(int k) {
    const uint32_t word = bits.word[k];
    uint32_t address;
    if (k + 1 < D / 32) {
      address = before + 2 * __popc(word & below);
      before += 2 * __popc(word);
    } else {
      address = last - 2 * __popc(word & ~below);  // saves counting the word before
    }
    return address;
  }

  template <typename T, int k>
  __device__ __forceinline__ void next(uint32_t& pair0, uint32_t& pair1) {
    const uint32_t address = start(k);
    expand4<k % 2>(bits.word[k] >> (4 * g), address, scratch, pair0, pair1);
  }

  template <typename T>
  __device__ __forceinline__ void load(uint32_t (&pairs)[D / 16]) {
    load_pairs<T>(*this, pairs);
  }
};

// Two value rows: register j of word k is channel 32 k + 4 g + j of both, the first row's in the low half.
template <int D>
struct ValueRows {
  ValueRow<D> first, second;

  template <typename T>
  __device__ __forceinline__ void next(int k, uint32_t (&pairs)[4]) {
    // The byte with the lane's nibble, of both rows.
    const uint32_t bytes =
        permute_bytes(first.bits.word[k], second.bits.word[k], 0x40u + 0x11u * (first.g >> 1));
    const uint32_t runs = bytes >> 4 * (first.g & 1) & 0x0f0fu;
    expand4_two_rows(runs, first.start(k), second.start(k), first.scratch, pairs);
  }
};

// Uniform pages, as the loop over tiles uses them.
template <int D>
struct UniformPages : RowOrder {
  using Copier = TileCopier<D>;

  // Where the tile is that is copied next.
  struct Next {
    TilePages pages;

    __device__ __forceinline__ Next(const AttendParams&, const PageTable& table, int, int token, int length,
                                    int)
        : pages(table.find(token, length)) {}

    __device__ __forceinline__ void advance(const AttendParams&, const PageTable& table, int, int token,
                                            int length, int) {
      pages = table.find(token, length);
    }

    __device__ __forceinline__ TilePages key() const { return pages; }
    __device__ __forceinline__ TilePages value() const { return pages; }
    __device__ __forceinline__ TilePages scales() const { return pages; }
  };

  // Bytes of a slot. The pages' own distance between rows may be widened, see AttendPool.
  static __device__ __forceinline__ int slot_bytes(const AttendPool& pool, int) {
    return kTileTokens * (D / 8 + pool.shared_row_bytes);
  }

  struct Keys {
    const AttendPool& pool;
    uint32_t slot;
    int t;
    Scratch &even, &odd;  // of rows at even and at odd multiples of eight positions

    __device__ __forceinline__ KeyRow<D> row(int r, bool in_odd) const {
      const uint32_t before = slot + kTileTokens * (D / 8) + r * pool.shared_row_bytes - 2;
      KeyRow<D> row{{}, before, low_bits(8 * t), 0x4440u + t, in_odd ? odd : even};
      row.bits.load(slot + r * (D / 8));
      return row;
    }
  };

  struct Values {
    const AttendPool& pool;
    uint32_t slot;
    int g;
    Scratch &even, &odd;  // of rows at even and at odd multiples of eight positions

    __device__ __forceinline__ ValueRow<D> row(int first, int at) const {
      const int r = first + at;
      const uint32_t before = slot + kTileTokens * (D / 8) + r * pool.shared_row_bytes - 2;
      ValueRow<D> row{{}, before, before + pool.row_bytes, low_bits(4 * g), g, at / 8 % 2 == 0 ? even : odd};
      row.bits.load(slot + r * (D / 8));
      return row;
    }

    __device__ __forceinline__ ValueRows<D> two_rows(int first, int at) const {
      return {row(first, at), row(first, at + 1)};
    }
  };
};

// Makes the rows of a slot whose bit in `visible` is 0 expand to zeros, whatever bytes they hold.
template <int D, typename Pages>
__device__ __forceinline__ void clear_rows(uint32_t slot, uint32_t visible, int lane) {
  if (!(visible >> Pages::row_of(lane) & 1u)) {
#pragma unroll
    for (int i = 0; i < D / 32; ++i) {
      store_shared_u32(slot + Pages::bits_of(lane) * (D / 8) + 4 * i, 0);
    }
  }
  __syncwarp();
}

}  // namespace mustafar
