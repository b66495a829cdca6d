// Tiles of dense tokens (sinks, window), read from global memory straight into matrix operands. The same lane
// takes the same channels as in pages.cuh.
#pragma once

#include "mustafar/attend_params.h"
#include "mustafar/dtype.cuh"
#include "mustafar/expand.cuh"

namespace mustafar {

// One side of one sequence and KV head.
struct DenseSide {
  const void* base;
  int64_t token_stride;
  int32_t dtype;
  bool wide;  // element type is the kernel's and every run of 8 channels starts on 16 bytes

  // Of elements `offset` and on of a tensor; `stride` is from token to token.
  template <typename T>
  static __device__ __forceinline__ DenseSide of(const void* tensor, int64_t offset, int64_t stride,
                                                 int32_t type) {
    const int bytes = type == kF32 ? 4 : 2;
    const uint8_t* base = static_cast<const uint8_t*>(tensor) + offset * bytes;
    const bool aligned = ((reinterpret_cast<uint64_t>(base) | (stride * bytes)) & 15) == 0;
    return {base, stride, type, type == T::kCode && aligned};
  }

  // kPairs register pairs from element `at` on, even elements in the low halves. `wide` says whether kWide is
  // allowed; a branch at each load would make one wait for the other.
  template <typename T, bool kWide, int kPairs>
  __device__ __forceinline__ void load(int64_t at, uint32_t (&pairs)[kPairs]) const {
    if constexpr (kWide) {
      load_wide(at, pairs);
    } else {
      load_any<T>(at, pairs);
    }
  }

  template <int kPairs>
  __device__ __forceinline__ void load_wide(int64_t at, uint32_t (&pairs)[kPairs]) const {
    const uint16_t* from = static_cast<const uint16_t*>(base) + at;
    if constexpr (kPairs == 4) {
      const uint4 v = *reinterpret_cast<const uint4*>(from);
      pairs[0] = v.x;
      pairs[1] = v.y;
      pairs[2] = v.z;
      pairs[3] = v.w;
    } else {
      const uint2 v = *reinterpret_cast<const uint2*>(from);
      pairs[0] = v.x;
      pairs[1] = v.y;
    }
  }

  template <typename T, int kPairs>
  __device__ __forceinline__ void load_any(int64_t at, uint32_t (&pairs)[kPairs]) const {
    // Rolled to keep the rare case small; the shift avoids indexing registers at run time.
#pragma unroll 1
    for (int i = 0; i < kPairs; ++i) {
#pragma unroll
      for (int j = 0; j + 1 < kPairs; ++j) {
        pairs[j] = pairs[j + 1];
      }
      const float even = load_as_float(base, at + 2 * i, dtype);
      pairs[kPairs - 1] = T::pack(even, load_as_float(base, at + 2 * i + 1, dtype));
    }
  }
};

// Sinks or window of one sequence and KV head.
struct DenseSides {
  DenseSide keys;
  DenseSide values;

  template <typename T>
  static __device__ __forceinline__ DenseSides of(const DenseParams& dense, int batch, int head) {
    const int64_t row = dense.rows == nullptr ? batch : dense.rows[batch];
    return {DenseSide::of<T>(dense.k, row * dense.k_row_stride + head * dense.k_head_stride,
                             dense.k_token_stride, dense.k_dtype),
            DenseSide::of<T>(dense.v, row * dense.v_row_stride + head * dense.v_head_stride,
                             dense.v_token_stride, dense.v_dtype)};
  }
};

// Exchanges the halves of register pairs: keys (and queries) have the even channel in the high half, see
// expand8.
__device__ __forceinline__ void swap_halves(uint32_t (&pairs)[4]) {
#pragma unroll
  for (int j = 0; j < 4; ++j) {
    pairs[j] = permute_bytes(pairs[j], 0, 0x1032);
  }
}

// Rows of a tile: row r is token `token` + r. Tokens outside [first, last] are not read; the nearest inside
// stands for them, since a mask or a probability of 0 hides what they hold.
struct DenseTile {
  const DenseSide& side;
  int token;
  int first, last;

  // Bit r of `visible`, which is not 0: some query sees row r.
  __device__ __forceinline__ DenseTile(const DenseSide& tokens, int start, uint32_t visible)
      : side(tokens), token(start), first(start + __ffs(visible) - 1), last(start + 31 - __clz(visible)) {}

  __device__ __forceinline__ int64_t at(int r) const {
    return min(max(token + r, first), last) * side.token_stride;
  }
};

// kHalves: loads of half a tile at a time, where more at once would not fit into registers.
template <bool kWide, bool kHalves>
struct DenseKeys {
  DenseTile tile;
  int t;

  struct Row {
    const DenseSide& side;
    int64_t at;

    template <typename T>
    __device__ __forceinline__ void next(int k, uint32_t (&pairs)[4]) {
      side.template load<T, kWide>(at + 32 * k, pairs);
      swap_halves(pairs);
    }
  };

  __device__ __forceinline__ Row row(int r, bool) const {
    if constexpr (kHalves) {
      __syncwarp();
    }
    return Row{tile.side, tile.at(r) + 8 * t};
  }
};

template <bool kWide>
struct DenseValues {
  DenseTile tile;
  int g;

  struct Row {
    const DenseSide& side;
    int64_t at;

    template <typename T, int k>
    __device__ __forceinline__ void next(uint32_t& pair0, uint32_t& pair1) {
      uint32_t pairs[2] = {0, 0};
      side.template load<T, kWide>(at + 32 * k, pairs);
      pair0 = pairs[0];
      pair1 = pairs[1];
    }

    template <typename T, int kPairs>
    __device__ __forceinline__ void load(uint32_t (&pairs)[kPairs]) {
      load_pairs<T>(*this, pairs);
    }
  };

  __device__ __forceinline__ Row row(int first, int at) const {
    return Row{tile.side, tile.at(first + at) + 4 * g};
  }

  // As ValueRows.
  struct TwoRows {
    Row first, second;

    template <typename T>
    __device__ __forceinline__ void next(int k, uint32_t (&pairs)[4]) {
      uint32_t x[2] = {0, 0}, y[2] = {0, 0};
      first.side.template load<T, kWide>(first.at + 32 * k, x);
      second.side.template load<T, kWide>(second.at + 32 * k, y);
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        pairs[2 * j] = permute_bytes(x[j], y[j], 0x5410);
        pairs[2 * j + 1] = permute_bytes(x[j], y[j], 0x7632);
      }
    }
  };

  __device__ __forceinline__ TwoRows two_rows(int first, int at) const {
    return {row(first, at), row(first, at + 1)};
  }
};

}  // namespace mustafar
