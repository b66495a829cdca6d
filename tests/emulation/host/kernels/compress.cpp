#include "kernels/compress.cu"

#include "registry.h"

#define MST_VARIANT(dtype, dim) EMULATE(mustafar::CompressParams, mst_compress_##dtype##_d##dim)
#include "variants.inc"
