// Subtracting a key centre from the values of a row, and adding it back.
#pragma once

#include "mustafar/lanes.cuh"

namespace mustafar {

// Two floats to a pair of 16-bit values, nearest even. A NaN becomes the type's canonical one, as on the CPU:
// what the conversion instruction makes of it is another pattern.
template <typename T>
__device__ __forceinline__ uint32_t narrow_pair(float low, float high) {
  constexpr uint32_t kNan = T::kCode == kF16 ? 0x7E00u : 0x7FC0u;
  uint32_t pair = T::pack(low, high);
  pair = low != low ? (pair & 0xFFFF0000u) | kNan : pair;
  return high != high ? (pair & 0x0000FFFFu) | kNan << 16 : pair;
}

// round16(x - c). `center` points at the centre of the lane's first chunk.
template <typename T, int kDim>
__device__ __forceinline__ void subtract_center(uint32_t (&words)[Lanes<kDim>::kWords], const float* center) {
#pragma unroll
  for (int m = 0; m < Lanes<kDim>::kWords; ++m) {
    const float* c = center + (m / 4) * Lanes<kDim>::kStep + (m % 4) * 2;
    words[m] = narrow_pair<T>(T::to_float(static_cast<uint16_t>(words[m])) - c[0],
                              T::to_float(static_cast<uint16_t>(words[m] >> 16)) - c[1]);
  }
}

}  // namespace mustafar
