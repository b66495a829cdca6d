// csrc/mustafar/ptx.cuh for the host: what each instruction does, lane by lane.
#pragma once

#include "cuda.h"

namespace mustafar {

// ---- Bits ----

inline uint32_t bit_select(uint32_t mask, uint32_t a, uint32_t b) { return (a & mask) | (b & ~mask); }

// ---- Shared memory: the program is not position-independent, so that static arrays lie below 4 GiB ----

inline uint32_t shared_address(const void* pointer) {
  const uintptr_t address = reinterpret_cast<uintptr_t>(pointer);
  if (address >> 32 != 0) emulation::fail("%p is not shared memory", pointer);
  return static_cast<uint32_t>(address);
}

inline void append_shared_u16(uint32_t keep, uint32_t& address, uint32_t value) {
  if (keep != 0) {
    *reinterpret_cast<uint16_t*>(static_cast<uintptr_t>(address)) = static_cast<uint16_t>(value);
    address += 2;
  }
}

// ---- Conversion ----

// Rounds the magnitude `scaled`, an integer in units of the last place, to nearest even. Exact: doubles hold
// more bits than float and both 16-bit types together.
inline uint32_t round_even(double scaled) {
  const double floor = std::floor(scaled);
  const double rest = scaled - floor;
  const uint32_t below = static_cast<uint32_t>(floor);
  return below + (rest > 0.5 || (rest == 0.5 && (below & 1)) ? 1 : 0);
}

inline uint16_t f16_from_float(float x) {
  const uint16_t sign = static_cast<uint16_t>(__float_as_uint(x) >> 16 & 0x8000);
  if (x != x) return 0x7FFF;  // what the GPU's conversion gives
  const double magnitude = std::fabs(static_cast<double>(x));
  if (magnitude >= 65520.0) return sign | 0x7C00;
  const int exponent = magnitude == 0 ? -14 : std::max(std::ilogb(magnitude), -14);
  const uint32_t units = round_even(std::ldexp(magnitude, 10 - exponent));
  // A normal number has 2^10 units or more, which adds the 1 that its exponent field lacks here.
  const uint32_t field = static_cast<uint32_t>(exponent + 14) << 10;
  return static_cast<uint16_t>(sign | (field + units));
}

inline uint16_t bf16_from_float(float x) {
  if (x != x) return 0x7FFF;
  const uint32_t bits = __float_as_uint(x);
  return static_cast<uint16_t>((bits + 0x7FFF + (bits >> 16 & 1)) >> 16);
}

inline uint32_t pack_f16x2(float low, float high) {
  return f16_from_float(low) | static_cast<uint32_t>(f16_from_float(high)) << 16;
}

inline uint32_t pack_bf16x2(float low, float high) {
  return bf16_from_float(low) | static_cast<uint32_t>(bf16_from_float(high)) << 16;
}

inline float f16_to_float(uint16_t bits) {
  const int exponent = bits >> 10 & 0x1F;
  const int fraction = bits & 0x3FF;
  const uint32_t sign = static_cast<uint32_t>(bits & 0x8000) << 16;
  if (exponent == 31) return __uint_as_float(fraction != 0 ? 0x7FFFFFFFu : sign | 0x7F800000u);
  const float magnitude = exponent == 0 ? std::ldexp(static_cast<float>(fraction), -24)
                                        : std::ldexp(static_cast<float>(fraction + 1024), exponent - 25);
  return __uint_as_float(sign | __float_as_uint(magnitude));
}

}  // namespace mustafar
