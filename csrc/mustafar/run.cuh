// Copies of a run of 16-bit values between global and shared memory by one warp, 16 bytes at a time. Runs
// start at any value; what makes the wide accesses possible is that both ends are equally far from a multiple
// of 16 bytes.
#pragma once

#include "mustafar/lanes.cuh"

namespace mustafar {

// Values to leave free at the start of a 16-byte aligned buffer so that it lines up with `run`.
__device__ __forceinline__ int run_shift(const void* run) {
  return static_cast<int>(reinterpret_cast<uintptr_t>(run) & 15) / 2;
}

// Both ways: `from` and `to` are congruent modulo 16 bytes. Nothing outside the `count` values is touched.
__device__ __forceinline__ void copy_run(uint16_t* to, const uint16_t* from, int count, int lane) {
  const int head = min((8 - run_shift(from)) & 7, count);
  const int wide = (count - head) / 8;
  const int tail = head + 8 * wide;
  if (lane < head) {
    to[lane] = from[lane];
  }
  for (int k = lane; k < wide; k += 32) {
    *reinterpret_cast<uint4*>(to + head + 8 * k) = *reinterpret_cast<const uint4*>(from + head + 8 * k);
  }
  if (lane < count - tail) {
    to[tail + lane] = from[tail + lane];
  }
}

}  // namespace mustafar
