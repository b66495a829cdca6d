// attend for bf16 pages: mst_attend_bf16_d<head_dim>_r<rows>, see mustafar/attend.cuh. One file per type, so
// that they compile side by side.
#include "mustafar/attend.cuh"

#define MST_ATTEND(dim, rows)                                                              \
  extern "C" __global__ void __launch_bounds__(128, mustafar::resident_ctas<dim, rows>())  \
      mst_attend_bf16_d##dim##_r##rows(const __grid_constant__ mustafar::AttendParams p) { \
    mustafar::attend<mustafar::bf16, dim, rows>(p);                                        \
  }

#define MST_VARIANT_bf16(dim) MST_ATTEND_ALL(dim)
#define MST_VARIANT_f16(dim)
#define MST_VARIANT(type, dim) MST_VARIANT_##type(dim)
#include "mustafar/attend_rows.inc"
#include "variants.inc"
#undef MST_VARIANT
