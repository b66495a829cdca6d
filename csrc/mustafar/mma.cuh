// The matrix product of a warp for each value type; layouts in ptx.cuh.
#pragma once

#include "mustafar/dtype.cuh"

namespace mustafar {

template <typename T>
__device__ __forceinline__ void mma_16x8x16(float (&c)[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3,
                                            uint32_t b0, uint32_t b1) {
  if constexpr (T::kCode == kF16) {
    mma_f16(c, a0, a1, a2, a3, b0, b1);
  } else {
    static_assert(T::kCode == kBf16, "one matrix instruction per value type");
    mma_bf16(c, a0, a1, a2, a3, b0, b1);
  }
}

}  // namespace mustafar
