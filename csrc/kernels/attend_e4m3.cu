// attend for e4m3 pages: mst_attend_e4m3_d<head_dim>_r<rows>, see mustafar/attend_codes.cuh.
#include "mustafar/attend_codes.cuh"

#define MST_ATTEND(dim, rows)                                                                     \
  extern "C" __global__ void __launch_bounds__(                                                   \
      128, mustafar::resident_ctas<dim, rows>(mustafar::code_registers<mustafar::E4m3Operand>())) \
      mst_attend_e4m3_d##dim##_r##rows(const __grid_constant__ mustafar::AttendParams p) {        \
    mustafar::attend_codes<dim, rows, mustafar::E4m3Operand>(p);                                  \
  }

// 16 rows of 256 channels do not fit into registers; 8 at a time do.
#define MST_ATTEND_16_64 MST_ATTEND(64, 16)
#define MST_ATTEND_16_96 MST_ATTEND(96, 16)
#define MST_ATTEND_16_128 MST_ATTEND(128, 16)
#define MST_ATTEND_16_256

#define MST_VARIANT_f16(dim) MST_ATTEND(dim, 4) MST_ATTEND(dim, 8) MST_ATTEND_16_##dim
#define MST_VARIANT_bf16(dim)
#define MST_VARIANT(type, dim) MST_VARIANT_##type(dim)
#include "variants.inc"
#undef MST_VARIANT
