// Rows of a bitmap in registers, and where the values of a run of channels start.
#pragma once

#include "mustafar/ptx.cuh"

namespace mustafar {

// The bitmap of one row: bit c % 32 of word c / 32 is channel c.
template <int D>
struct RowBits {
  uint32_t word[D / 32];

  // `address` is in shared memory, aligned to the largest power of two that divides the row (at most 16
  // bytes).
  __device__ __forceinline__ void load(uint32_t address) {
    if constexpr (D % 128 == 0) {
#pragma unroll
      for (int i = 0; i < D / 128; ++i) {
        const uint4 v = load_shared_v4(address + 16 * i);
        word[4 * i] = v.x;
        word[4 * i + 1] = v.y;
        word[4 * i + 2] = v.z;
        word[4 * i + 3] = v.w;
      }
    } else if constexpr (D % 64 == 0) {
#pragma unroll
      for (int i = 0; i < D / 64; ++i) {
        const uint2 v = load_shared_v2(address + 8 * i);
        word[2 * i] = v.x;
        word[2 * i + 1] = v.y;
      }
    } else {
#pragma unroll
      for (int i = 0; i < D / 32; ++i) {
        word[i] = load_shared_u32(address + 4 * i);
      }
    }
  }
};

// The lowest `count` bits, 0 to 32.
__device__ __forceinline__ uint32_t low_bits(int count) {
  return count >= 32 ? 0xffffffffu : (1u << count) - 1u;
}

}  // namespace mustafar
