// Decode attention over sinks, compressed pages and dense window: partial results per item, see AttendParams.
//
// A CTA has 4 warps; each takes every fourth tile of 32 tokens of the CTA's item, with a key slot and a value
// slot of its own in shared memory and its own online softmax, so the loop has no CTA-wide barrier. The warps
// merge once, at the end.
#pragma once

#include "mustafar/exact.cuh"

namespace mustafar {

// Before compute capability 9.0 a thread needs a few registers more for the same code.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 900
constexpr int kBaseRegisters = 56;
#else
constexpr int kBaseRegisters = 52;
#endif

// CTAs per multiprocessor: as many as the register file has room for, by a formula that fits what the
// compiler needs without spilling. More than four were not faster. `extra` registers are what the pages take
// on top of uniform ones.
template <int D, int kRows>
constexpr int resident_ctas(int extra = 0) {
  constexpr int kTiles = Rows<kRows>::kTiles;
  constexpr int kOutTiles = kRows == 4 ? 1 : 2 * kTiles;
  // Rows of an odd number of bitmap words take more instructions, and registers, to address.
  constexpr int kOdd = D % 64 == 0 ? 0 : 5;
  constexpr int kRegisters = D / 8 * (kOutTiles + kTiles) + D / 4 + 12 * kTiles + kBaseRegisters + kOdd;
  const int ctas = 65536 / (32 * kWarps * (kRegisters + extra));
  return ctas < 4 ? ctas : 4;
}

// A value that is equal in all lanes, in a form in which the compiler knows it, so that what is computed from
// it can live in uniform registers. Call with the whole warp.
__device__ __forceinline__ int uniform(int value) { return __shfl_sync(0xffffffffu, value, 0); }

template <typename T, int D, int kRows>
struct Warp {
  static constexpr int kTiles = Rows<kRows>::kTiles;
  static constexpr int kProducts = kOutProducts<D, kRows>;

  const AttendParams& p;
  const View& view;
  const int warp, lane, g, t;
  float key_center[kTiles][2];  // q . c of the rows of this lane's columns
  Queries<D, kRows> q;
  Softmax<kRows> softmax;
  Output<D, kRows> out;

  __device__ __forceinline__ Warp(const AttendParams& params, const View& shared_view, int warp_index)
      : p(params), view(shared_view), warp(warp_index), lane(threadIdx.x % 32), g(lane / 4), t(lane % 4) {
    softmax.init();
#pragma unroll
    for (int i = 0; i < kProducts; ++i) {
#pragma unroll
      for (int n = 0; n < kTiles; ++n) {
        out[i][n][0] = out[i][n][1] = out[i][n][2] = out[i][n][3] = 0.0f;
      }
    }
  }

  // Asks for the queries, as pairs of Q. Nothing waits for them before finish_queries().
  template <typename Q = T>
  __device__ __forceinline__ void load_queries(int head, int q_begin) {
    const int row = view.row0 + Rows<kRows>::of_score(0, g);
    const DenseSide first = query_side<Q>(head, q_begin, row);
    // The last row stands for those behind it, whose results nobody reads.
    const DenseSide second = kTiles == 1 ? first : query_side<Q>(head, q_begin, min(row + 8, view.rows - 1));
#pragma unroll
    for (int n = 0; n < kTiles; ++n) {
#pragma unroll
      for (int k = 0; k < D / 32; ++k) {
        q[n][k][0] = q[n][k][1] = q[n][k][2] = q[n][k][3] = 0;
      }
    }
    // One branch for both rows, or one would wait for the other.
    if (row < view.rows && first.wide && second.wide) {
#pragma unroll
      for (int k = 0; k < D / 32; ++k) {
        first.load_wide(32 * k + 8 * t, q[0][k]);
        if constexpr (kTiles == 2) {
          second.load_wide(32 * k + 8 * t, q[1][k]);
        }
      }
    } else if (row < view.rows) {
#pragma unroll
      for (int k = 0; k < D / 32; ++k) {
        first.template load_any<Q>(32 * k + 8 * t, q[0][k]);
        if constexpr (kTiles == 2) {
          second.template load_any<Q>(32 * k + 8 * t, q[1][k]);
        }
      }
    }
  }

