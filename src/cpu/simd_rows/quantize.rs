//! 8-bit values, in plain Rust: loops over slices that the SIMD levels compile again with their instructions.

use crate::cpu::math::{e4m3_to_f16_over_256, f16_to_f32, f32_to_e4m3};
use crate::dtype::ValueType;

#[inline(always)]
pub(super) fn quantize(values: ValueType, from: &[f32], codes: &mut [u8]) -> u16 {
    const INFINITY: u32 = f32::INFINITY.to_bits();
    codes.fill(0);
    // Patterns of non-negative floats order like the floats; NaN is above infinity.
    let largest = from.iter().fold(0, |largest, x| largest.max(x.to_bits() & 0x7fff_ffff));
    match largest {
        0 => return 0,
        INFINITY.. => return super::canonical_nan(crate::dtype::DType::Bf16),
        _ => {}
    }
    let largest_code = if values == ValueType::E4m3 { 448.0 } else { 127.0 };
    let scale = (f32::from_bits(largest) / largest_code).to_bits().div_ceil(1 << 16);
    let divisor = f32::from_bits(scale << 16);
    if values == ValueType::E4m3 {
        codes.iter_mut().zip(from).for_each(|(code, x)| *code = f32_to_e4m3(x / divisor));
    } else {
        // Adding 1.5 * 2^23 rounds to an integer, ties to even, whose two's complement is then the low byte.
        codes.iter_mut().zip(from).for_each(|(code, x)| *code = (x / divisor + 12_582_912.0).to_bits() as u8);
    }
    scale as u16
}

#[inline(always)]
pub(super) fn dequantize(values: ValueType, scale: f32, codes: &[u8], to: &mut [f32]) {
    let pairs = to.iter_mut().zip(codes);
    if values == ValueType::E4m3 {
        pairs.for_each(|(to, &code)| *to = scale * (256.0 * f16_to_f32(e4m3_to_f16_over_256(code))));
    } else {
        pairs.for_each(|(to, &code)| *to = scale * f32::from(code as i8));
    }
}
