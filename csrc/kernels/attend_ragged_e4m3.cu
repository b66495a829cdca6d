// attend where K or V are ragged e4m3 pages: mst_attend_ragged_e4m3_d<head_dim>_r<rows>, see
// mustafar/attend_codes.cuh and mustafar/ragged_codes.cuh.
#include "mustafar/attend_codes.cuh"
#include "mustafar/ragged_codes.cuh"

#define MST_ATTEND(dim, rows)                                                                     \
  extern "C" __global__ void __launch_bounds__(                                                   \
      128, mustafar::resident_ctas<dim, rows>(mustafar::code_registers<mustafar::E4m3Operand>() + \
                                              mustafar::ragged_registers(rows)))                  \
      mst_attend_ragged_e4m3_d##dim##_r##rows(const __grid_constant__ mustafar::AttendParams p) { \
    using Codes = mustafar::E4m3Operand;                                                          \
    mustafar::attend_codes<dim, rows, Codes, mustafar::RaggedCodePages<dim, Codes>>(p);           \
  }

#define MST_VARIANT_f16(dim) MST_ATTEND_FEW(dim)
#define MST_VARIANT_bf16(dim)
#define MST_VARIANT(type, dim) MST_VARIANT_##type(dim)
#include "mustafar/attend_rows.inc"
#include "variants.inc"
#undef MST_VARIANT
