// Tiles of 32 compressed tokens with 8-bit values. A key slot in shared memory holds the 32 bitmap rows, the
// scales of the 32 keys and those of the values that belong to them, and then the rows of codes; a value slot
// has no scales. ragged_codes.cuh has the slots of ragged pages.
#pragma once

#include "mustafar/codes.cuh"
#include "mustafar/expand_codes.cuh"
#include "mustafar/pages.cuh"

namespace mustafar {

constexpr int kScaleBytes = 2 * kTileTokens;  // of one side of a tile

// Copies the scales of K and of V of a tile, a lane for each 8 rows of a side.
struct ScaleCopier {
  const uint8_t* from;  // scales of page 0
  uint32_t stride;      // of pages, in pieces of 16 bytes
  uint32_t to;

  __device__ __forceinline__ ScaleCopier(const AttendParams& p, int head, uint32_t scales, int lane) {
    const AttendPool& pool = lane < 4 ? p.k : p.v;
    const int in_page = p.sequences.page_tokens == 16 ? lane & 1 : lane & 3;
    from = pool.pages + head * pool.head_stride_bytes + pool.values_offset_bytes -
           2 * p.sequences.page_tokens + 16 * in_page;
    stride = page_stride(pool);
    to = scales + 16 * lane;
    keep_in_register(from);
    keep_in_register(stride);
    keep_in_register(to);
  }

  __device__ __forceinline__ void copy(const TilePages& tile, int page_tokens, int token, int length,
                                       int lane) const {
    const bool second = page_tokens == 16 && (lane & 2) != 0;
    const int page = second ? tile.page[1] : tile.page[0];
    const uint32_t piece = static_cast<uint32_t>(token & (page_tokens - 1)) / 8;
    copy16_async_if(lane < 8 && token + 8 * (lane & 3) < length, to, from + page_offset(page, stride, piece));
  }
};

// Scale of row r, of those at address `scales`.
__device__ __forceinline__ float load_scale(uint32_t scales, int r) {
  return __uint_as_float(load_shared_u16(scales + 2 * r) << 16);
}

// A key row. Lane t of a quad takes the channels 32 k + 8 t + (0 to 7), for each k.
template <int D, typename Codes>
struct CodeKeyRow {
  RowBits<D> bits;
  uint32_t first;  // address of the first code of word k
  uint32_t end;    // address past the row's last code
  uint32_t below;  // bits of a word below this lane's
  const LaneTable& table;
  uint32_t shift;  // 8 t

  __device__ __forceinline__ void next_codes(int k, uint32_t (&codes)[2]) {
    const uint32_t word = bits.word[k];
    uint32_t start;
    if (k + 1 < D / 32) {
      start = first + __popc(word & below);
      first += __popc(word);
    } else {
      start = end - __popc(word & ~below);
    }
    expand_codes8(table, word, shift, start, codes);
  }

  template <typename T>
  __device__ __forceinline__ void next(int k, uint32_t (&pairs)[4]) {
    uint32_t codes[2];
    next_codes(k, codes);
    Codes::pairs(codes[0], pairs[0], pairs[1]);
    Codes::pairs(codes[1], pairs[2], pairs[3]);
  }
};

// How the 8 lanes g that share a value row divide it. The four lower lanes start from its first word and
// count kept channels from the row's first code, the four upper ones start from its last word and count from
// the row's end, so that neither has to count the other's words. Each takes a byte of a word, and of the
// middle word of an odd number of them a nibble.
template <int D>
struct CodeChannels {
  static constexpr int kWords = D / 32;
  static constexpr int kRuns = (kWords + 1) / 2;

  // Whether run `run` is a nibble.
  static constexpr __device__ __forceinline__ bool is_nibble(int run) { return 2 * run + 1 == kWords; }

  static __device__ __forceinline__ int word(int run, int g) { return g < 4 ? run : kWords - 1 - run; }

  // Where the run starts in its word.
  static __device__ __forceinline__ int shift(int run, int g) { return is_nibble(run) ? 4 * g : 8 * (g & 3); }

  // Channel of half `parity` of pair `pair`: codes lie in pairs the wrong way round.
  static __device__ __forceinline__ int of(int pair, int g, int parity) {
    const int run = pair / 4;
    return 32 * word(run, g) + shift(run, g) + 2 * (pair % 4) + (parity ^ 1);
  }
};

template <int D, typename Codes>
struct CodeValueRow {
  using Channels = CodeChannels<D>;

