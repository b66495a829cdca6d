// Partial results that hold an infinity or NaN, once more without tensor cores.
//
// A product of matrices multiplies every value of a tile by something: by the zeros beside its probability,
// by the zero of a query that must not see it. An infinite value or NaN turns those zeros into NaN where the
// definition has no product at all. The result is then computed again token by token, which such inputs may
// cost.
#pragma once

#include "mustafar/codes.cuh"
#include "mustafar/dense.cuh"
#include "mustafar/ragged.cuh"
#include "mustafar/softmax.cuh"
#include "mustafar/view.cuh"

namespace mustafar {

// What a CTA works on, in shared memory: a range of the compressed tokens, or one of the sinks and one of the
// window.
struct Item {
  View view;
  int q_begin;  // query token 0 of the sequence
  int batch, head;
  bool dense;
  Range part[2];
  int position[2];  // of token 0 of the part's kind

  // The tokens of a part at the positions `seen`.
  __device__ __forceinline__ Range cut(int i, Range seen) const {
    return {max(part[i].begin, seen.begin - position[i]), min(part[i].end, seen.end - position[i])};
  }

  __device__ __forceinline__ bool any(Range seen) const {
    const Range first = cut(0, seen), second = cut(1, seen);
    return first.begin < first.end || second.begin < second.end;
  }
};

// That of the CTA. Functions that are not inlined get at it without a register for its address.
__device__ __forceinline__ Item& shared_item() {
  __shared__ Item item;
  return item;
}

// Channels lane, lane + 32, ... of a row.
template <int D>
using LaneRow = float[D / 32];

template <int D>
__device__ __forceinline__ void load_dense_row(const DenseSide& side, int64_t token, int lane,
                                               LaneRow<D>& row) {
#pragma unroll
  for (int i = 0; i < D / 32; ++i) {
    row[i] = load_as_float(side.base, token * side.token_stride + 32 * i + lane, side.dtype);
  }
}

// The number that a stored value stands for, without its row's scale.
template <typename Values>
__device__ __forceinline__ float stored_number(const uint8_t* packed, int index) {
  if constexpr (Values::kCode == kInt8) {
    return static_cast<int8_t>(packed[index]);
  } else if constexpr (Values::kCode == kE4m3) {
    return code_unit(kE4m3) * f16::to_float(static_cast<uint16_t>(e4m3_as_f16(packed[index])));
  } else {
    return Values::to_float(reinterpret_cast<const uint16_t*>(packed)[index]);
  }
}

// Dropped channels read as 0, and as NaN in a row whose scale is NaN.
template <typename Values, int D>
__device__ __forceinline__ void load_page_row(const AttendPool& pool, int head, int page, int page_tokens,
                                              int row, int lane, LaneRow<D>& values) {
  const uint8_t* from = pool.pages + head * pool.head_stride_bytes + page * pool.page_stride_bytes;
  const uint8_t* packed = from + pool.values_offset_bytes;
  int at = pool.row_bytes / (has_codes(Values::kCode) ? 1 : 2) * row;
  if (pool.row_bytes == 0) {
    at = reinterpret_cast<const uint16_t*>(from + page_tokens * (D / 8))[row];
  }
  float scale = 1.0f;
  if (has_codes(Values::kCode)) {
    scale = bf16::to_float(reinterpret_cast<const uint16_t*>(packed - 2 * page_tokens)[row]);
  }
  const uint32_t* bits = reinterpret_cast<const uint32_t*>(from + row * (D / 8));
#pragma unroll
  for (int i = 0; i < D / 32; ++i) {
    const uint32_t word = bits[i];
    // A damaged page must not lead out of itself.
    const int index = min(at + __popc(word & low_bits(lane)), pool.capacity - 1);
    values[i] = scale * (word >> lane & 1u ? stored_number<Values>(packed, index) : 0.0f);
    at += __popc(word);
  }
}

// What one row of a CTA's item gives, by one warp. T is the type of queries and dense tokens, Values that of
// what pages hold.
template <typename T, int D, typename Values>
struct ExactRow {
  const AttendParams& p;
  const int lane;
  const float lse;  // log2 of the sum of the item's weights
  float key_center;
  LaneRow<D> q;
  LaneRow<D> out;

