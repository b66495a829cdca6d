// compress: store any pattern into ragged pages. One CTA per page: count, place the rows, pack.

#include "mustafar/codes.cuh"
#include "mustafar/run.cuh"
#include "mustafar/select.cuh"
#include "mustafar/store_params.h"

namespace mustafar {

constexpr int kMaxPageTokens = 128;

// Of the codes of the rows that a warp holds.
template <int kDim>
using CompressCodes = CodeStage<kDim, Lanes<kDim>::kRows>;

// What the warps of a CTA share about their page.
template <int kDim>
struct CompressShared {
  uint16_t stage[kStoreWarps]
                [CompressCodes<kDim>::kSize];            // packed values of the rows a warp holds, or codes
  uint32_t kept[kMaxPageTokens * Lanes<kDim>::kPerRow];  // by row and lane of the row
  uint32_t offsets[kMaxPageTokens + 1];                  // counts at first, then where rows start
};

// Channels that are neither +0 nor -0.
template <int kDim>
__device__ __forceinline__ uint32_t nonzero(const uint32_t (&words)[Lanes<kDim>::kWords]) {
  uint32_t kept = 0;
#pragma unroll
  for (int m = 0; m < Lanes<kDim>::kWords; ++m) {
    // Adding 0x7FFF to a magnitude carries into the sign's place unless it is 0.
    const uint32_t flags = (words[m] & 0x7FFF7FFFu) + 0x7FFF7FFFu;
    kept |= (flags >> 15 & 1) << (2 * m) | (flags >> 31) << (2 * m + 1);
  }
  return kept;
}

// Turns the counts of the rows into their starts; returns the total. Called by one whole warp.
__device__ __forceinline__ uint32_t place_rows(uint32_t* offsets, int rows, int lane) {
  constexpr int kPerLane = kMaxPageTokens / 32;
  uint32_t counts[kPerLane];
  uint32_t sum = 0;
#pragma unroll
  for (int i = 0; i < kPerLane; ++i) {
    const int row = lane * kPerLane + i;
    counts[i] = row < rows ? offsets[row] : 0;
    sum += counts[i];
  }
  uint32_t through = sum;
#pragma unroll
  for (int offset = 1; offset < 32; offset *= 2) {
    const uint32_t left = __shfl_up_sync(kFullWarp, through, offset);
    through += lane >= offset ? left : 0;
  }
  uint32_t start = through - sum;
#pragma unroll
  for (int i = 0; i < kPerLane; ++i) {
    const int row = lane * kPerLane + i;
    if (row < rows) {
      offsets[row] = start;
    }
    start += counts[i];
  }
  const uint32_t total = __shfl_sync(kFullWarp, through, 31);
  if (lane == 0) {
    offsets[rows] = total;
  }
  return total;
}

template <typename T, int kDim>
__device__ __forceinline__ void compress(const CompressParams& p, CompressShared<kDim>& shared) {
  using L = Lanes<kDim>;
  const int lane = threadIdx.x % 32;
  const int warp = threadIdx.x / 32;
  const int t = lane % L::kPerRow;
  const int head = blockIdx.x % static_cast<uint32_t>(p.heads);
  const int index = blockIdx.x / static_cast<uint32_t>(p.heads);
  const int64_t first = static_cast<int64_t>(index) * p.page_tokens;
  const int32_t number = p.page_numbers[index];
  const auto chunk0 = [&](int row) {
    return p.x + (first + row) * p.x_token_stride + head * p.x_head_stride + 8 * t;
  };

  // What each row keeps, and how much that is. Rows past the last token are empty.
  for (int base = warp * L::kRows; base < p.page_tokens; base += kStoreWarps * L::kRows) {
    const int row = base + lane / L::kPerRow;
    uint32_t kept = 0;
    if (first + row < p.tokens) {
      if (p.mask != nullptr) {
        kept = load_kept<kDim>(p.mask + ((first + row) * p.heads + head) * (kDim / 8), t);
      } else {
        uint32_t words[L::kWords];
        load_chunks<kDim>(chunk0(row), words);
        kept = nonzero<kDim>(words);
      }
    }
    const uint32_t count = row_sum<L::kPerRow>(__popc(kept));
    shared.kept[row * L::kPerRow + t] = kept;
    if (t == 0) {
      shared.offsets[row] = count;
    }
  }
  __syncthreads();
  if (warp == 0) {
    const uint32_t total = place_rows(shared.offsets, p.page_tokens, lane);
    if (lane == 0 && p.needed != nullptr) {
      p.needed[static_cast<int64_t>(index) * p.heads + head] = total;
    }
  }
  __syncthreads();
  const bool fits = shared.offsets[p.page_tokens] <= static_cast<uint32_t>(p.capacity);
  if (!fits || static_cast<uint32_t>(number) >= static_cast<uint32_t>(p.num_pages)) {
    if (threadIdx.x == 0 && p.errors != nullptr) {
      atomicAdd(p.errors, 1u);
    }
    return;
  }

  uint8_t* const page = p.pool.pages + number * p.pool.page_stride_bytes + head * p.pool.head_stride_bytes;
  const bool coded = has_codes(p.pool.value_type);
  uint16_t* const values = reinterpret_cast<uint16_t*>(page + p.pool.values_offset_bytes);
  uint8_t* const codes = page + p.pool.values_offset_bytes;
  uint16_t* const scales = coded ? values - p.page_tokens : values;
  // Row offsets as 16-bit numbers, and zeros up to the next section.
  uint16_t* const offsets = reinterpret_cast<uint16_t*>(page + p.page_tokens * (kDim / 8));
  for (int i = threadIdx.x; offsets + i < scales; i += 32 * kStoreWarps) {
    offsets[i] = i <= p.page_tokens ? static_cast<uint16_t>(shared.offsets[i]) : 0;
  }
  // What no row uses becomes zero too, up to the page's end on 16 bytes: equal rows give equal pages.
  const int total = shared.offsets[p.page_tokens];
  if (coded) {
    for (int i = total + threadIdx.x; i < ((p.capacity + 15) & -16); i += 32 * kStoreWarps) {
      codes[i] = 0;
    }
  } else {
    for (int i = total + threadIdx.x; i < ((p.capacity + 7) & -8); i += 32 * kStoreWarps) {
      values[i] = 0;
    }
  }
  for (int base = warp * L::kRows; base < p.page_tokens; base += kStoreWarps * L::kRows) {
    const int row = base + lane / L::kPerRow;
    const uint32_t kept = shared.kept[row * L::kPerRow + t];
    const uint32_t bitmap = to_bitmap<kDim>(kept, t);
    if (t < kDim / 32) {
      reinterpret_cast<uint32_t*>(page + row * (kDim / 8))[bitmap_word<kDim>(t)] = bitmap;
    }
    uint32_t count;
    const uint32_t starts = chunk_starts<kDim>(kept, t, count);
    const uint32_t run = shared.offsets[base];
    const int run_size = shared.offsets[base + L::kRows] - run;
    const int at = shared.offsets[row] - run;
    uint16_t* const packed = shared.stage[warp] + (coded ? 0 : run_shift(values + run));
    uint16_t* const row_values = coded ? shared.stage[warp] + CompressCodes<kDim>::kRowsAt +
                                             lane / L::kPerRow * CompressCodes<kDim>::kRow
                                       : packed + at;
    if (first + row < p.tokens) {
      uint32_t words[L::kWords];
      load_chunks<kDim>(chunk0(row), words);
      pack_chunks<kDim>(words, kept, starts, row_values);
    }
    if (coded) {
      if (t == 0) {
        row_values[count] = 0;
      }
      __syncwarp();
      uint8_t* const packed_codes = reinterpret_cast<uint8_t*>(shared.stage[warp]) + run_shift(codes + run);
      const uint16_t scale =
          encode_row<T, L::kPerRow>(packed_codes + at, row_values, count, p.pool.value_type, t);
      if (t == 0) {
        scales[row] = scale;
      }
      __syncwarp();
      copy_run(codes + run, packed_codes, run_size, lane);
    } else {
      __syncwarp();
      copy_run(values + run, packed, run_size, lane);
    }
    __syncwarp();  // the next rows reuse the stage
  }
}

}  // namespace mustafar

#define MST_VARIANT(dtype, dim)                                                                \
  extern "C" __global__ void __launch_bounds__(32 * mustafar::kStoreWarps)                     \
      mst_compress_##dtype##_d##dim(const __grid_constant__ mustafar::CompressParams params) { \
    __shared__ __align__(16) mustafar::CompressShared<dim> shared;                             \
    mustafar::compress<mustafar::dtype, dim>(params, shared);                                  \
  }
#include "variants.inc"
#undef MST_VARIANT
