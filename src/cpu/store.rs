//! A pruned row into its place in a page.

use super::Level;
use super::simd_rows::{self as simd, MAX_DIM, Mask};
use crate::dtype::{DType, ValueType};

/// The element type of what is stored, and the type it is stored as.
#[derive(Debug, Clone, Copy)]
pub(super) struct Types {
    pub(super) dtype: DType,
    pub(super) values: ValueType,
}

/// Writes the kept values of a row and, in types that have one, its scale. `scale` and `values` have exactly the bytes
/// of the row.
pub(super) fn store(
    level: Level,
    types: Types,
    row: &[u16],
    mask: &Mask,
    scale: &mut [u8],
    values: &mut [u8],
) {
    if !types.values.is_scaled() {
        return simd::pack(level, row, mask, values);
    }
    let (count, padded) = (values.len(), values.len().next_multiple_of(32));
    let mut packed = [0u8; 2 * MAX_DIM];
    simd::pack(level, row, mask, &mut packed[..2 * count]);
    let mut bits = [0u16; MAX_DIM];
    bits.iter_mut().zip(packed.chunks_exact(2)).for_each(|(x, b)| *x = u16::from_le_bytes([b[0], b[1]]));
    let (mut x, mut codes) = ([0f32; MAX_DIM], [0u8; MAX_DIM]);
    simd::widen(level, types.dtype, &bits[..padded], &mut x[..padded]);
    let bits = simd::quantize(level, types.values, &x[..padded], &mut codes[..padded]);
    scale.copy_from_slice(&bits.to_le_bytes());
    values.copy_from_slice(&codes[..count]);
}
