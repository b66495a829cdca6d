// Parameter structs of the kernels, one per kernel, passed by value as `const __grid_constant__`.
//
// The launching side mirrors them field by field. Rules that keep both sides equal: fixed-width types only,
// fields sorted so that no padding is needed (8-byte fields first), sizes asserted below. Strides are in
// elements unless the name says bytes. Null pointers mean "not given".
#pragma once

#include <stdint.h>

namespace mustafar {

// Codes of DType in src/dtype.rs.
enum Dtype : int32_t { kF16 = 1, kBf16 = 2, kF32 = 3 };

// Codes of ValueType there; 16-bit values have the codes of their dtypes.
enum ValueType : int32_t { kE4m3 = 16, kInt8 = 17 };

// Which pages hold the compressed tokens of each sequence.
struct SequencesParams {
  const int32_t*
      table;            // [batch, table_stride] page numbers; null: sequence b has pages b * table_stride ...
  const int32_t* lens;  // [batch] or, with lens_per_head, [batch, kv_heads]: compressed tokens
  int64_t table_stride;   // without a table: pages per sequence
  int32_t lens_per_head;  // 0 or 1
  int32_t page_tokens;    // 16, 32, 64 or 128
};

static_assert(sizeof(SequencesParams) == 32, "SequencesParams has padding");

}  // namespace mustafar
