// What a Llama forward pass needs besides matrix products and attention over the cache. Compiled at run time,
// for the 16-bit type that the model computes in: f16, or bf16 with VALUE_BF16 defined. Includes nothing, so
// that NVRTC needs no headers. Norms, exponentials and the residual stream are float.

typedef unsigned short value;

#define MINUS_INFINITY __int_as_float(0xff800000)

__device__ __forceinline__ float widen(value bits) {
#ifdef VALUE_BF16
  return __uint_as_float(static_cast<unsigned int>(bits) << 16);
#else
  float x;
  asm("cvt.f32.f16 %0, %1;" : "=f"(x) : "h"(bits));
  return x;
#endif
}

__device__ __forceinline__ value narrow(float x) {
  value bits;
#ifdef VALUE_BF16
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(bits) : "f"(x));
#else
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(bits) : "f"(x));
#endif
  return bits;
}

struct Sum {
  __device__ static float join(float a, float b) { return a + b; }
};

struct Max {
  __device__ static float join(float a, float b) { return fmaxf(a, b); }
};

// Joins one number of each thread of a block of whole warps; every thread gets the result.
template <class How>
__device__ float join_block(float x) {
  __shared__ float parts[32];
  for (int step = 16; step > 0; step /= 2) {
    x = How::join(x, __shfl_xor_sync(~0u, x, step));
  }
  __syncthreads();  // `parts` may still be read by the call before
  if (threadIdx.x % 32 == 0) {
    parts[threadIdx.x / 32] = x;
  }
  __syncthreads();
  x = parts[0];
  for (int warp = 1; warp < blockDim.x / 32; ++warp) {
    x = How::join(x, parts[warp]);
  }
  return x;
}

// x[row] = table[tokens[row]], `hidden` numbers. A block per row.
extern "C" __global__ void embed(float* x, const value* table, const int* tokens, int hidden) {
  const value* from = table + static_cast<long long>(tokens[blockIdx.x]) * hidden;
  float* to = x + static_cast<long long>(blockIdx.x) * hidden;
  for (int i = threadIdx.x; i < hidden; i += blockDim.x) {
    to[i] = widen(from[i]);
  }
}

// out[row] = x[row] / rms(x[row]) * weight; `hidden` is a multiple of 4. A block per row.
extern "C" __global__ void rms_norm(value* out, const float4* x, const float4* weight, int hidden,
                                    float eps) {
  const float4* from = x + static_cast<long long>(blockIdx.x) * (hidden / 4);
  ushort4* to = reinterpret_cast<ushort4*>(out) + static_cast<long long>(blockIdx.x) * (hidden / 4);
  float sum = 0.0f;
  for (int i = threadIdx.x; i < hidden / 4; i += blockDim.x) {
    const float4 a = from[i];
    sum += a.x * a.x + a.y * a.y + a.z * a.z + a.w * a.w;
  }
  const float factor = rsqrtf(join_block<Sum>(sum) / hidden + eps);
  for (int i = threadIdx.x; i < hidden / 4; i += blockDim.x) {
    const float4 a = from[i];
    const float4 w = weight[i];
    to[i] = make_ushort4(narrow(a.x * factor * w.x), narrow(a.y * factor * w.y), narrow(a.z * factor * w.z),
                         narrow(a.w * factor * w.w));
  }
}

// Turns the adjacent pairs of queries and keys in rows [heads + 2 * kv_heads][dim] of `qkv`. With `dense_k`
// keys and values also go to dense tensors [sequences][capacity][kv_heads][dim]. The row is sequence `row` at
// positions[row]; without `positions` it is position `row` of `copies` sequences. Blocks (rows, heads + 2 *
// kv_heads), a thread per pair.
extern "C" __global__ void rope(value* qkv, const float2* turns, const int* positions, value* dense_k,
                                value* dense_v, long long capacity, int copies, int heads, int kv_heads,
                                int dim, int pairs) {
  const int row = blockIdx.x;
  const int head = blockIdx.y;
  const int pair = threadIdx.x;
  const int position = positions == nullptr ? row : positions[row];
  value* x = qkv + (static_cast<long long>(row) * gridDim.y + head) * dim + 2 * pair;
  value a = x[0];
  value b = x[1];
  if (head < heads + kv_heads && pair < pairs) {
    const float2 turn = turns[static_cast<long long>(position) * pairs + pair];
    const float old_a = widen(a);
    const float old_b = widen(b);
    a = narrow(old_a * turn.x - old_b * turn.y);
    b = narrow(old_a * turn.y + old_b * turn.x);
    x[0] = a;
    x[1] = b;
  }
  if (dense_k == nullptr || head < heads) {
    return;
  }
  const bool is_key = head < heads + kv_heads;
  value* dense = is_key ? dense_k : dense_v;
  const int kv_head = head - heads - (is_key ? 0 : kv_heads);
  const int first = positions == nullptr ? 0 : row;
  for (int sequence = first; sequence < first + copies; ++sequence) {
    value* to = dense + ((sequence * capacity + position) * kv_heads + kv_head) * dim + 2 * pair;
    to[0] = a;
    to[1] = b;
  }
}

