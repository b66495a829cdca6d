// The 16-bit value types, as tags, and conversion between them and float.
#pragma once

#include "mustafar/params.h"
#include "mustafar/ptx.cuh"

namespace mustafar {

// Two floats rounded to nearest even and packed, `low` in the low half.
struct f16 {
  static constexpr int32_t kCode = kF16;
  static __device__ __forceinline__ uint32_t pack(float low, float high) { return pack_f16x2(low, high); }
  static __device__ __forceinline__ float to_float(uint16_t bits) { return f16_to_float(bits); }
};

struct bf16 {
  static constexpr int32_t kCode = kBf16;
  static __device__ __forceinline__ uint32_t pack(float low, float high) { return pack_bf16x2(low, high); }
  static __device__ __forceinline__ float to_float(uint16_t bits) {
    return __uint_as_float(static_cast<uint32_t>(bits) << 16);
  }
};

// Element `index` of an array whose type is known at run time only.
__device__ __forceinline__ float load_as_float(const void* base, int64_t index, int32_t dtype) {
  if (dtype == kF32) {
    return static_cast<const float*>(base)[index];
  }
  const uint16_t bits = static_cast<const uint16_t*>(base)[index];
  return dtype == kF16 ? f16::to_float(bits) : bf16::to_float(bits);
}

__device__ __forceinline__ void store_from_float(void* base, int64_t index, int32_t dtype, float value) {
  if (dtype == kF32) {
    static_cast<float*>(base)[index] = value;
    return;
  }
  const uint32_t bits = dtype == kF16 ? f16::pack(value, 0.0f) : bf16::pack(value, 0.0f);
  static_cast<uint16_t*>(base)[index] = static_cast<uint16_t>(bits);
}

}  // namespace mustafar
