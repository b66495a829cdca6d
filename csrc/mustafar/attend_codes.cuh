// Decode attention over compressed pages with 8-bit values, in the way of attend.cuh. Scales never meet the
// codes: a key's multiplies its score, a value's its probability.
#pragma once

#include "mustafar/attend.cuh"
#include "mustafar/code_pages.cuh"

namespace mustafar {

// Registers that a thread needs on top of those for 16-bit values.
template <typename Codes>
constexpr int code_registers() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 1000
  return Codes::kInteger ? 0 : 1;
#else
  return 0;
#endif
}

template <int D, int kRows, typename Codes>
struct CodeWarp : Warp<f16, D, kRows> {
  using Base = Warp<f16, D, kRows>;
  using Base::kTiles, Base::kProducts;
  using Base::p, Base::view, Base::lane, Base::g, Base::t, Base::q, Base::softmax, Base::out;

  static constexpr int kScales = 2 * Rows<kRows>::kTokenTiles;  // tokens that the lane has scores of

  const LaneTable table;
  float unit[kTiles][2];     // what a product of codes and a query of the lane's columns is a multiple of
  float weights[kTiles][2];  // sums of what codes were multiplied by, over the lane's tokens

  __device__ __forceinline__ CodeWarp(const AttendParams& params, const View& shared_view, int warp_index,
                                      const CodeTable& codes)
      : Base(params, shared_view, warp_index), table(codes, this->lane) {
#pragma unroll
    for (int n = 0; n < kTiles; ++n) {
      weights[n][0] = weights[n][1] = 0.0f;
    }
  }

  // Channels 2 pair and 2 pair + 1 of the lane's run in word k of the first column tile, as loaded.
  __device__ __forceinline__ float2 query_pair(int k, int pair) const {
    const uint32_t bits = q[0][k][pair];
    const uint16_t low = static_cast<uint16_t>(bits), high = static_cast<uint16_t>(bits >> 16);
    return p.q_dtype == kBf16 ? make_float2(bf16::to_float(low), bf16::to_float(high))
                              : make_float2(f16::to_float(low), f16::to_float(high));
  }

  // Queries as operands, and what goes with them. Column tiles take turns in the place of the first, so that
  // code that runs once is there once.
  __device__ __forceinline__ void finish_code_queries(int batch, int head) {
#pragma unroll 1
    for (int n = 0; n < kTiles; ++n) {
      finish_first_queries(batch, head);
      if constexpr (kTiles == 2) {
        exchange_tiles();
      }
    }
  }

