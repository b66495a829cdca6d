#include "kernels/validate.cu"

#include "registry.h"

#define MST_VARIANT(dtype, dim) EMULATE(mustafar::ValidateParams, mst_validate_##dtype##_d##dim)
#include "variants.inc"
