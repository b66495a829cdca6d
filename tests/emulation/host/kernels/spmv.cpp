#include "kernels/spmv.cu"

#include "registry.h"

#define MST_VARIANT(dtype, dim)                                   \
  EMULATE(mustafar::SpmvKeyParams, mst_spmv_key_##dtype##_d##dim) \
  EMULATE(mustafar::SpmvValueParams, mst_spmv_value_##dtype##_d##dim)
#include "variants.inc"
