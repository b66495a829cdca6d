#include "kernels/decompress.cu"

#include "registry.h"

#define MST_VARIANT(dtype, dim) EMULATE(mustafar::DecompressParams, mst_decompress_##dtype##_d##dim)
#include "variants.inc"
