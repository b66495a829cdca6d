// The part of CUDA C++ that the kernels use, for a host compiler. Included in front of every kernel file.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>

#include "fibers.h"

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __noinline__
#define __launch_bounds__(...)
#define __grid_constant__
#define __align__(bytes) __attribute__((aligned(bytes)))
// One CTA runs at a time, so its shared arrays may be static.
#define __shared__ static

#define threadIdx (::emulation::current().index)
#define blockIdx (::emulation::current().block)
#define blockDim (::emulation::current().block_size)
#define gridDim (::emulation::current().grid_size)

// ---- Vector types: loads and stores of them must be aligned, which UBSan checks ----

struct alignas(8) uint2 {
  unsigned x, y;
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};
struct alignas(8) float2 {
  float x, y;
};
struct alignas(16) float4 {
  float x, y, z, w;
};
inline uint2 make_uint2(unsigned x, unsigned y) { return {x, y}; }
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }
inline float2 make_float2(float x, float y) { return {x, y}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }

// ---- Arithmetic ----

using std::isfinite;
using std::isinf;
using std::isnan;

template <typename T>
T min(T a, T b) {
  return b < a ? b : a;
}
template <typename T>
T max(T a, T b) {
  return a < b ? b : a;
}
inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __ffs(int x) { return __builtin_ffs(x); }
inline int __clz(int x) { return x == 0 ? 32 : __builtin_clz(static_cast<unsigned>(x)); }
inline int __float2int_rn(float x) { return x != x ? 0 : static_cast<int>(std::nearbyint(x)); }
inline float __fdividef(float a, float b) { return a / b; }
// The program is compiled without contraction, so nothing is fused.
inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fdiv_rn(float a, float b) { return a / b; }

template <typename To, typename From>
To bits_as(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  memcpy(&to, &from, sizeof to);
  return to;
}
inline unsigned __float_as_uint(float x) { return bits_as<unsigned>(x); }
inline float __uint_as_float(unsigned x) { return bits_as<float>(x); }
inline int __float_as_int(float x) { return bits_as<int>(x); }
inline float __int_as_float(int x) { return bits_as<float>(x); }

// Bytes 0 to 3 are a's, 4 to 7 b's; bit 3 of a selector replicates the sign of the byte.
inline unsigned __byte_perm(unsigned a, unsigned b, unsigned select) {
  const uint64_t bytes = static_cast<uint64_t>(b) << 32 | a;
  unsigned result = 0;
  for (int i = 0; i < 4; ++i) {
    const unsigned selector = select >> (4 * i) & 0xF;
    unsigned byte = static_cast<unsigned>(bytes >> (8 * (selector & 7))) & 0xFF;
    if (selector & 8) {
      byte = byte & 0x80 ? 0xFF : 0;
    }
    result |= byte << (8 * i);
  }
  return result;
}
// The low word of the pair shifted right, by the low five bits of `shift` or by at most 32.
inline unsigned __funnelshift_r(unsigned low, unsigned high, unsigned shift) {
  return static_cast<unsigned>((static_cast<uint64_t>(high) << 32 | low) >> (shift & 31));
}
inline unsigned __funnelshift_rc(unsigned low, unsigned high, unsigned shift) {
  return static_cast<unsigned>((static_cast<uint64_t>(high) << 32 | low) >> min(shift, 32u));
}
inline unsigned __dp4a(unsigned a, unsigned b, unsigned c) {
  for (int i = 0; i < 4; ++i) {
    c += (a >> (8 * i) & 0xFF) * (b >> (8 * i) & 0xFF);
  }
  return c;
}

// ---- Warp collectives ----

namespace emulation {

template <typename T>
Words to_words(T value) {
  static_assert(sizeof(T) <= sizeof(Words) && std::is_trivially_copyable_v<T>);
  Words words = {};
  memcpy(&words, &value, sizeof value);
  return words;
}
template <typename T>
T from_words(const Words& words) {
  T value;
  memcpy(&value, &words, sizeof value);
  return value;
}

// `source` is a lane of the segment of `width` lanes around this one; outside it the lane keeps its own
// value.
template <typename T>
T shuffle(const char* op, unsigned mask, T value, int source, int width) {
  const Met& all = meet(op, mask, to_words(value));
  const int lane = static_cast<int>(current().lane);
  const int first = lane / width * width;
  return source < first || source >= first + width ? value : from_words<T>(all[source]);
}

inline int segment(int width) { return static_cast<int>(current().lane) / width * width; }

}  // namespace emulation

template <typename T>
T __shfl_sync(unsigned mask, T value, int source, int width = 32) {
  return emulation::shuffle("__shfl_sync", mask, value, emulation::segment(width) + (source & (width - 1)),
                            width);
}
template <typename T>
T __shfl_xor_sync(unsigned mask, T value, int lanes, int width = 32) {
  return emulation::shuffle("__shfl_xor_sync", mask, value,
                            static_cast<int>(emulation::current().lane) ^ lanes, width);
}
template <typename T>
T __shfl_up_sync(unsigned mask, T value, int lanes, int width = 32) {
  return emulation::shuffle("__shfl_up_sync", mask, value,
                            static_cast<int>(emulation::current().lane) - lanes, width);
}
template <typename T>
T __shfl_down_sync(unsigned mask, T value, int lanes, int width = 32) {
  return emulation::shuffle("__shfl_down_sync", mask, value,
                            static_cast<int>(emulation::current().lane) + lanes, width);
}
inline unsigned __ballot_sync(unsigned mask, int predicate) {
  const emulation::Met& all = emulation::meet("__ballot_sync", mask, emulation::to_words(predicate));
  unsigned ballot = 0;
  for (unsigned lane = 0; lane < 32; ++lane) {
    ballot |= (mask >> lane & 1) && all[lane].word[0] != 0 ? 1u << lane : 0;
  }
  return ballot;
}
inline int __any_sync(unsigned mask, int predicate) { return __ballot_sync(mask, predicate) != 0; }
inline int __all_sync(unsigned mask, int predicate) { return __ballot_sync(mask, predicate) == mask; }
inline void __syncwarp(unsigned mask = 0xFFFFFFFFu) { emulation::meet("__syncwarp", mask, {}); }
inline void __syncthreads() { emulation::barrier(); }

// ---- Atomics: fibers never interrupt each other ----

template <typename T>
T atomicAdd(T* address, T value) {
  const T old = *address;
  *address = old + value;
  return old;
}
template <typename T>
T atomicMin(T* address, T value) {
  const T old = *address;
  *address = min(old, value);
  return old;
}
