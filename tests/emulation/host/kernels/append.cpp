#include "kernels/append.cu"

#include "registry.h"

#define MST_VARIANT(dtype, dim)                                \
  EMULATE(mustafar::AppendParams, mst_append_##dtype##_d##dim) \
  EMULATE(mustafar::AppendParams, mst_append_weighted_##dtype##_d##dim)
#include "variants.inc"
