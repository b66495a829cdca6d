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

// Numbers of the e4m3 codes in bytes 0, 1 and 2, 3, divided by kE4m3Unit. NaN stays NaN.
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 890
constexpr float kE4m3Unit = 1.0f;

__device__ __forceinline__ void e4m3_to_f16(uint32_t codes, uint32_t& pair0, uint32_t& pair1) {
  asm("{\n"
      ".reg .b16 low, high;\n"
      "mov.b32 {low, high}, %2;\n"
      "cvt.rn.f16x2.e4m3x2 %0, low;\n"
      "cvt.rn.f16x2.e4m3x2 %1, high;\n"
      "}"
      : "=r"(pair0), "=r"(pair1)
      : "r"(codes));
}
#else
constexpr float kE4m3Unit = 1.0f / 140.0f;

// Exponent and fraction move to their place in an f16, which divides by 256. Times 140 the largest number,
// 448, still fits, and what the NaN looks like, 480, is infinite; infinity times 0 is NaN.
__device__ __forceinline__ void e4m3_to_f16(uint32_t codes, uint32_t& pair0, uint32_t& pair1) {
  const auto convert = [](uint32_t halves) {
    const uint32_t moved = (halves >> 1 & 0x3F803F80u) | (halves & 0x80008000u);
    uint32_t pair;
    asm("{\n"
        ".reg .b32 scaled;\n"
        "mul.rn.f16x2 scaled, %1, %2;\n"
        "fma.rn.f16x2 %0, scaled, %3, scaled;\n"
        "}"
        : "=r"(pair)
        : "r"(moved), "r"(0x78607860u), "r"(0u));
    return pair;
  };
  pair0 = convert(__byte_perm(codes, 0, 0x1404));
  pair1 = convert(__byte_perm(codes, 0, 0x3424));
}
#endif

// ---- Shared memory, by 32-bit address ----

// Declares `name`, a uint4 array of the bytes that the launch asked for. A macro, because the host has no
// such arrays.
#define MST_DYNAMIC_SHARED(name) extern __shared__ uint4 name[]

__device__ __forceinline__ uint32_t load_shared_u32(uint32_t address) {
  uint32_t value;
  asm volatile("ld.shared.u32 %0, [%1];" : "=r"(value) : "r"(address) : "memory");
  return value;
}

__device__ __forceinline__ uint32_t load_shared_u16(uint32_t address) {
  uint32_t value;
  asm volatile("ld.shared.u16 %0, [%1];" : "=r"(value) : "r"(address) : "memory");
  return value;
}

__device__ __forceinline__ uint2 load_shared_v2(uint32_t address) {
  uint2 v;
  asm volatile("ld.shared.v2.u32 {%0, %1}, [%2];" : "=r"(v.x), "=r"(v.y) : "r"(address) : "memory");
  return v;
}

__device__ __forceinline__ uint4 load_shared_v4(uint32_t address) {
  uint4 v;
  asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
               : "r"(address)
               : "memory");
  return v;
}

__device__ __forceinline__ void store_shared_u32(uint32_t address, uint32_t value) {
  asm volatile("st.shared.u32 [%0], %1;" ::"r"(address), "r"(value) : "memory");
}

__device__ __forceinline__ void store_shared_v2(uint32_t address, uint2 value) {
  asm volatile("st.shared.v2.u32 [%0], {%1, %2};" ::"r"(address), "r"(value.x), "r"(value.y) : "memory");
}

// Loads a 16-bit value where bit kBit of `mask` is set and leaves `value` alone elsewhere. A loaded value is
// zero-extended, so the upper half of `value` stays 0 once it is. The tests of neighbouring bits are written
// so that the assembler turns seven of them into one instruction (R2P).
template <int kBit>
__device__ __forceinline__ void load_shared_u16_if(uint32_t mask, uint32_t& value, uint32_t address) {
  asm volatile(
      "{\n"
      ".reg .pred p;\n"
      ".reg .b32 bit;\n"
      "and.b32 bit, %2, %3;\n"
      "setp.ne.u32 p, bit, 0;\n"
      "@p ld.shared.u16 %0, [%1];\n"
      "}"
      : "+r"(value)
      : "r"(address), "r"(mask), "n"(1 << kBit)
      : "memory");
}

// ---- Asynchronous copies ----

// 16 bytes from global to shared memory; both addresses are multiples of 16. Bypasses L1: pages are read
// once. What lies near them is brought into the L2 cache at once, which memory serves faster.
__device__ __forceinline__ void copy16_async(uint32_t destination, const uint8_t* source) {
  asm volatile("cp.async.cg.shared.global.L2::256B [%0], [%1], 16;" ::"r"(destination), "l"(source)
               : "memory");
}