// Softmax of scores [heads][rows][pitch], of which row r sees the first first + r + 1 and `seen` are to be
// written. Weights come out times 2^15: even 1 / 32768 is then a normal f16. `lse`, if any, gets the
// log-sum-exps [rows][lse_pitch]. Blocks (rows, heads).
extern "C" __global__ void causal_softmax(value* weights, const float* scores, float* lse, int first,
                                          int seen, long long pitch, int lse_pitch) {
  const long long row = (static_cast<long long>(blockIdx.y) * gridDim.x + blockIdx.x) * pitch;
  const int visible = first + blockIdx.x + 1;
  const float* from = scores + row;
  float max = MINUS_INFINITY;
  for (int i = threadIdx.x; i < visible; i += blockDim.x) {
    max = fmaxf(max, from[i]);
  }
  max = join_block<Max>(max);
  float sum = 0.0f;
  for (int i = threadIdx.x; i < visible; i += blockDim.x) {
    sum += __expf(from[i] - max);
  }
  sum = join_block<Sum>(sum);
  const float factor = 32768.0f / sum;
  for (int i = threadIdx.x; i < seen; i += blockDim.x) {
    weights[row + i] = narrow(i < visible ? __expf(from[i] - max) * factor : 0.0f);
  }
  if (lse != nullptr && threadIdx.x == 0) {
    lse[static_cast<long long>(blockIdx.x) * lse_pitch + blockIdx.y] = max + logf(sum);
  }
}

// The first halves of rows [gate | up], each `ffn` wide, become silu(gate) * up. Blocks (columns, rows).
extern "C" __global__ void silu_mul(value* gate_up, int ffn) {
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i < ffn) {
    value* gate = gate_up + static_cast<long long>(blockIdx.y) * 2 * ffn;
    const float x = widen(gate[i]);
    gate[i] = narrow(x / (1.0f + __expf(-x)) * widen(gate[ffn + i]));
  }
}

// tokens[row] = index of the largest of `vocab` logits, the first of equals; then the row moves on by one
// token. A block of 1024 threads per row.
extern "C" __global__ void pick(int* tokens, int* positions, int* lens, const float* __restrict__ logits,
                                int vocab) {
  constexpr int kTogether = 16;
  const float* row = logits + static_cast<long long>(blockIdx.x) * vocab;
  float best = MINUS_INFINITY;
  int at = vocab;
  for (int first = threadIdx.x; first < vocab; first += kTogether * blockDim.x) {
    float x[kTogether];  // so many loads under way at a time
#pragma unroll
    for (int k = 0; k < kTogether; ++k) {
      const int i = first + k * blockDim.x;
      x[k] = i < vocab ? row[i] : MINUS_INFINITY;
    }
#pragma unroll
    for (int k = 0; k < kTogether; ++k) {
      if (x[k] > best) {
        best = x[k];
        at = first + k * blockDim.x;
      }
    }
  }
  const float max = join_block<Max>(best);
  __shared__ int chosen;
  if (threadIdx.x == 0) {
    chosen = vocab;
  }
  __syncthreads();
  if (best == max) {
    atomicMin(&chosen, at);
  }
  __syncthreads();
  if (threadIdx.x == 0) {
    tokens[blockIdx.x] = chosen < vocab ? chosen : 0;  // no logit is a number: any token will do
    positions[blockIdx.x] += 1;
    lens[blockIdx.x] += 1;
  }
}

// Two normally distributed numbers from `index`: SplitMix64, then Box and Muller.
__device__ float2 normal_pair(unsigned long long seed, unsigned long long index) {
  unsigned long long z = seed + (index + 1) * 0x9e3779b97f4a7c15ull;
  z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9ull;
  z = (z ^ (z >> 27)) * 0x94d049bb133111ebull;
  z ^= z >> 31;
  const float scale = 1.0f / 4294967296.0f;
  const float radius = sqrtf(-2.0f * logf((static_cast<unsigned int>(z) + 0.5f) * scale));
  float sine, cosine;
  sincospif(2.0f * static_cast<unsigned int>(z >> 32) * scale, &sine, &cosine);
  return make_float2(radius * cosine, radius * sine);
}

// Random 16-bit numbers; `count` is even.
extern "C" __global__ void fill_normal(value* out, long long count, unsigned long long seed,
                                       float deviation) {
  for (long long i = blockIdx.x * static_cast<long long>(blockDim.x) + threadIdx.x; i < count / 2;
       i += static_cast<long long>(gridDim.x) * blockDim.x) {
    const float2 pair = normal_pair(seed, i);
    out[2 * i] = narrow(pair.x * deviation);
    out[2 * i + 1] = narrow(pair.y * deviation);
  }
}
