#include "kernels/prune.cu"

#include "registry.h"

#define MST_VARIANT(dtype, dim)                                    \
  EMULATE(mustafar::PruneParams, mst_prune_token_##dtype##_d##dim) \
  EMULATE(mustafar::PruneParams, mst_prune_channel_##dtype##_d##dim)
#include "variants.inc"
