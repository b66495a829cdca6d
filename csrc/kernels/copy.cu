// Runs of tokens from tensor to tensor, a warp for each row: copy as they are, widen as floats.
#include "mustafar/cache_params.h"
#include "mustafar/dtype.cuh"
#include "mustafar/ptx.cuh"

namespace mustafar {
namespace {

// The row of a warp, in elements of both tensors.
struct Row {
  bool present;
  int64_t from;
  int64_t to;

  __device__ __forceinline__ Row(const CopyParams& p, const CopySide& side) : present(false), from(0), to(0) {
    const uint32_t unit = blockIdx.x * kCopyWarps + threadIdx.x / 32;
    const uint32_t heads = p.heads;
    const uint32_t max_tokens = p.max_tokens;
    if (unit >= p.num_places * max_tokens * heads) {
      return;
    }
    const int64_t head = unit % heads;
    const int64_t token = unit / heads % max_tokens;
    const CopyPlace place = p.places[unit / heads / max_tokens];
    present = token < place.tokens;
    from = place.from_row * side.from_row_stride + (place.from_token + token) * side.from_token_stride +
           head * side.from_head_stride;
    to = place.to_row * side.to_row_stride + (place.to_token + token) * side.to_token_stride +
         head * side.to_head_stride;
  }
};

}  // namespace
}  // namespace mustafar

extern "C" __global__ void __launch_bounds__(32 * mustafar::kCopyWarps)
    mst_copy(const __grid_constant__ mustafar::CopyParams p) {
  using namespace mustafar;
  const CopySide& side = p.side[blockIdx.y];
  const Row row(p, side);
  if (!row.present) {
    return;
  }
  const int lane = threadIdx.x % 32;
  const uint16_t* from = static_cast<const uint16_t*>(side.from) + row.from;
  uint16_t* to = static_cast<uint16_t*>(side.to) + row.to;
  const bool wide = ((reinterpret_cast<uintptr_t>(from) | reinterpret_cast<uintptr_t>(to)) & 15) == 0;
  const int chunks = wide ? side.dim / 8 : 0;
  for (int i = lane; i < chunks; i += 32) {
    reinterpret_cast<uint4*>(to)[i] = reinterpret_cast<const uint4*>(from)[i];
  }
  for (int i = 8 * chunks + lane; i < side.dim; i += 32) {
    to[i] = from[i];
  }
}

extern "C" __global__ void __launch_bounds__(32 * mustafar::kCopyWarps)
    mst_widen(const __grid_constant__ mustafar::CopyParams p) {
  using namespace mustafar;
  const CopySide& side = p.side[blockIdx.y];
  const Row row(p, side);
  if (!row.present) {
    return;
  }
  float* to = static_cast<float*>(side.to) + row.to;
  for (int i = threadIdx.x % 32; i < side.dim; i += 32) {
    to[i] = load_as_float(side.from, row.from + i, side.from_dtype);
  }
}
