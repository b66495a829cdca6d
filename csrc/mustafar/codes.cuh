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

// Elements to codes: the quotients x / scale, rounded.
//
// Division is replaced by multiplication with the reciprocal, which leaves an error of less than 2^-22 of the
// quotient. A quotient is either exactly between two codes, where ties go to the even one, or at least 2^-16
// of itself away from there: in some unit x (11 bits) and scale times midpoint (16 bits) are integers. So it
// is enough that no error is left on midpoints.
struct Int8 {
  float reciprocal;

  // Adding 3/2 * 2^10 rounds to a multiple of 2^-13, which every midpoint is, and adding the rest of
  // 3/2 * 2^23 to an integer, whose two's complement is the low byte.
  __device__ __forceinline__ uint32_t code(float x) const {
    return __float_as_uint(fmaf(x, reciprocal, 1536.0f) + (12582912.0f - 1536.0f));
  }

  // Codes of a pair of elements, in the low bytes.
  __device__ __forceinline__ uint2 codes(float low, float high, uint32_t) const {
    return make_uint2(code(low), code(high));
  }
};

struct E4m3 {
  float reciprocal;
  float scale;

  // Without its sign; bits from 7 on mean nothing.
  __device__ __forceinline__ uint32_t code(float x) const {
    const float near = x * reciprocal;
    const float q = fmaf(fmaf(near, scale, -x), -reciprocal, near);  // exact if a float can be
    // Adds a number whose unit in the last place is the step from code to code around q. Then the lowest bits
    // of the sum count steps; of the exponent, the low 4 bits belong above them. 24 is what makes up for the
    // biases of the exponents. Below 2^-6 the step stays the same.
    const uint32_t exponent = max(__float_as_uint(q) & 0x7F800000u, 121u << 23);
    const uint32_t rounding = exponent + (20u << 23) + 24u;
    return __float_as_uint(fabsf(q) + __uint_as_float(rounding)) + (rounding >> 20);
  }

  // `pair` is what the elements are made from, two values of 16 bits, and has their signs.
  __device__ __forceinline__ uint2 codes(float low, float high, uint32_t pair) const {
    const uint32_t magnitudes = __byte_perm(code(low), code(high), 0x4440);
    const uint32_t both = bit_select(0x7F7Fu, magnitudes, __byte_perm(pair, 0, 0x4431));
    return make_uint2(both, both >> 8);
  }
};

// A warp's stage where codes are made: those of kTile rows, shifted by up to 15 to line up with their place
// in the page, and behind them the 16-bit values of the rows that are encoded next. Sizes in values of 16
// bits.
template <int kDim, int kTile>
struct CodeStage {
  static constexpr int kRowsAt = (kTile * kDim + 16) / 2;
  static constexpr int kRow = kDim + 8;  // an odd number of 16 bytes: rows start in different banks
  static constexpr int kSize = kRowsAt + Lanes<kDim>::kRows * kRow;
};

// The largest magnitude, as a pattern, of a row of `count` values. They start on 4 bytes and a zero comes
// after them. Lane t of the row's kPerRow looks at every kPerRow-th pair; the whole warp calls.
template <int kPerRow>
__device__ __forceinline__ uint16_t largest_magnitude(const uint16_t* values, int count, int t) {
  const uint32_t* pairs = reinterpret_cast<const uint32_t*>(values) + t;
  uint32_t low = 0;  // patterns without their signs order as magnitudes
  uint32_t high = 0;
#pragma unroll 1
  for (int left = count - 2 * t; left > 0; left -= 2 * kPerRow) {
    const uint32_t pair = *pairs;
    low = max(low, pair & 0x7FFFu);
    high = max(high, pair & 0x7FFF7FFFu);
    pairs += kPerRow;
  }
  uint32_t largest = max(low, high >> 16);
#pragma unroll
  for (int offset = 1; offset < kPerRow; offset *= 2) {
    largest = max(largest, __shfl_xor_sync(kFullWarp, largest, offset));
  }
  return static_cast<uint16_t>(largest);
}

// Encodes the row's values times `up`; under a mask of 0 all are 0. Lanes as above.
template <typename T, int kPerRow, typename Encoder>
__device__ __forceinline__ void encode_values(uint8_t* codes, const uint16_t* values, int count, int t,
                                              uint32_t mask, float up, const Encoder& encoder) {
  const uint32_t* pairs = reinterpret_cast<const uint32_t*>(values) + t;
  codes += 2 * t;
#pragma unroll 1
  for (int left = count - 2 * t; left > 0; left -= 2 * kPerRow) {
    const uint32_t pair = *pairs & mask;
    const float low = T::to_float(static_cast<uint16_t>(pair)) * up;
    const float high = T::to_float(static_cast<uint16_t>(pair >> 16)) * up;
    const uint2 both = encoder.codes(low, high, pair);
    codes[0] = static_cast<uint8_t>(both.x);
    if (left > 1) {
      codes[1] = static_cast<uint8_t>(both.y);
    }
    pairs += kPerRow;
    codes += 2 * kPerRow;
  }
}

// Turns a row of `count` values of type T into codes and returns the pattern of its scale. Values and lanes
// as above.
template <typename T, int kPerRow>
__device__ __forceinline__ uint16_t encode_row(uint8_t* codes, const uint16_t* values, int count,
                                               int32_t value_type, int t) {
  const float largest = T::to_float(largest_magnitude<kPerRow>(values, count, t));
  const uint16_t bits = scale_for(largest, value_type);
  const float scale = bf16::to_float(bits);
  const bool zero = !(scale > 0.0f);  // a row of zeros, or one that is NaN
  const uint32_t mask = zero ? 0 : 0xFFFFFFFFu;
  // The reciprocal of a small scale would be infinite. Those of f16 are 2^-33 or more.
  const float up = T::kCode == kBf16 && scale < 0x1p-100f ? 0x1p64f : 1.0f;
  const float divisor = zero ? 1.0f : scale * up;
  if (value_type == kE4m3) {
    encode_values<T, kPerRow>(codes, values, count, t, mask, up, E4m3{1.0f / divisor, divisor});
  } else {
    encode_values<T, kPerRow>(codes, values, count, t, mask, up, Int8{1.0f / divisor});
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
