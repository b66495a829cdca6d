// Tiles of dense tokens (sinks, window), read from global memory straight into matrix operands. The same lane
// takes the same channels as in pages.cuh.
#pragma once

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

  // kPairs register pairs from channel `channel` of token `token` on, even channels in the low halves.
  template <typename T, int kPairs>
  __device__ __forceinline__ void load(int64_t token, int channel, uint32_t (&pairs)[kPairs]) const {
    if (wide) {
      load_wide(token, channel, pairs);
    } else {
      load_any<T>(token, channel, pairs);
    }
  }

  // Without asking whether it may, so that several loads in a row do not wait for each other.
  template <int kPairs>
  __device__ __forceinline__ void load_wide(int64_t token, int channel, uint32_t (&pairs)[kPairs]) const {
    const uint16_t* from = static_cast<const uint16_t*>(base) + token * token_stride + channel;
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
  __device__ __forceinline__ void load_any(int64_t token, int channel, uint32_t (&pairs)[kPairs]) const {
    const int64_t at = token * token_stride + channel;
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

// Exchanges the halves of register pairs: keys (and queries) have the even channel in the high half, see
// expand8.
__device__ __forceinline__ void swap_halves(uint32_t (&pairs)[4]) {
#pragma unroll
  for (int j = 0; j < 4; ++j) {
    pairs[j] = permute_bytes(pairs[j], 0, 0x1032);
  }
}

// Rows of a tile: row r is token `token` + r. Rows whose bit in `visible` is 0 are not read and count as
// zero.
struct DenseKeys {
  const DenseSide& side;
  int token;
  uint32_t visible;
  int t;

  struct Row {
    const DenseKeys& keys;
    int r;

    template <typename T>
    __device__ __forceinline__ void next(int k, uint32_t (&pairs)[4]) {
      pairs[0] = pairs[1] = pairs[2] = pairs[3] = 0;
      if (keys.visible >> r & 1u) {
        keys.side.template load<T>(keys.token + r, 32 * k + 8 * keys.t, pairs);
        swap_halves(pairs);
      }
    }
  };

  __device__ __forceinline__ Row row(int r) const { return Row{*this, r}; }
};

struct DenseValues {
  const DenseSide& side;
  int token;
  uint32_t visible;
  int g;

  struct Row {
    const DenseValues& values;
    int r;

    template <typename T, int k>
    __device__ __forceinline__ void next(uint32_t& pair0, uint32_t& pair1) {
      uint32_t pairs[2] = {0, 0};
      if (values.visible >> r & 1u) {
        values.side.template load<T>(values.token + r, 32 * k + 4 * values.g, pairs);
      }
      pair0 = pairs[0];
      pair1 = pairs[1];
    }
  };

  __device__ __forceinline__ Row row(int r) const { return Row{*this, r}; }
};

}  // namespace mustafar
