// copy: runs of tokens from tensor to tensor, a warp for each row.
#include "mustafar/cache_params.h"
#include "mustafar/ptx.cuh"

extern "C" __global__ void __launch_bounds__(32 * mustafar::kCopyWarps)
    mst_copy(const __grid_constant__ mustafar::CopyParams p) {
  using namespace mustafar;
  const CopySide& side = p.side[blockIdx.y];
  const uint32_t unit = blockIdx.x * kCopyWarps + threadIdx.x / 32;
  const int lane = threadIdx.x % 32;
  const uint32_t heads = p.heads;
  const uint32_t max_tokens = p.max_tokens;
  if (unit >= p.num_places * max_tokens * heads) {
    return;
  }
  const int64_t head = unit % heads;
  const int64_t token = unit / heads % max_tokens;
  const CopyPlace place = p.places[unit / heads / max_tokens];
  if (token >= place.tokens) {
    return;
  }
  const uint16_t* from = side.from + place.from_row * side.from_row_stride +
                         (place.from_token + token) * side.from_token_stride + head * side.from_head_stride;
  uint16_t* to = side.to + place.to_row * side.to_row_stride +
                 (place.to_token + token) * side.to_token_stride + head * side.to_head_stride;
  const bool wide = ((reinterpret_cast<uintptr_t>(from) | reinterpret_cast<uintptr_t>(to)) & 15) == 0;
  const int chunks = wide ? side.dim / 8 : 0;
  for (int i = lane; i < chunks; i += 32) {
    reinterpret_cast<uint4*>(to)[i] = reinterpret_cast<const uint4*>(from)[i];
  }
  for (int i = 8 * chunks + lane; i < side.dim; i += 32) {
    to[i] = from[i];
  }
}
