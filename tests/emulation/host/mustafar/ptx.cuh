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

constexpr float kE4m3Unit = 1.0f;

inline uint16_t e4m3_to_f16(uint32_t code) {
  const int exponent = code >> 3 & 0xF;
  const int fraction = code & 7;
  const float magnitude = (code & 0x7F) == 0x7F ? __uint_as_float(0x7FFFFFFFu)
                          : exponent == 0       ? std::ldexp(static_cast<float>(fraction), -9)
                                                : std::ldexp(static_cast<float>(fraction + 8), exponent - 10);
  return f16_from_float(code & 0x80 ? -magnitude : magnitude);
}

inline void e4m3_to_f16(uint32_t codes, uint32_t& pair0, uint32_t& pair1) {
  pair0 = e4m3_to_f16(codes & 0xFF) | static_cast<uint32_t>(e4m3_to_f16(codes >> 8 & 0xFF)) << 16;
  pair1 = e4m3_to_f16(codes >> 16 & 0xFF) | static_cast<uint32_t>(e4m3_to_f16(codes >> 24)) << 16;
}

// ---- Shared memory, by 32-bit address ----

#define MST_DYNAMIC_SHARED(name) uint4* const name = reinterpret_cast<uint4*>(emulation::dynamic_shared())

template <typename T>
T& shared(uint32_t address) {
  return *reinterpret_cast<T*>(static_cast<uintptr_t>(address));
}

inline uint32_t load_shared_u32(uint32_t address) { return shared<uint32_t>(address); }
inline uint32_t load_shared_u16(uint32_t address) { return shared<uint16_t>(address); }
inline uint2 load_shared_v2(uint32_t address) { return shared<uint2>(address); }
inline uint4 load_shared_v4(uint32_t address) { return shared<uint4>(address); }
inline void store_shared_u32(uint32_t address, uint32_t value) { shared<uint32_t>(address) = value; }
inline void store_shared_v2(uint32_t address, uint2 value) { shared<uint2>(address) = value; }

template <int kBit>
void load_shared_u16_if(uint32_t mask, uint32_t& value, uint32_t address) {
  if (mask & 1u << kBit) {
    value = shared<uint16_t>(address);
  }
}

// ---- Asynchronous copies ----

inline void copy16_async(uint32_t destination, const uint8_t* source) {
  if (reinterpret_cast<uintptr_t>(source) % 16 != 0 || destination % 16 != 0) {
    emulation::fail("copy16_async: addresses are not multiples of 16");
  }
  emulation::copy_async(&shared<uint8_t>(destination), source, 16);
}
inline void copy16_async_if(bool wanted, uint32_t destination, const uint8_t* source) {
  if (wanted) {
    copy16_async(destination, source);
  }
}
// Reads the byte, so that an address outside every buffer is noticed.
inline void prefetch_l2(const void* address) {
  static_cast<void>(*static_cast<const volatile uint8_t*>(address));
}
inline void copy_commit() { emulation::commit_copies(); }
template <int kPending>
void copy_wait() {
  emulation::wait_copies(kPending);
}

// ---- Matrices of a warp: fragments as in csrc/mustafar/ptx.cuh ----

template <float (*kToFloat)(uint16_t)>
void mma(const char* op, float (&c)[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint32_t b0,
         uint32_t b1) {
  const emulation::Met& all = emulation::meet(op, 0xFFFFFFFFu, {{a0, a1, a2, a3, b0, b1}});
  const unsigned g = emulation::current().lane / 4;
  const unsigned t = emulation::current().lane % 4;
  for (unsigned i = 0; i < 4; ++i) {
    const unsigned row = g + i / 2 * 8;
    const unsigned column = 2 * t + i % 2;
    double sum = static_cast<double>(c[i]);
    for (unsigned k = 0; k < 16; ++k) {
      const unsigned owner = k % 8 / 2;
      const uint32_t a = all[row % 8 * 4 + owner].word[row / 8 + k / 8 * 2];
      const uint32_t b = all[column * 4 + owner].word[4 + k / 8];
      const unsigned half = k % 2 * 16;
      sum += static_cast<double>(kToFloat(static_cast<uint16_t>(a >> half))) *
             static_cast<double>(kToFloat(static_cast<uint16_t>(b >> half)));
    }
    c[i] = static_cast<float>(sum);
  }
}

inline float bf16_to_float(uint16_t bits) { return __uint_as_float(static_cast<uint32_t>(bits) << 16); }

inline void mma_f16(float (&c)[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint32_t b0,
                    uint32_t b1) {
  mma<f16_to_float>("mma_f16", c, a0, a1, a2, a3, b0, b1);
}
inline void mma_bf16(float (&c)[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint32_t b0,
                     uint32_t b1) {
  mma<bf16_to_float>("mma_bf16", c, a0, a1, a2, a3, b0, b1);
}

inline void mma_s8(int32_t (&c)[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint32_t b0,
                   uint32_t b1) {
  const emulation::Met& all = emulation::meet("mma_s8", 0xFFFFFFFFu, {{a0, a1, a2, a3, b0, b1}});
  const unsigned g = emulation::current().lane / 4;
  const unsigned t = emulation::current().lane % 4;
  for (unsigned i = 0; i < 4; ++i) {
    const unsigned row = g + i / 2 * 8;
    const unsigned column = 2 * t + i % 2;
    for (unsigned k = 0; k < 32; ++k) {
      const unsigned owner = k % 16 / 4;
      const uint32_t a = all[row % 8 * 4 + owner].word[row / 8 + k / 16 * 2];
      const uint32_t b = all[column * 4 + owner].word[4 + k / 16];
      c[i] += static_cast<int8_t>(a >> k % 4 * 8) * static_cast<int8_t>(b >> k % 4 * 8);
    }
  }
}

inline uint32_t transpose_8x8(uint32_t pair) {
  const emulation::Met& all = emulation::meet("transpose_8x8", 0xFFFFFFFFu, {{pair}});
  const unsigned g = emulation::current().lane / 4;
  const unsigned t = emulation::current().lane % 4;
  const unsigned half = g % 2 * 16;
  const uint32_t low = all[2 * t * 4 + g / 2].word[0] >> half & 0xFFFF;
  const uint32_t high = all[(2 * t + 1) * 4 + g / 2].word[0] >> half & 0xFFFF;
  return low | high << 16;
}

// ---- Arithmetic ----

inline uint32_t permute_bytes(uint32_t a, uint32_t b, uint32_t select) { return __byte_perm(a, b, select); }

inline uint32_t extract_bytes(uint32_t low, uint32_t high, uint32_t first) {
  return __funnelshift_r(low, high, 8 * first);
}

inline float exp2_approx(float x) {
  const float y = std::exp2(x);
  return std::fabs(y) < 0x1p-126f ? 0.0f : y;
}

// ---- Hints ----

inline float log2_approx(float x) { return std::fabs(x) < 1.17549435e-38f ? -INFINITY : std::log2(x); }
inline void keep_in_register(uint32_t&) {}
inline void keep_in_register(const uint8_t*&) {}
inline void allow_next_kernel() {}
inline void wait_for_previous_kernel() {}

}  // namespace mustafar