  template <typename Q>
  __device__ __forceinline__ DenseSide query_side(int head, int q_begin, int row) const {
    const int64_t token = q_begin + row / view.group;
    const int64_t q_head = head * view.group + row % view.group;
    return DenseSide::of<Q>(p.q, token * p.q_token_stride + q_head * p.q_head_stride, 0, p.q_dtype);
  }

  // Queries as operands, and their products with the key centre.
  __device__ __forceinline__ void finish_queries(int batch, int head) {
#pragma unroll
    for (int n = 0; n < kTiles; ++n) {
      float dot = 0.0f;
      if (p.center != nullptr) {
        const float* center = p.center + batch * p.center_batch_stride + head * D + 8 * t;
#pragma unroll
        for (int k = 0; k < D / 32; ++k) {
#pragma unroll
          for (int j = 0; j < 4; ++j) {
            dot += T::to_float(static_cast<uint16_t>(q[n][k][j])) * center[32 * k + 2 * j];
            dot += T::to_float(static_cast<uint16_t>(q[n][k][j] >> 16)) * center[32 * k + 2 * j + 1];
          }
        }
      }
      columns_of(dot, key_center[n]);
#pragma unroll
      for (int k = 0; k < D / 32; ++k) {
        swap_halves(q[n][k]);
      }
    }
  }

  // The sum over a quad of what its lanes have of the row in column g, for the columns 2t and 2t + 1.
  __device__ __forceinline__ void columns_of(float part, float (&sums)[2]) const {
    part += __shfl_xor_sync(0xffffffffu, part, 1);
    part += __shfl_xor_sync(0xffffffffu, part, 2);
    sums[0] = __shfl_sync(0xffffffffu, part, 8 * t);
    sums[1] = __shfl_sync(0xffffffffu, part, 8 * t + 4);
  }

