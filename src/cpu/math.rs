//! Float conversions and elementary functions in plain Rust, written so that a loop over them vectorises under
//! whatever instructions the caller is compiled for.

/// `a * b + c`; fused when `FMA`, which callers set where the processor has it (elsewhere it would be a libm call).
#[inline(always)]
fn mul_add<const FMA: bool>(a: f32, b: f32, c: f32) -> f32 {
    if FMA { a.mul_add(b, c) } else { a * b + c }
}

/// e^x for x <= 88, with an error below 2 ulp; 0 below -87.3 where results would be subnormal. NaN stays NaN.
#[inline(always)]
pub(crate) fn exp<const FMA: bool>(x: f32) -> f32 {
    // x = n ln 2 + r with |r| <= ln(2)/2; ln 2 in two parts so that r is exact to float32.
    const LN2_HIGH: f32 = 0.693_359_4;
    const LN2_LOW: f32 = -2.121_944_4e-4;
    // Adding and subtracting 1.5 * 2^23 rounds to an integer, which then sits in the low bits of the sum.
    const ROUND: f32 = 12_582_912.0;
    let clamped = if x < -87.3 { -87.3 } else { x };
    let shifted = mul_add::<FMA>(clamped, std::f32::consts::LOG2_E, ROUND);
    let n = shifted - ROUND;
    let r = mul_add::<FMA>(n, -LN2_LOW, mul_add::<FMA>(n, -LN2_HIGH, clamped));
    // Taylor series of e^r up to r^7: the remainder is below 4e-9 on this interval.
    let mut p = 1.0 / 5040.0;
    for c in [1.0 / 720.0, 1.0 / 120.0, 1.0 / 24.0, 1.0 / 6.0, 0.5, 1.0, 1.0] {
        p = mul_add::<FMA>(p, r, c);
    }
    let power = f32::from_bits((shifted.to_bits() << 23).wrapping_add(0x3f80_0000));
    if x < -87.3 { 0.0 } else { p * power }
}

/// tanh x with an error below 4 ulp.
#[inline(always)]
pub(crate) fn tanh<const FMA: bool>(x: f32) -> f32 {
    let a = x.abs();
    // |x| >= 0.3: 1 - 2e/(1 + e) with e = exp(-2|x|). Below, that form cancels and the Taylor series takes over; its
    // first term left out is 1382/155925 x^11, below 5e-8 relative.
    let e = exp::<FMA>(-2.0 * a);
    let large = (1.0 - e) / (1.0 + e);
    let y = a * a;
    let mut p = 62.0 / 2835.0;
    for c in [-17.0 / 315.0, 2.0 / 15.0, -1.0 / 3.0] {
        p = mul_add::<FMA>(p, y, c);
    }
    let small = mul_add::<FMA>(a * y, p, a);
    (if a < 0.3 { small } else { large }).copysign(x)
}

/// Dot product, rounded once: a centre's part of a score shifts every token alike.
pub(crate) fn dot(a: &[f32], b: &[f32]) -> f32 {
    a.iter().zip(b).map(|(a, b)| f64::from(*a) * f64::from(*b)).sum::<f64>() as f32
}

/// The value of an IEEE binary16, exactly. Signalling NaNs stay NaN.
#[inline(always)]
pub(crate) fn f16_to_f32(h: u16) -> f32 {
    // Moved into place, exponent and fraction read as the value times 2^-112, subnormals included; infinity and
    // NaN have the largest exponent and keep it.
    let magnitude = u32::from(h & 0x7fff) << 13;
    let scaled = f32::from_bits(magnitude) * f32::from_bits(0x7780_0000);
    let bits = if magnitude >= 0x0f80_0000 { magnitude | 0x7f80_0000 } else { scaled.to_bits() };
    f32::from_bits(bits | (u32::from(h & 0x8000) << 16))
}

/// The value of a bfloat16, exactly.
#[inline(always)]
pub(crate) fn bf16_to_f32(h: u16) -> f32 {
    f32::from_bits(u32::from(h) << 16)
}

/// 1/256 of the value of an e4m3 code, as an f16: exponent and fraction move to their place in an f16, whose exponent
/// has a bias larger by 8.
#[inline(always)]
pub(crate) fn e4m3_to_f16_over_256(code: u8) -> u16 {
    let magnitude = u16::from(code & 0x7f) << 7;
    let nan = if magnitude > 0x3f00 { 0x7c00 } else { 0 };
    magnitude | nan | u16::from(code & 0x80) << 8
}

