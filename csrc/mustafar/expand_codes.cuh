// From bitmap and packed codes (values of 8 bits) to register pairs, without a dense copy in memory.
//
// A table in shared memory with one entry for each nibble of a bitmap says which of the next bytes belong to
// its four channels.
#pragma once

#include "mustafar/params.h"
#include "mustafar/ptx.cuh"

namespace mustafar {

// Entry of a nibble.
struct __align__(8) CodeEntry {
  uint32_t select;  // for permute_bytes: the codes of channels 1, 0, 3, 2, or zero, in bytes 0 to 3
  uint32_t bits;    // that the codes take
};

constexpr int kCodeEntries = 16;

// `low` serves the lower nibbles of bytes; its 16 entries lie in different banks, so that looking them up
// never conflicts. `high` has the selectors of the upper nibbles once for each lane, in a bank of its own: as
// far apart as the upper nibble of a byte is worth where the lower one counts entries of `low`, so that both
// addresses come from one shift.
struct __align__(128) CodeTable {
  CodeEntry low[kCodeEntries];
  uint32_t high[kCodeEntries][32];

  __device__ __forceinline__ void fill(int thread, int threads) {
    for (int i = thread; i < 32 * kCodeEntries; i += threads) {
      const CodeEntry entry = entry_of(i / 32);
      high[i / 32][i % 32] = entry.select;
      if (i % 32 == 0) {
        low[i / 32] = entry;
      }
    }
  }

  static __device__ __forceinline__ CodeEntry entry_of(uint32_t nibble) {
    CodeEntry entry = {0, 0};
    for (uint32_t channel = 0; channel < 4; ++channel) {
      const bool kept = nibble >> channel & 1u;
      entry.select |= (kept ? entry.bits / 8 : 4u) << 4 * (channel ^ 1u);
      entry.bits += kept ? 8 : 0;
    }
    return entry;
  }
};

// A lane's view of the table.
struct LaneTable {
  uint32_t low;
  uint32_t column;  // of `high`, in bytes

  __device__ __forceinline__ LaneTable(const CodeTable& table, int lane)
      : low(shared_address(&table)), column(4 * lane) {}

  // The bits of `word` from `shift` on, so that the first four count entries of `low`.
  static __device__ __forceinline__ uint32_t index(uint32_t word, uint32_t shift) {
    return __funnelshift_r(word, word, shift - 3);
  }

  __device__ __forceinline__ uint32_t lower(uint32_t index) const { return low + (index & 0x78u); }

  __device__ __forceinline__ uint32_t upper(uint32_t index) const {
    return low + sizeof(CodeEntry) * kCodeEntries + ((index & 0x780u) | column);
  }
};

// The bytes from any address on, as many words as wanted.
template <int kWords>
__device__ __forceinline__ void load_bytes(uint32_t address, uint32_t (&bytes)[kWords]) {
  const uint32_t aligned = address & ~3u;
  uint32_t words[kWords + 1];
#pragma unroll
  for (int i = 0; i <= kWords; ++i) {
    words[i] = load_shared_u32(aligned + 4 * i);
  }
#pragma unroll
  for (int i = 0; i < kWords; ++i) {
    bytes[i] = extract_bytes(words[i], words[i + 1], address);
  }
}

// The codes of four channels, a nibble of a bitmap at bit `shift` of `word`; the first one lies at `address`.
__device__ __forceinline__ uint32_t expand_codes4(const LaneTable& table, uint32_t word, uint32_t shift,
                                                  uint32_t address) {
  const uint32_t select = load_shared_u32(table.lower(LaneTable::index(word, shift)));
  uint32_t bytes[1];
  load_bytes(address, bytes);
  return permute_bytes(bytes[0], 0, select);
}

// As expand_codes4, of eight channels.
__device__ __forceinline__ void expand_codes8(const LaneTable& table, uint32_t word, uint32_t shift,
                                              uint32_t address, uint32_t (&codes)[2]) {
  const uint32_t index = LaneTable::index(word, shift);
  const uint2 first = load_shared_v2(table.lower(index));
  const uint32_t second = load_shared_u32(table.upper(index));
  uint32_t bytes[2];
  load_bytes(address, bytes);
  codes[0] = permute_bytes(bytes[0], 0, first.x);
  codes[1] = permute_bytes(__funnelshift_rc(bytes[0], bytes[1], first.y), 0, second);
}

// How codes become f16 pairs: kUnit times the difference of a pair's numbers and kBias is what the codes
// stand for. With kInteger, keys need not: they can be multiplied as they are.
struct E4m3Operand {
  static constexpr int32_t kCode = kE4m3;
  static constexpr bool kInteger = false;
  static constexpr float kUnit = kE4m3Unit;
  static constexpr float kBias = 0.0f;

  static __device__ __forceinline__ void pairs(uint32_t codes, uint32_t& pair0, uint32_t& pair1) {
    e4m3_to_f16(codes, pair0, pair1);
  }
};

// The integers from 0 to 255 as subnormal f16.
struct Int8Operand {
  static constexpr int32_t kCode = kInt8;
  static constexpr bool kInteger = true;
  static constexpr float kUnit = 16777216.0f;
  static constexpr float kBias = 128.0f / kUnit;

  static __device__ __forceinline__ void pairs(uint32_t codes, uint32_t& pair0, uint32_t& pair1) {
    const uint32_t unsigned_codes = codes ^ 0x80808080u;
    pair0 = permute_bytes(unsigned_codes, 0, 0x4140);
    pair1 = permute_bytes(unsigned_codes, 0, 0x4342);
  }
};

}  // namespace mustafar