  template <typename F>
  static __device__ __forceinline__ void each_score(Scores<kRows>& scores, F f) {
#pragma unroll
    for (int m = 0; m < Rows<kRows>::kTokenTiles; ++m) {
#pragma unroll
      for (int n = 0; n < kTiles; ++n) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          scores[m][n][i] = f(scores[m][n][i], m, n, i);
        }
      }
    }
  }

  // Raw dot products to scores in base 2.
  __device__ __forceinline__ void scale_scores(Scores<kRows>& scores) const {
    if (p.softcap == 0.0f) {
      const float factor = p.scale * kLog2e;
      each_score(scores, [&](float s, int, int, int) { return s * factor; });
    } else {
      // tanh(x) = 1 - 2 / (exp(2 x) + 1)
      const float inner = 2.0f * kLog2e * p.scale / p.softcap;
      const float outer = p.softcap * kLog2e;
      each_score(scores, [&](float s, int, int, int) {
        return outer * (1.0f - __fdividef(2.0f, exp2_approx(s * inner) + 1.0f));
      });
    }
  }

  // Sets to -inf what a row must not see of the tile at position `start`, and what is at or past `limit`.
  template <typename Order>
  __device__ __forceinline__ void mask_scores(Scores<kRows>& scores, int start, int limit) const {
    each_score(scores, [&](float s, int m, int n, int i) {
      const int position = start + Order::row_of(Rows<kRows>::token(m, i, g, t));
      const int end = view.end(view.row0 + Rows<kRows>::of_score(n, 2 * t + (i & 1)));
      return position < min(end, limit) && position >= view.begin(end) ? s : -INFINITY;
    });
  }

  // Tokens `part` of the compressed ones, the first of which is at `position`; part.begin is a multiple
  // of 32. The value slot follows the key slot. `Pages` is UniformPages or RaggedPages.
  template <typename Pages>
  __device__ __forceinline__ void attend_pages(int batch, int head, int q_begin, Range part, int position,
                                               uint32_t key_slot) {
    const uint32_t value_slot = key_slot + Pages::slot_bytes(p.k, p.sequences.page_tokens);
    const PageTable table(p.sequences, batch);
    const typename Pages::Copier key_copier(p.k, head, key_slot, lane);
    const typename Pages::Copier value_copier(p.v, head, value_slot, lane);
    const Range unmasked = seen_by_all<kRows>(view, part, position);
    Scratch scratch, second_scratch;
    scratch.init();
    second_scratch.init();
    // With so few warps that loads are not hidden behind another's, two rows must not wait for each other.
    Scratch& odd = kRows == 16 ? second_scratch : scratch;

    // While the warp works on one side of a tile, the other is on its way. Groups of copies are closed in the
    // order keys, values, keys, ..., empty or not, so that "at most one group under way" always means that
    // the side needed now has arrived.
    int token = part.begin + warp * kTileTokens;
    typename Pages::Next next(p, table, head, token, part.end, lane);
    load_queries(head, q_begin);
    key_copier.copy(p.k, next.key(), table.page_tokens, token, part.end, lane);
    value_copier.copy(p.v, next.value(), table.page_tokens, token, part.end, lane);
    next.advance(p, table, head, token + kStep, part.end, lane);
    finish_queries(batch, head);
#pragma unroll 1
    for (; token < part.end; token += kStep) {
      const bool masked = token < unmasked.begin || token + kTileTokens > unmasked.end;
      Scores<kRows> scores;
      copy_wait<1>();
      __syncwarp();
      score_tile<T, D, kRows>(typename Pages::Keys{p.k, key_slot, t, scratch, odd}, q, key_center, scores, g,
                              t);
      __syncwarp();
      key_copier.copy(p.k, next.key(), table.page_tokens, token + kStep, part.end, lane);
      scale_scores(scores);
      if (masked) {
        mask_scores<Pages>(scores, position + token, position + part.end);
      }
      softmax.template update<D>(scores, out);
      copy_wait<1>();
      __syncwarp();
      if (masked) {
        clear_rows<D, Pages>(value_slot, view.visible_rows<kRows>(position + token, position + part.end),
                             lane);
      }
      accumulate_tile<T, D, kRows>(typename Pages::Values{p.v, value_slot, g, scratch, odd}, scores, out, g,
                                   t);
      __syncwarp();
      value_copier.copy(p.v, next.value(), table.page_tokens, token + kStep, part.end, lane);
      next.advance(p, table, head, token + 2 * kStep, part.end, lane);
    }
  }

  // Tokens `part` of the sinks or of the window, the first of which is at `position`.
  template <bool kWide>
  __device__ __forceinline__ void attend_dense(const DenseSide& keys, const DenseSide& values,
                                               const Range& part, int position) {
    constexpr bool kHalves = D < 256;
    constexpr float kNoCenter[kTiles][2] = {};
#pragma unroll 1
    for (int token = part.begin + warp * kTileTokens; token < part.end; token += kStep) {
      const int start = position + token;
      const uint32_t visible = view.visible_rows<kRows>(start, position + part.end);
      if (visible == 0) {
        continue;
      }
      Scores<kRows> scores;
      score_tile<T, D, kRows>(DenseKeys<kWide, kHalves>{{keys, token, visible}, t}, q, kNoCenter, scores, g,
                              t);
      scale_scores(scores);
      mask_scores<RowOrder>(scores, start, position + part.end);
      softmax.template update<D>(scores, out);
      if constexpr (!kHalves) {
        __syncwarp();  // keeps loads of values from rising above
      }
      accumulate_tile<T, D, kRows>(DenseValues<kWide>{{values, token, visible}, g}, scores, out, g, t);
    }
  }

  // Puts the warp's state where write_partials reads it: kRows references, kRows sums, kRows x D outputs.
  // `Channels` says which channel an output is of.
  template <typename Channels = PairChannels<D>>
  __device__ __forceinline__ void store(float* shared) {
    using Columns = Rows<kRows>;
    softmax.finish(softmax.sum);
#pragma unroll
    for (int n = 0; n < kTiles; ++n) {
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        if (g == 0) {
          const int row = Columns::of_score(n, 2 * t + j);
          shared[row] = softmax.reference[n][j];
          shared[kRows + row] = softmax.sum[n][j];
        }
      }
    }
#pragma unroll
    for (int i = 0; i < kProducts; ++i) {
#pragma unroll
      for (int n = 0; n < kTiles; ++n) {
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          const int column = 2 * t + (e & 1);
          const int row = Columns::of_score(n, column);
          const int lower = e >> 1;
          const int channel =
              kRows == 4 ? Channels::of(i + lower * kProducts, g, column >> 2) : Channels::of(i, g, lower);
          shared[2 * kRows + row * D + channel] = out[i][n][e];
        }
      }
    }
  }
};

