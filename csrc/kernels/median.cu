// median: the lower median of each channel over many tokens, the key centre of a cache.
//
// A CTA takes 32 channels of a head and looks twice at every token: first it counts the upper bytes of the
// values, in an order that integers have, then the lower bytes of those that share the median's upper byte.
#include "mustafar/cache_params.h"
#include "mustafar/dtype.cuh"

namespace mustafar {
namespace {

constexpr int kBuckets = 256;

// Orders the bits of a sign-magnitude float as unsigned integers.
__device__ __forceinline__ uint32_t to_key(uint16_t bits) {
  return bits & 0x8000u ? ~bits & 0xFFFFu : bits | 0x8000u;
}

__device__ __forceinline__ uint16_t from_key(uint32_t key) {
  return static_cast<uint16_t>(key & 0x8000u ? key ^ 0x8000u : ~key);
}

// Counts in counts[bucket][channel] what `bucket_of` makes of the keys; negative buckets are left out.
template <typename F>
__device__ __forceinline__ void count_keys(const MedianParams& p, uint32_t (*counts)[kMedianChannels],
                                           F bucket_of) {
  const int channel = threadIdx.x % kMedianChannels;
  const int first = threadIdx.x / kMedianChannels;
  constexpr int kStep = kMedianThreads / kMedianChannels;
  for (int i = threadIdx.x; i < kBuckets * kMedianChannels; i += kMedianThreads) {
    counts[i / kMedianChannels][i % kMedianChannels] = 0;
  }
  __syncthreads();
  for (int i = 0; i < 2; ++i) {
    const MedianPart& part = p.part[i];
    const uint16_t* x = part.x + blockIdx.y * part.head_stride + blockIdx.x * kMedianChannels + channel;
#pragma unroll 4
    for (int token = first; token < part.tokens; token += kStep) {
      const int bucket = bucket_of(to_key(x[token * part.token_stride]));
      if (bucket >= 0) {
        atomicAdd(&counts[bucket][channel], 1u);
      }
    }
  }
  __syncthreads();
}

// The bucket in which the value of this rank lies; the rank becomes the one inside the bucket.
__device__ __forceinline__ int find_bucket(const uint32_t (*counts)[kMedianChannels], int channel,
                                           uint32_t& rank) {
  int bucket = 0;
  while (rank >= counts[bucket][channel]) {
    rank -= counts[bucket][channel];
    ++bucket;
  }
  return bucket;
}

}  // namespace
}  // namespace mustafar

extern "C" __global__ void __launch_bounds__(mustafar::kMedianThreads)
    mst_median(const __grid_constant__ mustafar::MedianParams p) {
  using namespace mustafar;
  __shared__ uint32_t counts[kBuckets][kMedianChannels];
  __shared__ int upper[kMedianChannels];
  const int channel = threadIdx.x % kMedianChannels;
  const bool one_per_channel = threadIdx.x < kMedianChannels;
  uint32_t rank = (static_cast<uint32_t>(p.part[0].tokens) + p.part[1].tokens - 1) / 2;

  count_keys(p, counts, [](uint32_t key) { return static_cast<int>(key >> 8); });
  if (one_per_channel) {
    upper[channel] = find_bucket(counts, channel, rank);
  }
  __syncthreads();
  const int mine = upper[channel];
  count_keys(p, counts, [mine](uint32_t key) {
    return static_cast<int>(key >> 8) == mine ? static_cast<int>(key & 255u) : -1;
  });
  if (one_per_channel) {
    const uint16_t bits = from_key(static_cast<uint32_t>(mine) << 8 | find_bucket(counts, channel, rank));
    p.out[blockIdx.y * p.dim + blockIdx.x * kMedianChannels + channel] =
        p.dtype == kF16 ? f16::to_float(bits) : bf16::to_float(bits);
  }
}
