// append: prune new tokens and store them into uniform pages, by slot. Selection, bitmap and packing in one
// pass: a row is read once, lives in registers, and leaves through shared memory so that it is written in
// whole sectors.

#include "mustafar/center.cuh"
#include "mustafar/codes.cuh"
#include "mustafar/run.cuh"
#include "mustafar/select.cuh"
#include "mustafar/store_params.h"

namespace mustafar {

template <int kDim>
using AppendCodes = CodeStage<kDim, kTileRows>;

// A warp's packed values: one tile, shifted by up to 7 values to line up with its place in the page; or what
// codes need. In 16-bit values.
template <int kDim>
constexpr int kAppendStage =
    kTileRows * kDim + 8 > AppendCodes<kDim>::kSize ? kTileRows * kDim + 8 : AppendCodes<kDim>::kSize;

// Where slots lie in one head of a pool.
struct SlotMap {
  uint8_t* head;
  int64_t page_stride;
  int32_t page_tokens;  // a power of two
  int32_t values_offset;
  int32_t keep;

  __device__ __forceinline__ int row(int64_t slot) const {
    return static_cast<int>(slot) & (page_tokens - 1);
  }
  __device__ __forceinline__ uint8_t* page(int64_t slot) const {
    return head + (slot >> (__ffs(page_tokens) - 1)) * page_stride;
  }
  // Of 2 bytes or, as codes, of 1.
  template <typename Value>
  __device__ __forceinline__ Value* values(int64_t slot) const {
    return reinterpret_cast<Value*>(page(slot) + values_offset) + row(slot) * keep;
  }
  __device__ __forceinline__ uint16_t* scale(int64_t slot) const {
    return reinterpret_cast<uint16_t*>(page(slot) + values_offset) - page_tokens + row(slot);
  }
};

// The slot of the tile's token `lane`; -1 for lanes past the tile and tokens to be skipped.
__device__ __forceinline__ int64_t tile_slot(const AppendParams& p, int64_t first, int rows, int lane,
                                             bool count) {
  if (lane >= rows) {
    return -1;
  }
  int64_t slot = p.slots[first + lane];
  bool wrong = slot >= p.num_slots;
  if (p.sequence != nullptr && slot >= 0) {
    const int32_t batch = max(p.side[0].center_batch, p.side[1].center_batch);
    wrong |= static_cast<uint32_t>(p.sequence[first + lane]) >= static_cast<uint32_t>(batch);
  }
  if (wrong && count && p.errors != nullptr) {
    atomicAdd(p.errors, 1u);
  }
  return wrong || slot < 0 ? -1 : slot;
}

// Copies the packed rows of a tile to their slots, which follow each other if `run`. By the whole warp.
template <typename Value>
__device__ __forceinline__ void copy_rows(const SlotMap& map, const Value* packed, int rows, int64_t my_slot,
                                          bool run, int lane) {
  __syncwarp();
  if (run) {
    copy_run(map.values<Value>(__shfl_sync(kFullWarp, my_slot, 0)), packed, rows * map.keep, lane);
    return;
  }
  for (int row = 0; row < rows; ++row) {
    const int64_t slot = __shfl_sync(kFullWarp, my_slot, row);
    if (slot >= 0) {
      Value* values = map.values<Value>(slot);
      for (int i = lane; i < map.keep; i += 32) {
        values[i] = packed[row * map.keep + i];
      }
    }
  }
}

// kWeighted: sides may have selection weights. A kernel of its own, because the registers that 32-bit scores
// take would leave the other one with fewer warps.
template <typename T, int kDim, bool kWeighted>
__device__ __forceinline__ void append(const AppendParams& p, uint16_t* stage) {
  using L = Lanes<kDim>;
  const AppendSide& side = p.side[blockIdx.y];
  const int lane = threadIdx.x % 32;
  const int t = lane % L::kPerRow;
  const uint32_t tiles = (static_cast<uint32_t>(p.tokens) + kTileRows - 1) / kTileRows;
  const uint32_t unit = blockIdx.x * kStoreWarps + threadIdx.x / 32;
  const uint32_t heads = p.heads;
  if (unit >= tiles * heads) {
    return;
  }
  const int head = unit % heads;
  const int64_t first = static_cast<int64_t>(unit / heads) * kTileRows;
  const int rows = static_cast<int>(min(static_cast<int64_t>(kTileRows), p.tokens - first));

  const int keep = side.pool.keep;
  const SlotMap map = {side.pool.pages + head * side.pool.head_stride_bytes, side.pool.page_stride_bytes,
                       p.page_tokens, side.pool.values_offset_bytes, keep};
  const int64_t my_slot = tile_slot(p, first, rows, lane, head == 0 && blockIdx.y == 0);
  // Consecutive slots of one page are one run of bytes, which is the case that must be fast.
  const int64_t slot0 = __shfl_sync(kFullWarp, my_slot, 0);
  const bool in_run = lane >= rows || (my_slot >= 0 && my_slot == slot0 + lane);
  const bool run = __all_sync(kFullWarp, in_run) && map.row(slot0) + rows <= p.page_tokens;
  const int32_t value_type = side.pool.value_type;
  const bool coded = has_codes(value_type);
  // What leaves lines up with its place in the page, in bytes.
  const int shift = !run    ? 0
                    : coded ? run_shift(map.values<uint8_t>(slot0))
                            : 2 * run_shift(map.values<uint16_t>(slot0));
  uint8_t* const packed = reinterpret_cast<uint8_t*>(stage) + shift;

  // Not unrolled and nothing loaded ahead: fewer registers, hence more warps, hide more than either would.
#pragma unroll 1
  for (int pass = 0; pass < kTileRows / L::kRows; ++pass) {
    const int row = pass * L::kRows + lane / L::kPerRow;
    const int64_t slot = __shfl_sync(kFullWarp, my_slot, row);
    uint32_t words[L::kWords] = {};
    if (slot >= 0) {
      load_chunks<kDim>(side.x + (first + row) * side.x_token_stride + head * side.x_head_stride + 8 * t,
                        words);
    }
    if (side.center != nullptr && slot >= 0) {
      const int64_t sequence = side.center_batch > 1 ? p.sequence[first + row] : 0;
      subtract_center<T, kDim>(words, side.center + (sequence * p.heads + head) * kDim + 8 * t);
    }
    const Ranking ranking = kWeighted && side.weights != nullptr
                                ? rank_weighted<T, kDim>(words, side.weights + head * kDim + 8 * t, keep)
                                : rank_magnitudes<kDim>(words, keep);
    const uint32_t kept = take_first<L::kPerRow>(ranking, t);
    const uint32_t bitmap = to_bitmap<kDim>(kept, t);
    uint32_t row_count;
    const uint32_t starts = chunk_starts<kDim>(kept, t, row_count);
    uint16_t* const values =
        coded ? stage + AppendCodes<kDim>::kRowsAt + lane / L::kPerRow * AppendCodes<kDim>::kRow
              : reinterpret_cast<uint16_t*>(packed) + row * keep;
    if (slot >= 0) {
      if (t < kDim / 32) {
        uint32_t* bitmap_row = reinterpret_cast<uint32_t*>(map.page(slot) + map.row(slot) * (kDim / 8));
        bitmap_row[bitmap_word<kDim>(t)] = bitmap;
      }
      pack_chunks<kDim>(words, kept, starts, values);
    }
    if (coded) {
      if (t == 0) {
        values[keep] = 0;
      }
      __syncwarp();
      const int count = slot >= 0 ? keep : 0;
      const uint16_t scale = encode_row<T, L::kPerRow>(packed + row * keep, values, count, value_type, t);
      if (slot >= 0 && t == 0) {
        *map.scale(slot) = scale;
      }
      __syncwarp();  // the next rows take the place of these
    }
  }
  if (coded) {
    copy_rows(map, packed, rows, my_slot, run, lane);
  } else {
    copy_rows(map, reinterpret_cast<uint16_t*>(packed), rows, my_slot, run, lane);
  }
}

// CTAs per multiprocessor that registers allow; left alone, the compiler takes more of them than it needs.
constexpr int append_ctas(int dim, bool weighted) { return dim == 256 ? 6 : weighted ? 7 : 9; }

}  // namespace mustafar

#define MST_APPEND(name, dtype, dim, weighted)                                                   \
  extern "C" __global__ void __launch_bounds__(32 * mustafar::kStoreWarps,                       \
                                               mustafar::append_ctas(dim, weighted))             \
      name(const __grid_constant__ mustafar::AppendParams params) {                              \
    __shared__ __align__(16) uint16_t stage[mustafar::kStoreWarps][mustafar::kAppendStage<dim>]; \
    mustafar::append<mustafar::dtype, dim, weighted>(params, stage[threadIdx.x / 32]);           \
  }
#define MST_VARIANT(dtype, dim)                              \
  MST_APPEND(mst_append_##dtype##_d##dim, dtype, dim, false) \
  MST_APPEND(mst_append_weighted_##dtype##_d##dim, dtype, dim, true)
#include "variants.inc"
#undef MST_VARIANT
#undef MST_APPEND
