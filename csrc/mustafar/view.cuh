// What the query rows of a CTA may see: causal, aligned to the end of the sequence, after the first valid
// position, and within the sliding window.
#pragma once

#include "mustafar/pages.cuh"

namespace mustafar {

// Query row r stands for query token r / group. It sees the positions from begin(end(r)) up to end(r); both
// rise with r. Lives in shared memory, since it is needed for the few tiles at an edge only.
struct View {
  int row0;   // first row of the CTA
  int rows;   // of the whole KV head
  int group;  // query heads per KV head
  int end0;   // end of the view of query token 0
  int first;  // first valid position
  int sliding_window;

  __device__ __forceinline__ int end(int row) const { return max(end0 + row / group, 0); }

  __device__ __forceinline__ int begin(int row_end) const { return max(first, row_end - sliding_window); }

  // Ends of the views of the CTA's first and last row.
  __device__ __forceinline__ int first_end() const { return end(row0); }

  template <int kRows>
  __device__ __forceinline__ int last_end() const {
    return end(min(row0 + kRows, rows) - 1);
  }

  // Bit i: some row of the CTA sees position `start` + i, which lies below `limit`.
  template <int kRows>
  __device__ __forceinline__ uint32_t visible_rows(int start, int limit) const {
    const int seen_end = min(last_end<kRows>(), limit) - start;
    const int seen_begin = begin(first_end()) - start;
    return low_bits(max(seen_end, 0)) & ~low_bits(max(seen_begin, 0));
  }
};

// Tokens [begin, end) of a part of a sequence whose token 0 is at `position`.
struct Range {
  int begin, end;
};

// The tokens of `part` that some row sees; the beginning is rounded down to whole tiles, and where nothing is
// seen it is the end, however far away the first visible position lies.
template <int kRows>
__device__ __forceinline__ Range seen_by_any(const View& view, Range part, int position) {
  const int end = min(part.end, view.last_end<kRows>() - position);
  const int begin = max(part.begin, (view.begin(view.first_end()) - position) & -kTileTokens);
  return {min(begin, end), end};
}

// The tokens of `part` that every row sees: tiles inside need no mask.
template <int kRows>
__device__ __forceinline__ Range seen_by_all(const View& view, Range part, int position) {
  return {view.begin(view.last_end<kRows>()) - position, min(part.end, view.first_end() - position)};
}

}  // namespace mustafar
