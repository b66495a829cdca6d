// decompress: pages back to a dense tensor.

#include "mustafar/center.cuh"
#include "mustafar/run.cuh"
#include "mustafar/store_params.h"

namespace mustafar {

// A warp's packed values: one tile, shifted by up to 7 values to line up with its place in the page.
template <int kDim>
constexpr int kDecompressStage = kTileRows * kDim + 8;

__device__ __forceinline__ void count_error(uint32_t* errors) {
  if (errors != nullptr) {
    atomicAdd(errors, 1u);
  }
}

// The tile's values in the page: how far into the values they start, and how many there are. Offsets of a
// damaged page are clamped, so that whatever they say nothing outside the page or the stage is read.
struct ValueRun {
  int start;
  int count;
};

template <int kDim>
__device__ __forceinline__ ValueRun tile_run(const DecompressParams& p, const uint16_t* offsets, int row0,
                                             int rows) {
  if (p.pool.keep > 0) {
    return {row0 * p.pool.keep, rows * p.pool.keep};
  }
  const int start = min(static_cast<int>(offsets[row0]), p.capacity);
  const int end = min(static_cast<int>(offsets[row0 + rows]), p.capacity);
  return {start, min(max(end - start, 0), rows * kDim)};
}

// Eight channels of a chunk to `out`, whose type differs from the pages' or that gets a centre.
template <typename T>
__device__ __forceinline__ void store_converted(const uint32_t* words, const float* center, void* out,
                                                int64_t at, int32_t dtype) {
#pragma unroll
  for (int j = 0; j < 8; j += 2) {
    float low = T::to_float(static_cast<uint16_t>(words[j / 2]));
    float high = T::to_float(static_cast<uint16_t>(words[j / 2] >> 16));
    if (center != nullptr) {
      low += center[j];
      high += center[j + 1];
    }
    if (dtype == kF32) {
      static_cast<float*>(out)[at + j] = low;
      static_cast<float*>(out)[at + j + 1] = high;
    } else {
      const uint32_t pair = dtype == kF16 ? narrow_pair<f16>(low, high) : narrow_pair<bf16>(low, high);
      static_cast<uint16_t*>(out)[at + j] = static_cast<uint16_t>(pair);
      static_cast<uint16_t*>(out)[at + j + 1] = static_cast<uint16_t>(pair >> 16);
    }
  }
}

template <typename T, int kDim>
__device__ __forceinline__ void decompress(const DecompressParams& p, uint16_t* stage) {
  using L = Lanes<kDim>;
  const int lane = threadIdx.x % 32;
  const int t = lane % L::kPerRow;
  const uint32_t heads = p.heads;
  const uint32_t tiles = (static_cast<uint32_t>(p.max_len) + kTileRows - 1) / kTileRows;
  const uint32_t unit = blockIdx.x * kStoreWarps + threadIdx.x / 32;
  if (unit >= p.batch * tiles * heads) {
    return;
  }
  const int head = unit % heads;
  const int64_t sequence = unit / heads / tiles;
  const int first = static_cast<int>(unit / heads % tiles) * kTileRows;
  const SequencesParams& s = p.sequences;
  const int32_t len = s.lens[s.lens_per_head ? sequence * p.heads + head : sequence];
  const bool wrong_len = static_cast<uint32_t>(len) > static_cast<uint32_t>(p.max_len);
  if (wrong_len && first == 0 && lane == 0) {
    count_error(p.errors);
  }
  if (wrong_len || len <= first) {
    return;
  }
  const int rows = min(len - first, kTileRows);
  const int64_t entry = sequence * s.table_stride + first / s.page_tokens;
  const int64_t number = s.table != nullptr ? s.table[entry] : entry;
  if (number < 0 || number >= p.num_pages) {
    if (lane == 0) {
      count_error(p.errors);
    }
    return;
  }
  const uint8_t* page = p.pool.pages + number * p.pool.page_stride_bytes + head * p.pool.head_stride_bytes;
  const uint16_t* values = reinterpret_cast<const uint16_t*>(page + p.pool.values_offset_bytes);
  const uint16_t* offsets = reinterpret_cast<const uint16_t*>(page + s.page_tokens * (kDim / 8));
  const int row0 = first % s.page_tokens;
  const ValueRun run = tile_run<kDim>(p, offsets, row0, rows);
  uint16_t* const packed = stage + run_shift(values + run.start);
  copy_run(packed, values + run.start, run.count, lane);
  __syncwarp();

#pragma unroll 1
  for (int pass = 0; pass < kTileRows / L::kRows; ++pass) {
    const int row = pass * L::kRows + lane / L::kPerRow;
    const bool present = row < rows;
    const uint32_t kept = present ? load_kept<kDim>(page + (row0 + row) * (kDim / 8), t) : 0;
    uint32_t count;
    const uint32_t starts = chunk_starts<kDim>(kept, t, count);
    if (!present) {
      continue;
    }
    int at = row * p.pool.keep;
    if (p.pool.keep == 0) {
      const int begin = offsets[row0 + row];
      const int end = offsets[row0 + row + 1];
      if (t == 0 && (end - begin != static_cast<int>(count) || end > p.capacity)) {
        count_error(p.errors);
      }
      at = min(max(begin - run.start, 0), (kTileRows - 1) * kDim);
    }
    uint32_t words[L::kWords];
    unpack_chunks<kDim>(words, kept, starts, packed + at);
    const int64_t out_row =
        sequence * p.out_batch_stride + (first + row) * p.out_token_stride + head * p.out_head_stride + 8 * t;
    if (p.out_dtype == T::kCode && p.center == nullptr) {
      store_chunks<kDim>(static_cast<uint16_t*>(p.out) + out_row, words);
    } else {
      const int64_t center_row = ((p.center_batch > 1 ? sequence : 0) * p.heads + head) * kDim + 8 * t;
#pragma unroll
      for (int i = 0; i < L::kChunks; ++i) {
        const float* center = p.center != nullptr ? p.center + center_row + i * L::kStep : nullptr;
        store_converted<T>(words + 4 * i, center, p.out, out_row + i * L::kStep, p.out_dtype);
      }
    }
  }
}

}  // namespace mustafar

#define MST_VARIANT(dtype, dim)                                                                      \
  extern "C" __global__ void __launch_bounds__(32 * mustafar::kStoreWarps)                           \
      mst_decompress_##dtype##_d##dim(const __grid_constant__ mustafar::DecompressParams params) {   \
    __shared__ __align__(16) uint16_t stage[mustafar::kStoreWarps][mustafar::kDecompressStage<dim>]; \
    mustafar::decompress<mustafar::dtype, dim>(params, stage[threadIdx.x / 32]);                     \
  }
#include "variants.inc"
#undef MST_VARIANT