  uint32_t bits;   // address of the row's bitmap
  uint32_t start;  // address of the row's first code; for upper lanes that past its last
  int g;
  const LaneTable& table;

  // The codes of run `run`; a nibble has no second ones. Returns by how much `start` moves for the next run.
  __device__ __forceinline__ int codes_of(int run, uint32_t (&codes)[2]) const {
    const uint32_t word = load_shared_u32(bits + 4 * Channels::word(run, g));
    const uint32_t shift = Channels::shift(run, g);
    const uint32_t below = low_bits(shift);
    // Up from the start, or down from the end.
    const int sign = g < 4 ? 1 : -1;
    const uint32_t address = start + sign * __popc(word & (g < 4 ? below : ~below));
    if (Channels::is_nibble(run)) {
      codes[0] = expand_codes4(table, word, shift, address);
    } else {
      expand_codes8(table, word, shift, address, codes);
    }
    return sign * __popc(word);
  }

  template <typename T, int run = 0>
  __device__ __forceinline__ void load(uint32_t (&all)[D / 16]) {
    uint32_t codes[2];
    const int moved = codes_of(run, codes);
    Codes::pairs(codes[0], all[4 * run], all[4 * run + 1]);
    if constexpr (!Channels::is_nibble(run)) {
      Codes::pairs(codes[1], all[4 * run + 2], all[4 * run + 3]);
    }
    if constexpr (run + 1 < Channels::kRuns) {
      start += moved;
      load<T, run + 1>(all);
    }
  }
};

// Two value rows, as ValueRows.
template <int D, typename Codes>
struct CodeValueRows {
  CodeValueRow<D, Codes> first, second;
  uint32_t first_codes[2], second_codes[2];

  template <typename T>
  __device__ __forceinline__ void next(int k, uint32_t (&pairs)[4]) {
    if (k % 2 == 0) {
      first.start += first.codes_of(k / 2, first_codes);
      second.start += second.codes_of(k / 2, second_codes);
    }
    const uint32_t x = first_codes[k % 2], y = second_codes[k % 2];
    Codes::pairs(permute_bytes(x, y, 0x5140), pairs[0], pairs[1]);
    Codes::pairs(permute_bytes(x, y, 0x7362), pairs[2], pairs[3]);
  }
};

// Uniform pages with codes, as the loop over tiles uses them.
template <int D, typename Codes>
struct CodePages : RowOrder {
  using Copier = TileCopier<D>;
  using Scales = ScaleCopier;
  using Next = typename UniformPages<D>::Next;

  static constexpr int kScalesAt = kTileTokens * (D / 8);
  static constexpr int kKeyCodesAt = kScalesAt + 2 * kScaleBytes;
  static constexpr int kValueCodesAt = kTileTokens * (D / 8);

  static __device__ __forceinline__ int key_slot_bytes(const AttendPool& pool, int) {
    return kKeyCodesAt + kTileTokens * pool.shared_row_bytes;
  }

  static __device__ __forceinline__ int value_slot_bytes(const AttendPool& pool, int) {
    return kValueCodesAt + kTileTokens * pool.shared_row_bytes;
  }

  struct Keys {
    const AttendPool& pool;
    uint32_t slot;
    const LaneTable& table;
    int t;

    __device__ __forceinline__ CodeKeyRow<D, Codes> row(int r, bool) const {
      const uint32_t first = slot + kKeyCodesAt + r * pool.shared_row_bytes;
      CodeKeyRow<D, Codes> row{
          {}, first, first + pool.row_bytes, low_bits(8 * t), table, static_cast<uint32_t>(8 * t)};
      row.bits.load(slot + r * (D / 8));
      return row;
    }
  };

  struct Values {
    const AttendPool& pool;
    uint32_t slot;
    const LaneTable& table;
    int g;

    // Added up in this order, an address takes one instruction for each row.
    __device__ __forceinline__ CodeValueRow<D, Codes> row(int first, int at) const {
      const uint32_t base =
          slot + kValueCodesAt + first * pool.shared_row_bytes + (g < 4 ? 0 : pool.row_bytes);
      return {slot + (first + at) * (D / 8), base + at * pool.shared_row_bytes, g, table};
    }

    __device__ __forceinline__ CodeValueRows<D, Codes> two_rows(int first, int at) const {
      return {row(first, at), row(first, at + 1), {}, {}};
    }
  };
};

}  // namespace mustafar