// Merges what the warps stored and writes the CTA's partial results. `exact` is write_exact of the item's
// types, without its first two arguments.
template <int D, int kRows, typename Exact>
__device__ __forceinline__ void write_partials(const AttendParams& p, const Item& item, const float* shared,
                                               Exact exact) {
  const View& view = item.view;
  // For 256 channels in a form that no register holds from the start of the kernel on: there is none left.
  const int warp = D == 256 ? uniform(threadIdx.x / 32) : threadIdx.x / 32;
  const int lane = threadIdx.x % 32;
  constexpr int kWarpFloats = kRows * (D + 2);
  const int q_heads = p.kv_heads * view.group;
  for (int row = warp; row < kRows && view.row0 + row < view.rows; row += kWarps) {
    float reference = kLowest;
#pragma unroll
    for (int i = 0; i < kWarps; ++i) {
      reference = fmaxf(reference, shared[i * kWarpFloats + row]);
    }
    float weight[kWarps];
    float sum = 0.0f;
#pragma unroll
    for (int i = 0; i < kWarps; ++i) {
      weight[i] = exp2_approx(shared[i * kWarpFloats + row] - reference);
      sum += weight[i] * shared[i * kWarpFloats + kRows + row];
    }
    const int64_t token = item.q_begin + (view.row0 + row) / view.group;
    const int64_t q_head = item.head * view.group + (view.row0 + row) % view.group;
    const int64_t result = (token * q_heads + q_head) * p.items + blockIdx.z;
    const bool empty = sum == 0.0f;  // and not `sum > 0`: a NaN must reach the result
    float lse = empty ? -INFINITY : reference + log2f(sum);
    const float normalise = 1.0f / sum;
    bool finite = true;
    for (int channel = lane; channel < D && !empty; channel += 32) {
      float value = 0.0f;
#pragma unroll
      for (int i = 0; i < kWarps; ++i) {
        value += weight[i] * shared[i * kWarpFloats + 2 * kRows + row * D + channel];
      }
      p.partial_out[result * D + channel] = value * normalise;
      finite &= isfinite(value * normalise);
    }
    const int end = view.end(view.row0 + row);
    const Range seen = {view.begin(end), end};
    if (empty ? item.any(seen) : __any_sync(0xffffffffu, !finite)) {
      const int64_t query = token * p.q_token_stride + q_head * p.q_head_stride;
      const bool hidden = exact(seen, query, result, lse);
      // Tokens of weight 0 whose values are infinite or NaN.
      lse = empty && hidden ? kLowest : lse;
    }
    if (lane == 0) {
      p.partial_lse[result] = lse;
    }
  }
}

// An item of dense tokens, which are rounded to T, up to what the warps store. Not inlined, and so free to
// use registers as it likes: it has many loads under way at a time where the loop over pages has copies.
template <typename T, int D, int kRows>
__device__ __noinline__ void attend_dense(const AttendParams& p) {
  const Item& item = shared_item();
  MST_DYNAMIC_SHARED(shared);
  const View& view = item.view;
  Warp<T, D, kRows> w(p, view, threadIdx.x / 32);
  w.load_queries(item.head, item.q_begin);
  w.finish_queries(item.batch, item.head);
#pragma unroll 1
  for (int i = 0; i < 2; ++i) {
    const DenseParams& dense = i == 0 ? p.sinks : p.window;
    const Range& part = item.part[i];
    if (part.begin >= part.end) {
      continue;
    }
    const DenseSides sides = DenseSides::of<T>(dense, item.batch, item.head);
    if (sides.keys.wide && sides.values.wide) {
      w.template attend_dense<true>(sides.keys, sides.values, part, item.position[i]);
    } else {
      w.template attend_dense<false>(sides.keys, sides.values, part, item.position[i]);
    }
  }
  w.store(reinterpret_cast<float*>(shared) + w.warp * kRows * (D + 2));
}

// Tokens of an item, of pages or of sinks and window, up to whatever their number is.
__device__ __forceinline__ Range item_tokens(const AttendParams& p, int item) {
  if (item >= p.page_items) {
    const int begin = (item - p.page_items) * p.dense_split;
    return {begin, begin + p.dense_split};
  }
  if (item >= p.long_items) {
    const int begin = p.long_items * p.split + (item - p.long_items) * p.short_split;
    return {begin, begin + p.short_split};
  }
  return {item * p.split, (item + 1) * p.split};
}