// The same where `wanted` is true, without a branch.
__device__ __forceinline__ void copy16_async_if(bool wanted, uint32_t destination, const uint8_t* source) {
  asm volatile(
      "{\n"
      ".reg .pred p;\n"
      "setp.ne.u32 p, %2, 0;\n"
      "@p cp.async.cg.shared.global.L2::256B [%0], [%1], 16;\n"
      "}" ::"r"(destination),
      "l"(source), "r"(static_cast<uint32_t>(wanted))
      : "memory");
}

// Brings the line of an address into the L2 cache, without waiting for it.
__device__ __forceinline__ void prefetch_l2(const void* address) {
  asm volatile("prefetch.global.L2 [%0];" ::"l"(address));
}

// Closes the group of copies this thread has started since the last call.
__device__ __forceinline__ void copy_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// Waits until at most kPending groups of this thread are still under way.
template <int kPending>
__device__ __forceinline__ void copy_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}

// ---- Matrices of a warp, lane = 4 * g + t ----

// c += A (16 x 16) * B (16 x 8), float accumulators.
//   a0: row g, k 2t, 2t+1    a1: row g + 8    a2: row g, k 2t+8, 2t+9    a3: row g + 8, k 2t+8, 2t+9
//   b0: k 2t, 2t+1 of column g    b1: k 2t+8, 2t+9
//   c[0], c[1]: row g, columns 2t, 2t+1    c[2], c[3]: row g + 8
__device__ __forceinline__ void mma_f16(float (&c)[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3,
                                        uint32_t b0, uint32_t b1) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "
      "{%0,%1,%2,%3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}

__device__ __forceinline__ void mma_bf16(float (&c)[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3,
                                         uint32_t b0, uint32_t b1) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "
      "{%0,%1,%2,%3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}

// The same of signed bytes, with int32 accumulators and 32 of them in a product: byte i of a0 and a1 is k 4t
// + i, of a2 and a3 k 4t + 16 + i, and so are those of b0 and b1.
__device__ __forceinline__ void mma_s8(int32_t (&c)[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3,
                                       uint32_t b0, uint32_t b1) {
  asm("mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "
      "{%0,%1,%2,%3};"
      : "+r"(c[0]), "+r"(c[1]), "+r"(c[2]), "+r"(c[3])
      : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}

// Transposes an 8 x 8 matrix of 16-bit elements: lane (g, t) gives row g, columns 2t, 2t+1 and gets rows 2t,
// 2t+1 of column g.
__device__ __forceinline__ uint32_t transpose_8x8(uint32_t pair) {
  uint32_t transposed;
  asm("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(transposed) : "r"(pair));
  return transposed;
}

// ---- Arithmetic ----

// Four bytes of `a` (numbers 0 to 3) and `b` (4 to 7): nibble i of the low half of `select` says which
// becomes byte i. __byte_perm masks the selectors first.
__device__ __forceinline__ uint32_t permute_bytes(uint32_t a, uint32_t b, uint32_t select) {
  uint32_t bytes;
  asm("prmt.b32 %0, %1, %2, %3;" : "=r"(bytes) : "r"(a), "r"(b), "r"(select));
  return bytes;
}

// The four bytes from number `first` % 4 on of `low` (0 to 3) and `high` (4 to 7).
__device__ __forceinline__ uint32_t extract_bytes(uint32_t low, uint32_t high, uint32_t first) {
  uint32_t bytes;
  asm("prmt.b32.f4e %0, %1, %2, %3;" : "=r"(bytes) : "r"(low), "r"(high), "r"(first));
  return bytes;
}

// 2^x, subnormal results flushed to 0; 2^-inf is 0.
__device__ __forceinline__ float exp2_approx(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// The base-2 logarithm, of subnormal numbers -inf.
__device__ __forceinline__ float log2_approx(float x) {
  float y;
  asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// ---- Hints ----

// Makes a value opaque, so that the compiler keeps it instead of computing it again.
__device__ __forceinline__ void keep_in_register(uint32_t& value) { asm volatile("" : "+r"(value)); }

__device__ __forceinline__ void keep_in_register(const uint8_t*& pointer) {
  asm volatile("" : "+l"(pointer));
}

// Programmatic dependent launch, where the host asks for it: a kernel allows the next one to start while it
// still runs, and the next one waits before it reads what the first wrote. Without that, and before compute
// capability 9.0, both do nothing.
__device__ __forceinline__ void allow_next_kernel() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

__device__ __forceinline__ void wait_for_previous_kernel() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

}  // namespace mustafar
