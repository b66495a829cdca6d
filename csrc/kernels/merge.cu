// Combining partial attention results: mst_combine over the items of one attend, mst_merge over two
// results.
#include "mustafar/attend_params.h"
#include "mustafar/dtype.cuh"
#include "mustafar/softmax.cuh"

namespace mustafar {
namespace {

constexpr int kCombineWarps = 8;
constexpr int kMaxDim = 256;

__device__ const float4 kZeros[kMaxDim / 4] = {};

// Each warp sums every eighth item with a running maximum, then the warps are added. The order is fixed, so
// the result is reproducible. A lane has kChunks groups of 4 channels: 4 * lane, 128 + 4 * lane.
//
// Where it starts while attend still runs, a block goes through all of it once with zeros and writes
// nothing: instructions and parameters, which would come from memory one after the other, are at hand when
// the partial results are.
template <int kChunks>
__device__ __forceinline__ void combine(const CombineParams& p) {
  constexpr int kUnroll = 4 / kChunks;  // items of a warp at a time
  __shared__ float4 sums[kCombineWarps][32 * kChunks];
  __shared__ float weights[kCombineWarps];
  __shared__ float tops[kCombineWarps];
  const int lane = threadIdx.x % 32;
  const int warp = threadIdx.x / 32;
  const int64_t result = static_cast<int64_t>(blockIdx.y) * gridDim.x + blockIdx.x;
  const int64_t at = blockIdx.y * p.out_token_stride + blockIdx.x * p.out_head_stride;
#pragma unroll 1
  for (int rehearsals = p.rehearse; rehearsals >= 0; --rehearsals) {
    const bool final = rehearsals == 0;
    const int items = final ? p.items : 1;
    const float* lse = reinterpret_cast<const float*>(kZeros);
    const float4* out = kZeros;
    if (final) {
      lse = p.partial_lse + result * p.items;
      out = reinterpret_cast<const float4*>(p.partial_out) + result * p.items * (p.dim / 4);
      wait_for_previous_kernel();
    }
    float top = kLowest;
    float weight_sum = 0.0f;
    float4 sum[kChunks] = {};
#pragma unroll 1
    for (int begin = 0; begin < items; begin += kCombineWarps * kUnroll) {
      const int base = begin + warp;
      // Everything is asked for before anything is waited for. The last item stands for those behind it, and
      // the last channels for those behind them.
      float4 values[kUnroll][kChunks];
#pragma unroll
      for (int j = 0; j < kUnroll; ++j) {
        const int item = min(base + kCombineWarps * j, items - 1);
#pragma unroll
        for (int c = 0; c < kChunks; ++c) {
          const int four = min(32 * c + lane, p.dim / 4 - 1);
          values[j][c] = out[item * (p.dim / 4) + four];
        }
      }
      __syncwarp();  // or the compiler would have these asked for after the others have arrived
      float item_lse[kUnroll];
      float new_top = top;
#pragma unroll
      for (int j = 0; j < kUnroll; ++j) {
        item_lse[j] = lse[min(base + kCombineWarps * j, items - 1)];
      }
#pragma unroll
      for (int j = 0; j < kUnroll; ++j) {
        item_lse[j] = base + kCombineWarps * j < items ? item_lse[j] : -INFINITY;
        new_top = fmaxf(new_top, item_lse[j]);
      }
      const float scale = exp2_approx(top - new_top);
      top = new_top;
      weight_sum *= scale;
#pragma unroll
      for (int c = 0; c < kChunks; ++c) {
        sum[c].x *= scale;
        sum[c].y *= scale;
        sum[c].z *= scale;
        sum[c].w *= scale;
      }
#pragma unroll
      for (int j = 0; j < kUnroll; ++j) {
        // Where nothing was written the log-sum-exp is -inf and the values may be anything. One that
        // underflows is multiplied all the same, and so is one of kLowest, which stands for 0: values may be
        // infinite or NaN.
        const float weight = item_lse[j] <= kLowest ? 0.0f : exp2_approx(item_lse[j] - top);
        weight_sum += weight;
#pragma unroll
        for (int c = 0; c < kChunks; ++c) {
          if (item_lse[j] != -INFINITY) {
            sum[c].x += weight * values[j][c].x;
            sum[c].y += weight * values[j][c].y;
            sum[c].z += weight * values[j][c].z;
            sum[c].w += weight * values[j][c].w;
          }
        }
      }
    }
#pragma unroll
    for (int c = 0; c < kChunks; ++c) {
      sums[warp][32 * c + lane] = sum[c];
    }
    if (lane == 0) {
      weights[warp] = weight_sum;
      tops[warp] = top;
    }
    __syncthreads();
#pragma unroll
    for (int i = 0; i < kCombineWarps; ++i) {
      top = fmaxf(top, tops[i]);
    }
    const int channel = min(static_cast<int>(threadIdx.x), p.dim - 1);
    float value = 0.0f;
    weight_sum = 0.0f;
#pragma unroll
    for (int i = 0; i < kCombineWarps; ++i) {
      const float scale = exp2_approx(tops[i] - top);
      weight_sum += scale * weights[i];
      value += scale * reinterpret_cast<const float*>(sums[i])[channel];
    }
    const bool empty = weight_sum == 0.0f;
    value = empty ? 0.0f : __fdividef(value, weight_sum);
    if (final && static_cast<int>(threadIdx.x) < p.dim) {
      store_from_float(p.out, at + channel, p.out_dtype, value);
    }
    if (final && p.lse != nullptr && threadIdx.x == 0) {
      p.lse[blockIdx.y * p.lse_token_stride + blockIdx.x * p.lse_head_stride] =
          empty ? -INFINITY : (top + log2f(weight_sum)) * kLn2;
    }
    __syncthreads();
  }
}

}  // namespace
}  // namespace mustafar