  __device__ __forceinline__ void exchange_tiles() {
    const auto exchange = [](auto& first, auto& second) {
      const auto kept = first;
      first = second;
      second = kept;
    };
#pragma unroll
    for (int k = 0; k < D / 32; ++k) {
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        exchange(q[0][k][j], q[1][k][j]);
      }
    }
#pragma unroll
    for (int j = 0; j < 2; ++j) {
      exchange(unit[0][j], unit[1][j]);
      exchange(this->key_center[0][j], this->key_center[1][j]);
    }
  }

  __device__ __forceinline__ void finish_first_queries(int batch, int head) {
    const float* center = p.center;
    if (center != nullptr) {
      center += batch * p.center_batch_stride + head * D + 8 * t;
    }
    float sum = 0.0f, dot = 0.0f, largest = 0.0f;
#pragma unroll
    for (int k = 0; k < D / 32; ++k) {
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const float2 x = query_pair(k, j);
        sum += x.x + x.y;
        largest = fmaxf(largest, fmaxf(fabsf(x.x), fabsf(x.y)));
        if (center != nullptr) {
          dot += x.x * center[32 * k + 2 * j] + x.y * center[32 * k + 2 * j + 1];
        }
      }
    }
    Base::columns_of(dot, this->key_center[0]);
    if constexpr (Codes::kInteger) {
      quantise_queries(largest, sum);
    } else {
      to_f16_queries();
    }
    if (p.softcap == 0.0f) {
      const float factor = p.scale * kLog2e;
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        unit[0][j] *= factor;
        this->key_center[0][j] *= factor;
      }
    }
  }

  __device__ __forceinline__ void to_f16_queries() {
#pragma unroll
    for (int k = 0; k < D / 32; ++k) {
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const float2 x = query_pair(k, j);
        q[0][k][j] = f16::pack(x.y, x.x);  // the even channel in the high half, see expand_codes.cuh
      }
    }
    unit[0][0] = unit[0][1] = Codes::kUnit;
  }

  // Each query row as a factor times integers of two bytes: q[0][k] gets the high bytes of the first and of
  // the second four channels and then the low ones; of four rows, which fill the columns twice, the high
  // bytes in the lower columns and the low ones in the upper. `sum` is not finite if a query is not.
  __device__ __forceinline__ void quantise_queries(float largest, float sum) {
    constexpr float kLargest = 32512.0f;  // 127 * 256
    largest = fmaxf(largest, __shfl_xor_sync(0xffffffffu, largest, 1));
    largest = fmaxf(largest, __shfl_xor_sync(0xffffffffu, largest, 2));
    const float row_unit = fmaxf(largest, 1e-30f) / kLargest;
    const float inverse = 1.0f / row_unit;
#pragma unroll
    for (int k = 0; k < D / 32; ++k) {
      uint32_t high[2], low[2];
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        high[half] = low[half] = 0;
#pragma unroll
        for (int j = 0; j < 2; ++j) {
          const float2 x = query_pair(k, 2 * half + j);
          const int first = __float2int_rn(x.x * inverse), second = __float2int_rn(x.y * inverse);
          // Codes have the odd channel of a pair first.
          high[half] |= byte_at((second + 128) >> 8, 2 * j) | byte_at((first + 128) >> 8, 2 * j + 1);
          low[half] |= byte_at(second, 2 * j) | byte_at(first, 2 * j + 1);
        }
      }
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        q[0][k][half] = kRows == 4 && g >= 4 ? low[half] : high[half];
        q[0][k][2 + half] = low[half];
      }
    }
    float rest[2];  // 0, and NaN where a query is not finite
    Base::columns_of(sum - sum, rest);
    unit[0][0] = __shfl_sync(0xffffffffu, row_unit, 8 * t) + rest[0];
    unit[0][1] = __shfl_sync(0xffffffffu, row_unit, 8 * t + 4) + rest[1];
  }

  template <typename Order>
  __device__ __forceinline__ int scale_token(int r) const {
    return Order::row_of(Rows<kRows>::token(r / 2, 2 * (r % 2), g, t));
  }

  static __device__ __forceinline__ uint32_t byte_at(int value, int i) {
    return static_cast<uint32_t>(value & 0xff) << 8 * i;
  }

  // Products of the queries and the codes of a tile.
  template <typename Keys>
  __device__ __forceinline__ void multiply_keys(const Keys& keys, Scores<kRows>& scores) const {
    if constexpr (!Codes::kInteger) {
      constexpr float kNoStart[kTiles][2] = {};
      score_tile<f16, D, kRows>(keys, q, kNoStart, scores, g, t);
      return;
    }
    constexpr int kParts = kRows == 4 ? 1 : 2;  // products of high and of low bytes
    int32_t products[2][kTiles][kParts][4] = {};
#pragma unroll
    for (int m = 0; m < 2; ++m) {
      auto upper = keys.row(16 * m + g, false);
      auto lower = keys.row(16 * m + g + 8, true);
#pragma unroll
      for (int k = 0; k < D / 32; ++k) {
        uint32_t a[2], b[2];
        upper.next_codes(k, a);
        lower.next_codes(k, b);
#pragma unroll
        for (int n = 0; n < kTiles; ++n) {
#pragma unroll
          for (int part = 0; part < kParts; ++part) {
            mma_s8(products[m][n][part], a[0], b[0], a[1], b[1], q[n][k][2 * part], q[n][k][2 * part + 1]);
          }
        }
      }
    }
#pragma unroll
    for (int n = 0; n < kTiles; ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        if constexpr (kRows == 4) {
          // The lower lanes of a quad have the high products of all tokens, the upper ones the low products.
          const bool is_high = t < 2;
          const int32_t first = products[0][n][0][i], second = products[1][n][0][i];
          const int32_t other = __shfl_xor_sync(0xffffffffu, is_high ? second : first, 2);
          scores[0][n][i] = static_cast<float>(is_high ? 256 * first + other : 256 * other + second);
        } else {
#pragma unroll
          for (int m = 0; m < 2; ++m) {
            scores[m][n][i] = static_cast<float>(256 * products[m][n][0][i] + products[m][n][kParts - 1][i]);
          }
        }
      }
    }
  }

  // As Warp::attend_pages. `Pages` is CodePages or RaggedCodePages.
  template <typename Pages>
  __device__ __forceinline__ void attend_pages(int batch, int head, int q_begin, Range part, int position,
                                               uint32_t key_slot) {
    const uint32_t value_slot = key_slot + Pages::key_slot_bytes(p.k, p.sequences.page_tokens);
    const PageTable table_row(p.sequences, batch);
    const typename Pages::Copier key_copier(p.k, head, key_slot, lane, Pages::kKeyCodesAt);
    const typename Pages::Copier value_copier(p.v, head, value_slot, lane, Pages::kValueCodesAt);
    const typename Pages::Scales scale_copier(p, head, key_slot + Pages::kScalesAt, lane);
    const Range unmasked = seen_by_all<kRows>(view, part, position);
    const int page_tokens = p.sequences.page_tokens;

    // Copies go in the order of Warp::attend_pages.
    int token = part.begin + this->warp * kTileTokens;
    typename Pages::Next next(p, table_row, head, token, part.end, lane);
    if (p.q_dtype == kBf16) {
      Base::template load_queries<bf16>(head, q_begin);
    } else {
      Base::template load_queries<f16>(head, q_begin);
    }
    scale_copier.copy(next.scales(), page_tokens, token, part.end, lane);
    key_copier.copy(p.k, next.key(), page_tokens, token, part.end, lane);
    value_copier.copy(p.v, next.value(), page_tokens, token, part.end, lane);
    next.advance(p, table_row, head, token + kStep, part.end, lane);
    finish_code_queries(batch, head);
#pragma unroll 1
    for (; token < part.end; token += kStep) {
      const bool masked = token < unmasked.begin || token + kTileTokens > unmasked.end;
      Scores<kRows> scores;
      copy_wait<1>();
      __syncwarp();
      multiply_keys(typename Pages::Keys{p.k, key_slot, table, t}, scores);
      float key_scale[kScales], value_scale[kScales];
#pragma unroll
      for (int r = 0; r < kScales; ++r) {
        key_scale[r] = load_scale(key_slot + Pages::kScalesAt, scale_token<Pages>(r));
        value_scale[r] = load_scale(key_slot + Pages::kScalesAt + kScaleBytes, scale_token<Pages>(r));
      }
      __syncwarp();
      scale_copier.copy(next.scales(), page_tokens, token + kStep, part.end, lane);
      key_copier.copy(p.k, next.key(), page_tokens, token + kStep, part.end, lane);
      Base::each_score(scores, [&](float s, int m, int n, int i) {
        return s * key_scale[2 * m + i / 2] * unit[n][i & 1] + this->key_center[n][i & 1];
      });
      if (p.softcap != 0.0f) {
        Base::scale_scores(scores);
      }
      if (masked) {
        Base::template mask_scores<Pages>(scores, position + token, position + part.end);
        const uint32_t visible = view.template visible_rows<kRows>(position + token, position + part.end);
#pragma unroll
        for (int r = 0; r < kScales; ++r) {
          value_scale[r] = visible >> scale_token<Pages>(r) & 1u ? value_scale[r] : 0.0f;
        }
      }
      softmax.template update<D>(scores, value_scale, out, weights);
      copy_wait<1>();
      __syncwarp();
      if (masked) {
        clear_rows<D, Pages>(value_slot,
                             view.template visible_rows<kRows>(position + token, position + part.end), lane);
      }
      accumulate_tile<f16, D, kRows>(typename Pages::Values{p.v, value_slot, table, g}, scores, out, g, t);
      __syncwarp();
      value_copier.copy(p.v, next.value(), page_tokens, token + kStep, part.end, lane);
      next.advance(p, table_row, head, token + 2 * kStep, part.end, lane);
    }
    finish_output();
  }

  // From pairs as products have them to numbers.
  __device__ __forceinline__ void finish_output() {
    if constexpr (Codes::kBias != 0.0f) {
      softmax.finish(weights);
    }
#pragma unroll
    for (int i = 0; i < kProducts; ++i) {
#pragma unroll
      for (int n = 0; n < kTiles; ++n) {
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          if constexpr (Codes::kBias != 0.0f) {
            out[i][n][e] -= Codes::kBias * weights[n][e & 1];
          }
          out[i][n][e] *= Codes::kUnit;
        }
      }
    }
  }
};

