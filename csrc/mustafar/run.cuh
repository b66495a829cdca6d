// Copies of a run of values of 16 or 8 bits between global and shared memory by one warp, 16 bytes at a time.
// Runs start at any value; what makes the wide accesses possible is that both ends are equally far from a
// multiple of 16 bytes.
#pragma once

#include "mustafar/lanes.cuh"

namespace mustafar {

// Values to leave free at the start of a 16-byte aligned buffer so that it lines up with `run`.
template <typename Value>
__device__ __forceinline__ int run_shift(const Value* run) {
  return static_cast<int>((reinterpret_cast<uintptr_t>(run) & 15) / sizeof(Value));
}

// Both ways: `from` and `to` are congruent modulo 16 bytes. Nothing outside the `count` values is touched.
template <typename Value>
__device__ __forceinline__ void copy_run(Value* to, const Value* from, int count, int lane) {
  constexpr int kWide = 16 / sizeof(Value);
  const int head = min((kWide - run_shift(from)) & (kWide - 1), count);
  const int wide = (count - head) / kWide;
  const int tail = head + kWide * wide;
  if (lane < head) {
    to[lane] = from[lane];
  }
  for (int k = lane; k < wide; k += 32) {
    *reinterpret_cast<uint4*>(to + head + kWide * k) =
        *reinterpret_cast<const uint4*>(from + head + kWide * k);
  }
  if (lane < count - tail) {
    to[tail + lane] = from[tail + lane];
  }
}

}  // namespace mustafar
