// validate: check untrusted pages of a pool. One thread per row; the first violation in the order of
// sequence, head, page and row wins.

#include "mustafar/store_params.h"

namespace mustafar {

template <int kDim>
__device__ __forceinline__ uint32_t bits_of(const uint8_t* bitmap_row) {
  const uint32_t* words = reinterpret_cast<const uint32_t*>(bitmap_row);
  uint32_t count = 0;
#pragma unroll
  for (int i = 0; i < kDim / 32; ++i) {
    count += __popc(words[i]);
  }
  return count;
}

// What is wrong with a row.
template <int kDim>
__device__ __forceinline__ Violation violation(const ValidateParams& p, const uint8_t* page, int row) {
  const int count = static_cast<int>(bits_of<kDim>(page + row * (kDim / 8)));
  if (p.pool.keep > 0) {
    return count == p.pool.keep ? kNoViolation : kBitCount;
  }
  const uint16_t* offsets = reinterpret_cast<const uint16_t*>(page + p.sequences.page_tokens * (kDim / 8));
  const int begin = offsets[row];
  const int end = offsets[row + 1];
  if (row == 0 && begin != 0) {
    return kFirstOffset;
  }
  if (end - begin != count) {
    return kBitCount;
  }
  return end > p.capacity ? kCapacity : kNoViolation;
}

template <int kDim>
__device__ __forceinline__ void validate(const ValidateParams& p) {
  const SequencesParams& s = p.sequences;
  const int64_t max_pages = (static_cast<int64_t>(p.max_len) + s.page_tokens - 1) / s.page_tokens;
  const int64_t index = static_cast<int64_t>(blockIdx.x) * kValidateThreads + threadIdx.x;
  const int row = static_cast<int>(index % s.page_tokens);
  const int64_t page_index = index / s.page_tokens % max_pages;
  const int64_t row_of_lens = index / s.page_tokens / max_pages;  // sequence * heads + head
  if (row_of_lens >= static_cast<int64_t>(p.batch) * p.heads) {
    return;
  }
  const int64_t sequence = row_of_lens / p.heads;
  const int head = static_cast<int>(row_of_lens % p.heads);
  const int32_t len = s.lens[s.lens_per_head ? row_of_lens : sequence];
  Violation found = kNoViolation;
  if (len < 0 || len > p.max_len) {
    found = page_index == 0 && row == 0 ? kLength : kNoViolation;
  } else if (page_index * s.page_tokens + row < len) {
    const int64_t entry = sequence * s.table_stride + page_index;
    const int64_t number = s.table != nullptr ? s.table[entry] : entry;
    if (number < 0 || number >= p.num_pages) {
      found = kPageNumber;
    } else {
      const uint8_t* page =
          p.pool.pages + number * p.pool.page_stride_bytes + head * p.pool.head_stride_bytes;
      found = violation<kDim>(p, page, row);
    }
  }
  if (found != kNoViolation) {
    atomicMin(reinterpret_cast<unsigned long long*>(p.first),
              static_cast<unsigned long long>(index) * 8 + found);
  }
}

}  // namespace mustafar

#define MST_VARIANT(dtype, dim)                                                                \
  extern "C" __global__ void __launch_bounds__(mustafar::kValidateThreads)                     \
      mst_validate_##dtype##_d##dim(const __grid_constant__ mustafar::ValidateParams params) { \
    mustafar::validate<dim>(params);                                                           \
  }
#include "variants.inc"
#undef MST_VARIANT