  // The types that the tensor cores see: lse was computed from these.
  static __device__ __forceinline__ float rounded(float x) {
    return T::to_float(static_cast<uint16_t>(T::pack(x, 0.0f)));
  }

  __device__ __forceinline__ ExactRow(const AttendParams& params, int64_t query, const float* center,
                                      float item_lse)
      : p(params), lane(threadIdx.x % 32), lse(item_lse) {
    float dot = 0.0f;
#pragma unroll
    for (int i = 0; i < D / 32; ++i) {
      q[i] = rounded(load_as_float(p.q, query + 32 * i + lane, p.q_dtype));
      dot += center == nullptr ? 0.0f : q[i] * center[32 * i + lane];
      out[i] = 0.0f;
    }
    key_center = warp_sum(dot);
  }

  static __device__ __forceinline__ float warp_sum(float x) {
#pragma unroll
    for (int lanes = 1; lanes < 32; lanes *= 2) {
      x += __shfl_xor_sync(0xffffffffu, x, lanes);
    }
    return x;
  }

  __device__ __forceinline__ void add(const LaneRow<D>& k, const LaneRow<D>& v, float center) {
    float dot = 0.0f;
#pragma unroll
    for (int i = 0; i < D / 32; ++i) {
      dot += q[i] * k[i];
    }
    float score = (warp_sum(dot) + center) * p.scale;
    if (p.softcap != 0.0f) {
      score = p.softcap * tanhf(score / p.softcap);
    }
    // Where all scores are -inf the weights are 0, not NaN.
    const float weight = score == -INFINITY ? 0.0f : exp2f(score * kLog2e - lse);
#pragma unroll
    for (int i = 0; i < D / 32; ++i) {
      out[i] += weight * v[i];
    }
  }

  __device__ __forceinline__ void add_dense(const DenseParams& dense, const Item& item, Range part) {
    const DenseSides sides = DenseSides::of<T>(dense, item.batch, item.head);
#pragma unroll 1
    for (int token = part.begin; token < part.end; ++token) {
      LaneRow<D> k, v;
      load_dense_row<D>(sides.keys, token, lane, k);
      load_dense_row<D>(sides.values, token, lane, v);
#pragma unroll
      for (int i = 0; i < D / 32; ++i) {
        k[i] = rounded(k[i]);
      }
      add(k, v, 0.0f);
    }
  }

  __device__ __forceinline__ void add_pages(const Item& item, Range part) {
    const PageTable table(p.sequences, item.batch);
#pragma unroll 1
    for (int token = part.begin; token < part.end; ++token) {
      const int page = table.page(token);
      const int row = token & (table.page_tokens - 1);
      LaneRow<D> k, v;
      load_page_row<Values, D>(p.k, item.head, page, table.page_tokens, row, lane, k);
      load_page_row<Values, D>(p.v, item.head, page, table.page_tokens, row, lane, v);
      add(k, v, key_center);
    }
  }
};

// Writes partial result `result`: what the query row at `query`, which sees the positions `seen`, gets from
// the item. `lse` is the log-sum-exp (base 2) of its scores. Returns whether any of it is infinite or NaN.
// Call with a whole warp. Not inlined: the registers of the rare case must not weigh on the common one.
template <typename T, int D, typename Values>
__device__ __noinline__ bool write_exact(const AttendParams& p, const Item& item, Range seen, int64_t query,
                                         int64_t result, float lse) {
  const float* center = p.center;
  if (center != nullptr) {
    center += item.batch * p.center_batch_stride + item.head * D;
  }
  ExactRow<T, D, Values> row(p, query, center, lse);
  if (item.dense) {
    row.add_dense(p.sinks, item, item.cut(0, seen));
    row.add_dense(p.window, item, item.cut(1, seen));
  } else {
    row.add_pages(item, item.cut(0, seen));
  }
  bool finite = true;
#pragma unroll
  for (int i = 0; i < D / 32; ++i) {
    p.partial_out[result * D + 32 * i + row.lane] = row.out[i];
    finite &= isfinite(row.out[i]);
  }
  return __any_sync(0xffffffffu, !finite);
}

}  // namespace mustafar
