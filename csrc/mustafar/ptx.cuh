// Every instruction that C++ cannot express, one function each and nothing else. The host emulation
// (tests/emulation/host) has a second version of this file, so that the kernels themselves run on both.
#pragma once

#include <stdint.h>

namespace mustafar {

// ---- Bits ----

// Bits of `a` under the mask, bits of `b` elsewhere. The compiler takes two instructions when the mask is a
// constant.
__device__ __forceinline__ uint32_t bit_select(uint32_t mask, uint32_t a, uint32_t b) {
  uint32_t selected;
  asm("lop3.b32 %0, %1, %2, %3, 0xCA;" : "=r"(selected) : "r"(mask), "r"(a), "r"(b));
  return selected;
}

// ---- Shared memory ----

__device__ __forceinline__ uint32_t shared_address(const void* pointer) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

// If `keep` is not 0, writes the low 16 bits of `value` and moves the address past them. As C++ the
// conditional step costs a move on top of the addition.
__device__ __forceinline__ void append_shared_u16(uint32_t keep, uint32_t& address, uint32_t value) {
  asm volatile(
      "{\n"
      ".reg .pred p;\n"
      "setp.ne.u32 p, %1, 0;\n"
      "@p st.shared.u16 [%0], %2;\n"
      "@p add.u32 %0, %0, 2;\n"
      "}"
      : "+r"(address)
      : "r"(keep), "r"(value)
      : "memory");
}

// ---- Conversion ----

// Rounds to nearest even and packs, `low` in the low half.
__device__ __forceinline__ uint32_t pack_f16x2(float low, float high) {
  uint32_t packed;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(high), "f"(low));
  return packed;
}

__device__ __forceinline__ uint32_t pack_bf16x2(float low, float high) {
  uint32_t packed;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(high), "f"(low));
  return packed;
}

__device__ __forceinline__ float f16_to_float(uint16_t bits) {
  float value;
  asm("cvt.f32.f16 %0, %1;" : "=f"(value) : "h"(bits));
  return value;
}

}  // namespace mustafar