extern "C" __global__ void __launch_bounds__(32 * mustafar::kCombineWarps)
    mst_combine(const __grid_constant__ mustafar::CombineParams p) {
  if (p.dim <= 128) {
    mustafar::combine<1>(p);
  } else {
    mustafar::combine<2>(p);
  }
}

// +inf as a log-sum-exp means "no tokens", as -inf does.
static __device__ __forceinline__ float operand_lse(const mustafar::MergeOperand& operand, int64_t token,
                                                    int64_t head) {
  const float lse = operand.lse[token * operand.lse_token_stride + head * operand.lse_head_stride];
  return lse == INFINITY ? -INFINITY : lse;
}

extern "C" __global__ void __launch_bounds__(128) mst_merge(const __grid_constant__ mustafar::MergeParams p) {
  using namespace mustafar;
  const int64_t token = blockIdx.y;
  const int64_t head = blockIdx.x;
  const float a_lse = operand_lse(p.a, token, head);
  const float b_lse = operand_lse(p.b, token, head);
  const float top = fmaxf(a_lse, b_lse);
  // An operand without tokens is not read: its values may be anything. One whose weight underflows is: they
  // may be infinite or NaN.
  const float a_weight = a_lse == -INFINITY ? 0.0f : expf(a_lse - top);
  const float b_weight = b_lse == -INFINITY ? 0.0f : expf(b_lse - top);
  const float sum = a_weight + b_weight;
  const int64_t a_at = token * p.a.token_stride + head * p.a.head_stride;
  const int64_t b_at = token * p.b.token_stride + head * p.b.head_stride;
  const int64_t at = token * p.out_token_stride + head * p.out_head_stride;
  for (int c = threadIdx.x; c < p.dim; c += blockDim.x) {
    const float a = a_lse == -INFINITY ? 0.0f : a_weight * load_as_float(p.a.values, a_at + c, p.a.dtype);
    const float b = b_lse == -INFINITY ? 0.0f : b_weight * load_as_float(p.b.values, b_at + c, p.b.dtype);
    store_from_float(p.out, at + c, p.out_dtype, sum == 0.0f ? 0.0f : (a + b) / sum);
  }
  if (p.lse != nullptr && threadIdx.x == 0) {
    p.lse[token * p.lse_token_stride + head * p.lse_head_stride] = sum == 0.0f ? -INFINITY : top + logf(sum);
  }
}
