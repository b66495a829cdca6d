// 8-bit values: the scale of a row and its codes, to the bit as docs/format.md defines them.
#pragma once

#include "mustafar/lanes.cuh"

namespace mustafar {

__device__ __forceinline__ bool has_codes(int32_t value_type) { return value_type >= kE4m3; }

// The bfloat16 pattern of the scale of a row with this largest magnitude.
__device__ __forceinline__ uint16_t scale_for(float largest, int32_t value_type) {
  const uint32_t quotient = __float_as_uint(largest / (value_type == kE4m3 ? 448.0f : 127.0f));
  // Infinity and NaN have the largest exponent. All others are rounded up.
  return static_cast<uint16_t>(quotient >= 0x7F800000u ? 0x7FC0u : (quotient + 0xFFFFu) >> 16);
}

// The code of an element of a row with this scale.
__device__ __forceinline__ uint8_t encode(float x, float scale, int32_t value_type) {
  if (!(scale > 0.0f)) {
    return 0;  // a row of zeros, or one that is NaN
  }
  const float q = x / scale;
  if (value_type != kE4m3) {
    // Adding 1.5 * 2^23 rounds to an integer, ties to even, whose two's complement is then the low byte.
    return static_cast<uint8_t>(__float_as_uint(q + 12582912.0f));
  }
  const uint32_t bits = __float_as_uint(q) & 0x7FFFFFFFu;
  // Below 2^-6 codes are multiples of 2^-9, which is the unit in the last place of floats around 2^14.
  const uint32_t subnormal = __float_as_uint(__uint_as_float(bits) + 16384.0f) - 0x46800000u;
  // Elsewhere 20 of the fraction's 23 bits are rounded away, and the exponent's bias shrinks by 120.
  const uint32_t normal = ((bits + 0x7FFFFu + (bits >> 20 & 1)) >> 20) - (120u << 3);
  const uint32_t magnitude = bits < 0x3C800000u ? subnormal : normal;
  return static_cast<uint8_t>(magnitude | (__float_as_uint(q) >> 24 & 0x80u));
}

// In a stage whose codes take the place of the 16-bit values they are made from: values that come before
// them, so that no code, whatever the shift of its run, is written where a value is still to be read.
constexpr int kCodeRoom = 8;

// Turns a row of `count` values of type T into codes and returns the pattern of its scale. By a whole warp.
template <typename T>
__device__ __forceinline__ uint16_t encode_row(uint8_t* codes, const uint16_t* values, int count,
                                               int32_t value_type, int lane) {
  uint32_t largest = 0;  // patterns without their signs order as magnitudes
#pragma unroll 1
  for (int i = lane; i < count; i += 32) {
    largest = max(largest, values[i] & 0x7FFFu);
  }
#pragma unroll
  for (int offset = 16; offset > 0; offset /= 2) {
    largest = max(largest, __shfl_xor_sync(kFullWarp, largest, offset));
  }
  const uint16_t bits = scale_for(T::to_float(static_cast<uint16_t>(largest)), value_type);
  const float scale = bf16::to_float(bits);
#pragma unroll 1
  for (int first = 0; first < count; first += 32) {
    const int i = first + lane;
    const float x = i < count ? T::to_float(values[i]) : 0.0f;
    __syncwarp();  // codes may be written where other lanes have read
    if (i < count) {
      codes[i] = encode(x, scale, value_type);
    }
  }
  return bits;
}

// 1/256 of the number of an e4m3 code as an f16: exponent and fraction move to their place in an f16, whose
// exponent has a bias larger by 8.
__device__ __forceinline__ uint32_t e4m3_as_f16(uint32_t code) {
  const uint32_t magnitude = (code & 0x7Fu) << 7;
  const uint32_t nan = magnitude > 0x3F00u ? 0x7C00u : 0;
  return magnitude | nan | (code & 0x80u) << 8;
}

// As unpack_chunks, of codes: the numbers they stand for as f16 pairs, to be multiplied by code_unit.
template <int kDim>
__device__ __forceinline__ void unpack_codes(uint32_t (&words)[Lanes<kDim>::kWords], uint32_t kept,
                                             uint32_t starts, const uint8_t* row_codes, int32_t value_type) {
#pragma unroll
  for (int i = 0; i < Lanes<kDim>::kChunks; ++i) {
    const uint8_t* next = row_codes + ((starts >> (8 * i)) & 0xFF);
#pragma unroll
    for (int j = 0; j < 8; j += 2) {
      uint32_t low = 0;
      uint32_t high = 0;
      if (kept & 1u << (8 * i + j)) {
        low = *next++;
      }
      if (kept & 2u << (8 * i + j)) {
        high = *next++;
      }
      words[4 * i + j / 2] = value_type == kE4m3 ? e4m3_as_f16(low) | e4m3_as_f16(high) << 16
                                                 : pack_f16x2(static_cast<float>(static_cast<int8_t>(low)),
                                                              static_cast<float>(static_cast<int8_t>(high)));
    }
  }
}

__device__ __forceinline__ float code_unit(int32_t value_type) { return value_type == kE4m3 ? 256.0f : 1.0f; }

}  // namespace mustafar
