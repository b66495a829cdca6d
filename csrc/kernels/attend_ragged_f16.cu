// attend where K or V are ragged f16 pages: mst_attend_ragged_f16_d<head_dim>_r<rows>, see
// mustafar/attend.cuh and mustafar/ragged.cuh. One file per type, so that they compile side by side.
#include "mustafar/attend.cuh"
#include "mustafar/ragged.cuh"

#define MST_ATTEND(dim, rows)                                                                    \
  extern "C" __global__ void __launch_bounds__(                                                  \
      128, mustafar::resident_ctas<dim, rows>(mustafar::ragged_registers(rows)))                 \
      mst_attend_ragged_f16_d##dim##_r##rows(const __grid_constant__ mustafar::AttendParams p) { \
    mustafar::attend<mustafar::f16, dim, rows, mustafar::RaggedPages<dim>>(p);                   \
  }

#define MST_VARIANT_f16(dim) MST_ATTEND_ALL(dim)
#define MST_VARIANT_bf16(dim)
#define MST_VARIANT(type, dim) MST_VARIANT_##type(dim)
#include "mustafar/attend_rows.inc"
#include "variants.inc"
#undef MST_VARIANT
