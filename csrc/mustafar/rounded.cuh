// Float arithmetic that gives the bits of the CPU backend: every operation is rounded by itself, none are
// fused. The functions are those of src/cpu/math.rs, constant for constant.
#pragma once

#include <stdint.h>

namespace mustafar {

// a * b + c, rounded twice.
__device__ __forceinline__ float multiply_add(float a, float b, float c) {
  return __fadd_rn(__fmul_rn(a, b), c);
}

// e^x for x <= 88; 0 below -87.3. NaN stays NaN.
__device__ __forceinline__ float rounded_exp(float x) {
  constexpr float kRound = 12582912.0f;  // 1.5 * 2^23
  const float clamped = x < -87.3f ? -87.3f : x;
  const float shifted = multiply_add(clamped, 1.44269504088896340736f, kRound);
  const float n = __fadd_rn(shifted, -kRound);
  const float r = multiply_add(n, 2.1219444e-4f, multiply_add(n, -0.6933594f, clamped));
  float p = 1.0f / 5040.0f;
  p = multiply_add(p, r, 1.0f / 720.0f);
  p = multiply_add(p, r, 1.0f / 120.0f);
  p = multiply_add(p, r, 1.0f / 24.0f);
  p = multiply_add(p, r, 1.0f / 6.0f);
  p = multiply_add(p, r, 0.5f);
  p = multiply_add(p, r, 1.0f);
  p = multiply_add(p, r, 1.0f);
  const float power = __uint_as_float((__float_as_uint(shifted) << 23) + 0x3F800000u);
  return x < -87.3f ? 0.0f : __fmul_rn(p, power);
}

__device__ __forceinline__ float rounded_tanh(float x) {
  const float a = __uint_as_float(__float_as_uint(x) & 0x7FFFFFFFu);
  const float e = rounded_exp(__fmul_rn(-2.0f, a));
  const float large = __fdiv_rn(__fadd_rn(1.0f, -e), __fadd_rn(1.0f, e));
  const float y = __fmul_rn(a, a);
  float p = 62.0f / 2835.0f;
  p = multiply_add(p, y, -17.0f / 315.0f);
  p = multiply_add(p, y, 2.0f / 15.0f);
  p = multiply_add(p, y, -1.0f / 3.0f);
  const float small = multiply_add(__fmul_rn(a, y), p, a);
  const float magnitude = a < 0.3f ? small : large;
  return __uint_as_float((__float_as_uint(magnitude) & 0x7FFFFFFFu) | (__float_as_uint(x) & 0x80000000u));
}

}  // namespace mustafar