// Whether items of dense tokens have the end of the kernel to themselves: else the compiler lacks registers
// for fewer channels, and for 256 then.
template <int D>
constexpr bool kFinishesDense = D < 256;

// That end of theirs.
template <typename T, int D, int kRows>
__device__ __forceinline__ void finish_dense(const AttendParams& p, const Item& item, const float* merged) {
  if constexpr (kFinishesDense<D>) {
    __syncthreads();
    write_partials<D, kRows>(p, item, merged, [&](Range seen, int64_t query, int64_t result, float lse) {
      return write_exact<T, D, T>(p, item, seen, query, result, lse);
    });
  }
}

template <int D, int kRows, typename Codes, typename Pages = CodePages<D, Codes>>
__device__ __forceinline__ void attend_codes(const AttendParams& p) {
  MST_DYNAMIC_SHARED(shared);
  Item& item = shared_item();
  __shared__ CodeTable table;
  const int warp = uniform(threadIdx.x / 32);
  allow_next_kernel();
  table.fill(threadIdx.x, 32 * kWarps);
  if (!begin_item<kRows>(p, item)) {
    return;
  }
  float* merged = reinterpret_cast<float*>(shared);
  if (item.dense) {
    if (p.dense_dtype == kBf16) {
      attend_dense<bf16, D, kRows>(p);
      finish_dense<bf16, D, kRows>(p, item, merged);
    } else {
      attend_dense<f16, D, kRows>(p);
      finish_dense<f16, D, kRows>(p, item, merged);
    }
    if constexpr (kFinishesDense<D>) {
      return;
    }
  } else {
    CodeWarp<D, kRows, Codes> w(p, item.view, warp, table);
    const int page_tokens = p.sequences.page_tokens;
    const int slots = Pages::key_slot_bytes(p.k, page_tokens) + Pages::value_slot_bytes(p.v, page_tokens);
    const uint32_t key_slot = shared_address(shared) + warp * slots;
    w.template attend_pages<Pages>(blockIdx.y, blockIdx.x % p.kv_heads, item.q_begin, item.part[0],
                                   item.position[0], key_slot);
    __syncthreads();
    w.template store<CodeChannels<D>>(merged + threadIdx.x / 32 * kRows * (D + 2));
  }
  __syncthreads();
  write_partials<D, kRows>(p, item, merged, [&](Range seen, int64_t query, int64_t result, float lse) {
    if (kFinishesDense<D> || !item.dense) {
      return write_exact<f16, D, Codes>(p, item, seen, query, result, lse);
    }
    return p.dense_dtype == kBf16 ? write_exact<bf16, D, bf16>(p, item, seen, query, result, lse)
                                  : write_exact<f16, D, f16>(p, item, seen, query, result, lse);
  });
}

}  // namespace mustafar
