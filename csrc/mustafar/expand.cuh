// From bitmap and packed values to register pairs, without a dense copy in memory.
//
// One run is 8 or 4 consecutive channels of a row: a byte or nibble of the bitmap and the address of the
// first value at or after the run. Pair j of a run holds channels 2j and 2j + 1.
//
// How: one multiplication spreads the bits of the run so that each lands in a byte of its own; from there a
// dot product with byte weights gives the address of any value, and one multiply-subtract gives the byte
// selectors of two pairs at once. Only the loads are predicated (a lane that loads nothing causes no bank
// conflict), nothing branches, and the work is shared between the integer and the multiply pipes. See
// docs/performance.md for the counts.
#pragma once

#include "mustafar/ptx.cuh"

namespace mustafar {

// Where values are loaded to. The registers start at zero and are reused: what a channel leaves behind is
// never selected by another, so clearing them between runs would be waste.
struct Scratch {
  uint32_t low[4];
  uint32_t high[4];

  __device__ __forceinline__ void init() {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      low[i] = high[i] = 0;
    }
  }
};

// Selectors of two pairs, one in each half of the result. `bits` has a 2 in each byte whose channel is kept;
// bytes 0 and 2 belong to the low halves of the pairs. Bytes 2, 3, 6, 7 of two loaded values are zero, so 22
// and 66 pick zeros and 22 - 12 = 10, 66 - 12 = 54 the values (all hexadecimal; 12 is 9 * 2).
__device__ __forceinline__ uint32_t pair_selectors(uint32_t bits) { return 0x66226622u - 9u * bits; }

// Expands the four channels of bits 0 to 3 of `run`; channel 2j is in the LOW half of pair j. `before` is the
// address of the value in front of the run's first. kHalf chooses the scratch registers.
template <int kHalf>
__device__ __forceinline__ void expand4(uint32_t run, uint32_t before, Scratch& scratch, uint32_t& pair0,
                                        uint32_t& pair1) {
  // The four copies of the nibble do not overlap; bit i lands on bit 1 of byte i.
  const uint32_t bits = (run & 0xfu) * 0x00408102u & 0x02020202u;
  const uint32_t at0 = __dp4a(bits, 0x00000001u, before);  // before + 2 * kept(channel 0)
  const uint32_t at1 = __dp4a(bits, 0x00010101u, before);  // before + 2 * kept(channels 0 to 2)
  uint32_t* low = scratch.low + 2 * kHalf;
  uint32_t* high = scratch.high + 2 * kHalf;
  load_shared_u16_if<0>(run, low[0], at0);
  load_shared_u16_if<1>(run, high[0], at0 + 2);
  load_shared_u16_if<2>(run, low[1], at1);
  load_shared_u16_if<3>(run, high[1], at1 + 2);
  const uint32_t select = pair_selectors(bits);
  pair0 = permute_bytes(low[0], high[0], select);
  pair1 = permute_bytes(low[1], high[1], select >> 16);
}

// Expands four channels of two rows: pair j holds channel j, of the first row in the low half. Bits 0 to 3 of
// `runs` belong to the first row and bits 8 to 11 to the second, the other bits are 0. `first` and `second`
// are the addresses of the values in front of the runs' first.
__device__ __forceinline__ void expand4_two_rows(uint32_t runs, uint32_t first, uint32_t second,
                                                 Scratch& scratch, uint32_t (&pairs)[4]) {
  // Bit 0 of both rows, bit 1 of both, then bits 2 and 3: each on bit 1 of a byte.
  const uint32_t spread = runs * 0x00010002u;
  const uint32_t bits0 = spread & 0x02020202u;
  const uint32_t bits2 = spread >> 2 & 0x02020202u;
  const uint32_t first1 = __dp4a(bits0, 0x00010001u, first);  // first + 2 * kept(channels 0 and 1)
  const uint32_t first3 = __dp4a(bits2, 0x00000001u, first1);
  const uint32_t second1 = __dp4a(bits0, 0x01000100u, second);
  const uint32_t second3 = __dp4a(bits2, 0x00000100u, second1);
  load_shared_u16_if<0>(runs, scratch.low[0], first + 2);
  load_shared_u16_if<1>(runs, scratch.low[1], first1);
  load_shared_u16_if<2>(runs, scratch.low[2], first1 + 2);
  load_shared_u16_if<3>(runs, scratch.low[3], first3 + 2);
  load_shared_u16_if<8>(runs, scratch.high[0], second + 2);
  load_shared_u16_if<9>(runs, scratch.high[1], second1);
  load_shared_u16_if<10>(runs, scratch.high[2], second1 + 2);
  load_shared_u16_if<11>(runs, scratch.high[3], second3 + 2);
  const uint32_t select0 = pair_selectors(bits0), select2 = pair_selectors(bits2);
  pairs[0] = permute_bytes(scratch.low[0], scratch.high[0], select0);
  pairs[1] = permute_bytes(scratch.low[1], scratch.high[1], select0 >> 16);
  pairs[2] = permute_bytes(scratch.low[2], scratch.high[2], select2);
  pairs[3] = permute_bytes(scratch.low[3], scratch.high[3], select2 >> 16);
}

// One half of expand8: channels 4 kHalf to 4 kHalf + 3. `bits` has the first of them in byte 3.
template <int kHalf>
__device__ __forceinline__ void expand8_half(uint32_t run, uint32_t bits, uint32_t before, Scratch& scratch,
                                             uint32_t& pair0, uint32_t& pair1) {
  const uint32_t at0 = __dp4a(bits, 0x01000000u, before);
  const uint32_t at1 = __dp4a(bits, 0x01010100u, before);
  uint32_t* low = scratch.low + 2 * kHalf;
  uint32_t* high = scratch.high + 2 * kHalf;
  load_shared_u16_if<4 * kHalf>(run, high[0], at0);
  load_shared_u16_if<4 * kHalf + 1>(run, low[0], at0 + 2);
  load_shared_u16_if<4 * kHalf + 2>(run, high[1], at1);
  load_shared_u16_if<4 * kHalf + 3>(run, low[1], at1 + 2);
  const uint32_t select = pair_selectors(bits);
  pair0 = permute_bytes(low[0], high[0], select >> 16);
  pair1 = permute_bytes(low[1], high[1], select);
}

// Expands eight channels; `run` is below 256. Channel 2j is in the HIGH half of pair j: one multiplication
// serves all eight bits only in reverse order, where the four copies of the byte are 9 apart and do not
// overlap.
__device__ __forceinline__ void expand8(uint32_t run, uint32_t before, Scratch& scratch,
                                        uint32_t (&pairs)[4]) {
  const uint32_t spread = run * 0x08040201u;  // bits 3 - i and 7 - i of the run on bits 3 and 7 of byte i
  const uint32_t first = (spread >> 2) & 0x02020202u;
  const uint32_t second = (spread >> 6) & 0x02020202u;
  expand8_half<0>(run, first, before, scratch, pairs[0], pairs[1]);
  expand8_half<1>(run, second, __dp4a(first, 0x01010101u, before), scratch, pairs[2], pairs[3]);
}

// All pairs of a lane in a value row that gives two after the other.
template <typename T, int k = 0, typename Row, int kPairs>
__device__ __forceinline__ void load_pairs(Row& row, uint32_t (&pairs)[kPairs]) {
  row.template next<T, k>(pairs[2 * k], pairs[2 * k + 1]);
  if constexpr (2 * k + 2 < kPairs) {
    load_pairs<T, k + 1>(row, pairs);
  }
}

}  // namespace mustafar