/// The e4m3 code nearest to `x`, ties to even; `x` must round to at most 448 in magnitude.
#[inline(always)]
pub(crate) fn f32_to_e4m3(x: f32) -> u8 {
    let bits = x.to_bits() & 0x7fff_ffff;
    // Below 2^-6 codes are multiples of 2^-9, which is the unit in the last place of floats around 2^14.
    let subnormal = (f32::from_bits(bits) + 16384.0).to_bits() - 16384f32.to_bits();
    // Elsewhere 20 of the fraction's 23 bits are rounded away, and the exponent's bias shrinks by 120.
    let rounded = bits.wrapping_add(0x7_ffff + (bits >> 20 & 1)) >> 20;
    let magnitude = if bits < 0x3c80_0000 { subnormal } else { rounded.wrapping_sub(120 << 3) };
    magnitude as u8 | (x.to_bits() >> 24 & 0x80) as u8
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ulps(found: f32, exact: f64) -> f64 {
        let ulp = f64::from(f32::EPSILON) * 2f64.powi(exact.abs().log2().floor() as i32);
        ((f64::from(found) - exact) / ulp).abs()
    }

    #[test]
    fn e4m3_codes_convert_as_the_reference_does() {
        use crate::dtype::ValueType;
        use crate::reference::{decode, encode};
        for code in 0..=u8::MAX {
            let (found, exact) =
                (f16_to_f32(e4m3_to_f16_over_256(code)), decode(ValueType::E4m3, code.into()));
            assert!(f64::from(found * 256.0) == exact || found.is_nan() && exact.is_nan(), "{code:#x}");
            assert_eq!(found.is_sign_negative(), code & 0x80 != 0, "{code:#x}");
        }
        // Codes and the middles between them have at most 4 bits of fraction: every such number, and its neighbours.
        for middle in (1..=448f32.to_bits() >> 19).map(|bits| bits << 19) {
            for x in [middle - 1, middle, middle + 1].map(f32::from_bits) {
                for x in [x, -x] {
                    assert_eq!(f32_to_e4m3(x), encode(ValueType::E4m3, x) as u8, "{x:e}");
                }
            }
        }
    }

    #[test]
    fn exp_is_accurate() {
        for i in 0..400_000 {
            let x = 88.0 - 175.2 * (i as f32 / 400_000.0);
            let exact = f64::from(x).exp();
            assert!(ulps(exp::<true>(x), exact) < 2.0, "exp({x})");
            assert!(ulps(exp::<false>(x), exact) < 2.0, "exp({x}) without fma");
        }
        assert_eq!(exp::<true>(0.0), 1.0);
        assert_eq!(exp::<true>(-88.0), 0.0);
        assert_eq!(exp::<false>(f32::NEG_INFINITY), 0.0);
        assert!(exp::<true>(f32::NAN).is_nan());
    }

    #[test]
    fn tanh_is_accurate() {
        for i in 1..100_000 {
            let x = 12.0 * (i as f32 / 100_000.0);
            assert!(ulps(tanh::<true>(x), f64::from(x).tanh()) < 4.0, "tanh({x}) = {}", tanh::<true>(x));
            assert!(ulps(tanh::<false>(-x), -f64::from(x).tanh()) < 4.0, "tanh(-{x}) without fma");
        }
        assert_eq!(tanh::<true>(0.0), 0.0);
        assert_eq!(tanh::<true>(f32::INFINITY), 1.0);
        assert_eq!(tanh::<true>(f32::NEG_INFINITY), -1.0);
        assert!(tanh::<true>(f32::NAN).is_nan());
    }

    #[test]
    fn halves_convert_exactly() {
        for h in 0..=u16::MAX {
            for (found, exact) in [
                (f16_to_f32(h), half::f16::from_bits(h).to_f32()),
                (bf16_to_f32(h), half::bf16::from_bits(h).to_f32()),
            ] {
                assert!(
                    found == exact && found.is_sign_negative() == exact.is_sign_negative()
                        || exact.is_nan() && found.is_nan(),
                    "{h:#x}"
                );
            }
        }
    }
}
