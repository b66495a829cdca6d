// decompress: pages back to a dense tensor.

#include "mustafar/center.cuh"
#include "mustafar/stored.cuh"

namespace mustafar {

template <int kDim>
using DecompressTile = StoredTile<kDim, kTileRows>;

// Eight channels of a chunk to `out`, whose type differs from the pages' or that gets a centre. Values are
// multiplied by `unit`, then by `scale`: both products are exact.
template <typename T>
__device__ __forceinline__ void store_converted(const uint32_t* words, float unit, float scale,
                                                const float* center, void* out, int64_t at, int32_t dtype) {
#pragma unroll
  for (int j = 0; j < 8; j += 2) {
    float low = scale * (unit * T::to_float(static_cast<uint16_t>(words[j / 2])));
    float high = scale * (unit * T::to_float(static_cast<uint16_t>(words[j / 2] >> 16)));
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
  const int len = stored_length(p, sequence, head);
  if (len < 0 && first == 0 && lane == 0) {
    count_error(p.errors);
  }
  if (len <= first) {
    return;
  }
  const uint8_t* page = stored_page(p, sequence, head, first);
  if (page == nullptr) {
    if (lane == 0) {
      count_error(p.errors);
    }
    return;
  }
  const int rows = min(len - first, kTileRows);
  const int page_tokens = p.sequences.page_tokens;
  const DecompressTile<kDim> tile(p.pool, page, page_tokens, p.capacity, first % page_tokens, rows, stage,
                                  lane);

#pragma unroll 1
  for (int pass = 0; pass < kTileRows / L::kRows; ++pass) {
    const int row = pass * L::kRows + lane / L::kPerRow;
    uint32_t words[L::kWords];
    const bool right = tile.expand(row, t, words);
    if (!right && t == 0) {
      count_error(p.errors);
    }
    if (row >= rows) {
      continue;
    }
    const int64_t out_row =
        sequence * p.out_batch_stride + (first + row) * p.out_token_stride + head * p.out_head_stride + 8 * t;
    if (p.pool.value_type == p.out_dtype && p.center == nullptr) {
      store_chunks<kDim>(static_cast<uint16_t*>(p.out) + out_row, words);
    } else {
      const float unit = code_unit(p.pool.value_type);
      const float scale = tile.scale(row, right);
      const int64_t center_row = ((p.center_batch > 1 ? sequence : 0) * p.heads + head) * kDim + 8 * t;
#pragma unroll
      for (int i = 0; i < L::kChunks; ++i) {
        const float* center = p.center != nullptr ? p.center + center_row + i * L::kStep : nullptr;
        store_converted<T>(words + 4 * i, unit, scale, center, p.out, out_row + i * L::kStep, p.out_dtype);
      }
    }
  }
}

}  // namespace mustafar

#define MST_VARIANT(dtype, dim)                                                                            \
  extern "C" __global__ void __launch_bounds__(32 * mustafar::kStoreWarps)                                 \
      mst_decompress_##dtype##_d##dim(const __grid_constant__ mustafar::DecompressParams params) {         \
    __shared__ __align__(16) uint16_t stage[mustafar::kStoreWarps][mustafar::DecompressTile<dim>::kStage]; \
    mustafar::decompress<mustafar::dtype, dim>(params, stage[threadIdx.x / 32]);                           \
  }
#include "variants.inc"
#undef MST_VARIANT