// Puts what the CTA works on into shared memory. False if it has no rows.
template <int kRows>
__device__ __forceinline__ bool begin_item(const AttendParams& p, Item& shared_item) {
  const int item = blockIdx.z;
  const int head = blockIdx.x % p.kv_heads;
  const int batch = blockIdx.y;
  int q_begin = batch * p.max_q_len;
  int q_len = p.max_q_len;
  if (p.q_indptr != nullptr) {
    q_begin = uniform(p.q_indptr[batch]);
    q_len = uniform(p.q_indptr[batch + 1]) - q_begin;
  }
  const int row0 = blockIdx.x / p.kv_heads * kRows;
  if (row0 >= q_len * p.group) {
    return false;
  }
  // The lengths, and the warp's first table entry next to them: one wait for memory instead of several.
  const Range tokens = item_tokens(p, item);
  if (item < p.page_items && p.sequences.table != nullptr) {
    const int token = tokens.begin + static_cast<int>(threadIdx.x / 32) * kTileTokens;
    if (token < p.max_len) {
      prefetch_l2(p.sequences.table + batch * p.sequences.table_stride +
                  (token >> page_shift(p.sequences.page_tokens)));
    }
  }
  int sinks = p.sinks.lens == nullptr ? 0 : p.sinks.lens[batch];
  int window = p.window.lens == nullptr ? 0 : p.window.lens[batch];
  int compressed = 0;
  if (p.k.pages != nullptr) {
    compressed = p.sequences.lens[p.sequences.lens_per_head ? batch * p.kv_heads + head : batch];
  }
  sinks = uniform(sinks);
  window = uniform(window);
  compressed = uniform(compressed);
  if (threadIdx.x == 0) {
    View& view = shared_item.view;
    view.row0 = row0;
    view.rows = q_len * p.group;
    view.group = p.group;
    view.end0 = sinks + compressed + window - q_len + 1;
    view.first = p.first == nullptr ? 0 : p.first[batch];
    view.sliding_window = p.sliding_window;
    const bool dense = item >= p.page_items;
    shared_item.q_begin = q_begin;
    shared_item.batch = batch;
    shared_item.head = head;
    shared_item.dense = dense;
    shared_item.position[0] = dense ? 0 : sinks;
    shared_item.position[1] = sinks + compressed;
    const Range first = {tokens.begin, min(tokens.end, dense ? sinks : compressed)};
    const Range second = {tokens.begin, dense ? min(tokens.end, window) : tokens.begin};
    shared_item.part[0] = seen_by_any<kRows>(view, first, shared_item.position[0]);
    shared_item.part[1] = seen_by_any<kRows>(view, second, shared_item.position[1]);
  }
  __syncthreads();
  return true;
}

template <typename T, int D, int kRows, typename Pages = UniformPages<D>>
__device__ __forceinline__ void attend(const AttendParams& p) {
  MST_DYNAMIC_SHARED(shared);
  Item& item = shared_item();
  const int warp = uniform(threadIdx.x / 32);
  allow_next_kernel();
  if (!begin_item<kRows>(p, item)) {
    return;
  }
  float* merged = reinterpret_cast<float*>(shared);
  if (item.dense) {
    attend_dense<T, D, kRows>(p);
  } else {
    Warp<T, D, kRows> w(p, item.view, warp);
    const int slots =
        Pages::slot_bytes(p.k, p.sequences.page_tokens) + Pages::slot_bytes(p.v, p.sequences.page_tokens);
    const uint32_t key_slot = shared_address(shared) + warp * slots;
    w.template attend_pages<Pages>(blockIdx.y, blockIdx.x % p.kv_heads, item.q_begin, item.part[0],
                                   item.position[0], key_slot);
    __syncthreads();
    w.store(merged + threadIdx.x / 32 * kRows * (D + 2));
  }
  __syncthreads();
  write_partials<D, kRows>(p, item, merged, [&](Range seen, int64_t query, int64_t result, float lse) {
    return write_exact<T, D, T>(p, item, seen, query, result, lse);
  });
}

}  // namespace mustafar
