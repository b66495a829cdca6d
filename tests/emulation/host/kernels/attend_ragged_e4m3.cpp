#include "kernels/attend_ragged_e4m3.cu"

#include "registry.h"

#undef MST_ATTEND
#define MST_ATTEND(dim, rows) EMULATE(mustafar::AttendParams, mst_attend_ragged_e4m3_d##dim##_r##rows)
#define MST_VARIANT(type, dim) MST_VARIANT_##type(dim)
#include "variants.inc"
