//! Row primitives at every instruction level: select, pack, expand, convert, quantise.
//!
//! A row is `dim` 16-bit values (f16 or bf16 bits), dim a multiple of 32 up to 256. Every level gives the same
//! bits. `unsafe` stays in this folder.
#![allow(unsafe_code)]

#[cfg(target_arch = "x86_64")]
pub(crate) mod avx2;
#[cfg(target_arch = "x86_64")]
pub(crate) mod avx512;
mod portable;
mod quantize;
#[cfg(target_arch = "x86_64")]
pub(crate) mod tables;
#[cfg(test)]
mod tests;

use super::Level;
use crate::dtype::{DType, ValueType};

/// Largest head_dim.
pub(crate) const MAX_DIM: usize = 256;

/// Tokens that channel-direction selection ranks against each other.
pub(crate) const GROUP: usize = crate::variants::CHANNEL_GROUP;

/// Rows of one group of tokens; channels past the row's dim mean nothing.
pub(crate) type Group = [[u16; MAX_DIM]; GROUP];

/// The bits of a 16-bit value that make its magnitude.
const MAGNITUDE: u16 = 0x7fff;
const MAGNITUDE_BITS: u32 = 15;

/// What a NaN becomes when it is rounded to 16 bits. Processors disagree about the other bits of a NaN.
fn canonical_nan(dtype: DType) -> u16 {
    match dtype {
        DType::F16 => 0x7e00,
        _ => 0x7fc0,
    }
}

/// Which channels of a row are kept: bit c % 32 of word c / 32. In memory (little-endian) this is a bitmap row.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct Mask(pub(crate) [u32; MAX_DIM / 32]);

impl Mask {
    /// From the bytes of a bitmap row.
    pub(crate) fn from_bytes(bytes: &[u8]) -> Self {
        let mut mask = Self::default();
        for (word, b) in mask.0.iter_mut().zip(bytes.chunks_exact(4)) {
            *word = u32::from_le_bytes([b[0], b[1], b[2], b[3]]);
        }
        mask
    }

    /// The `n` lowest channels.
    fn first(n: usize) -> Self {
        let mut mask = Self::default();
        mask.0[..n / 32].fill(u32::MAX);
        mask
    }

    /// Writes a bitmap row of `bytes.len()` bytes.
    pub(crate) fn write(&self, bytes: &mut [u8]) {
        for (word, b) in self.0.iter().zip(bytes.chunks_exact_mut(4)) {
            b.copy_from_slice(&word.to_le_bytes());
        }
    }

    /// Channels kept.
    #[inline]
    pub(crate) fn count(&self) -> u32 {
        self.0.iter().map(|w| w.count_ones()).sum()
    }

    /// The kept channels, rising.
    fn channels(&self) -> impl Iterator<Item = usize> + '_ {
        self.0.iter().enumerate().flat_map(|(i, &word)| {
            let next = |w: &u32| Some(w & w.wrapping_sub(1));
            std::iter::successors(Some(word), next)
                .take_while(|w| *w != 0)
                .map(move |w| i * 32 + w.trailing_zeros() as usize)
        })
    }
}

/// Where the border between kept and dropped channels falls.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Border {
    /// At least `keep` channels: those of the border's value and above.
    at_least: Mask,
    /// At most `keep` channels: those above the border's value. Equal to `at_least` where that is exactly `keep`.
    above: Mask,
}

impl Border {
    /// Exactly `keep` channels: of those at the border's value the lower ones.
    #[inline]
    fn without_surplus(self, keep: u32) -> Mask {
        let mut mask = self.at_least;
        let mut surplus = mask.count() - keep;
        for (word, above) in mask.0.iter_mut().zip(self.above.0).rev() {
            while surplus > 0 && *word & !above != 0 {
                *word ^= 1 << (*word & !above).ilog2();
                surplus -= 1;
            }
        }
        mask
    }
}

/// Finds the border of the `keep` largest of a row's 15-bit values. `count(v)` says how many channels have v or
/// more, `at_least(v)` which.
///
/// Binary search for the largest value that keeps enough; it ends early once a value separates exactly `keep`,
/// which makes ties irrelevant.
#[inline(always)]
fn search(keep: u32, count: impl Fn(u16) -> u32, at_least: impl Fn(u16) -> Mask) -> Border {
    let mut value = 0;
    for bit in (0..MAGNITUDE_BITS).rev() {
        let candidate = value | 1 << bit;
        let count = count(candidate);
        if count >= keep {
            value = candidate;
        }
        if count == keep {
            break;
        }
    }
    let mask = at_least(value);
    let exact = mask.count() == keep;
    Border { at_least: mask, above: if exact { mask } else { at_least(value + 1) } }
}

/// Calls the same function of the module of `$level`.
macro_rules! dispatch {
    ($level:expr, $name:ident($($arg:expr),*)) => {
        match $level {
            #[cfg(target_arch = "x86_64")]
            // SAFETY: a `Context` only holds a level whose instructions this processor has.
            Level::Avx512 => unsafe { avx512::$name($($arg),*) },
            #[cfg(target_arch = "x86_64")]
            // SAFETY: as above.
            Level::Avx2 => unsafe { avx2::$name($($arg),*) },
            _ => portable::$name($($arg),*),
        }
    };
}

fn check_dim(dim: usize) {
    assert!(dim.is_multiple_of(32) && dim <= MAX_DIM, "row of {dim} channels");
}

/// The channels of the `keep` largest magnitudes of a row. Ties go to the lower channel; with `all_ties` all of
/// them are kept, so that the count may exceed `keep`.
pub(crate) fn select(level: Level, row: &[u16], keep: usize, all_ties: bool) -> Mask {
    check_dim(row.len());
    let border = dispatch!(level, border(row, keep as u32));
    if all_ties { border.at_least } else { border.without_surplus(keep as u32) }
}

/// The channels of the `keep` largest keys below 2^31; ties go to the lower channel.
///
/// Ranks 15 bits of the keys at a time, from the top; channels that tie there are told apart by the next bits.
pub(crate) fn select_keys(level: Level, keys: &[u32], keep: usize) -> Mask {
    check_dim(keys.len());
    let keep = keep as u32;
    let (mut above, mut tied) = (Mask::default(), Mask::first(keys.len()));
    let mut digits = [0u16; MAX_DIM];
    let digits = &mut digits[..keys.len()];
    for shift in [16, 1, 0] {
        for (digit, key) in digits.iter_mut().zip(keys) {
            *digit = (key >> shift) as u16 & if shift == 0 { 1 } else { MAGNITUDE };
        }
        // Channels that are decided take no part.
        dispatch!(level, zero_dropped(digits, &tied));
        let border = dispatch!(level, border(digits, keep - above.count()));
        for (i, (above, tied)) in above.0.iter_mut().zip(&mut tied.0).enumerate() {
            *above |= border.above.0[i] & *tied;
            *tied &= border.at_least.0[i] & !border.above.0[i];
        }
        if above.count() == keep {
            return above;
        }
    }
    for (tied, above) in tied.0.iter_mut().zip(above.0) {
        *tied |= above;
    }
    Border { at_least: tied, above }.without_surplus(keep)
}

/// Channel direction: for each channel the tokens of the `keep` largest magnitudes, the older of equal ones.
/// Gives the mask of each token's row.
pub(crate) fn select_channels(level: Level, group: &Group, dim: usize, keep: usize) -> [Mask; GROUP] {
    check_dim(dim);
    dispatch!(level, select_channels(group, dim, keep as i16))
}

/// The channels that are neither +0 nor -0.
pub(crate) fn nonzero(level: Level, row: &[u16]) -> Mask {
    check_dim(row.len());
    dispatch!(level, nonzero(row))
}

/// Writes the kept values of a row one after the other. `out` has exactly 2 bytes for each.
pub(crate) fn pack(level: Level, row: &[u16], mask: &Mask, out: &mut [u8]) {
    check_dim(row.len());
    assert_eq!(out.len(), 2 * mask.count() as usize, "bytes of packed values");
    dispatch!(level, pack(row, mask, out));
}

/// Writes the dense form of a row: the values where `bitmap` has bits, +0 elsewhere. `values` starts at the row's
/// first value and may go on past its last; values past its end count as +0, so a damaged bitmap is harmless.
pub(crate) fn expand(level: Level, bitmap: &[u8], values: &[u8], out: &mut [u16]) {
    check_dim(out.len());
    assert_eq!(bitmap.len() * 8, out.len(), "bits of a bitmap row");
    dispatch!(level, expand(bitmap, values, out));
}

/// Sets the channels that are not in `mask` to +0.
pub(crate) fn zero_dropped(level: Level, row: &mut [u16], mask: &Mask) {
    check_dim(row.len());
    dispatch!(level, zero_dropped(row, mask));
}

/// 16-bit values to f32, exact.
pub(crate) fn widen(level: Level, dtype: DType, from: &[u16], to: &mut [f32]) {
    check_dim(from.len());
    assert_eq!(from.len(), to.len(), "elements");
    dispatch!(level, widen(dtype, from, to));
}

/// f32 to 16 bits, to nearest, ties to even; every NaN becomes the type's canonical one.
pub(crate) fn narrow(level: Level, dtype: DType, from: &[f32], to: &mut [u16]) {
    check_dim(from.len());
    assert_eq!(from.len(), to.len(), "elements");
    dispatch!(level, narrow(dtype, from, to));
}

/// As [`expand`], of 8-bit codes; the others are 0.
pub(crate) fn expand_codes(level: Level, bitmap: &[u8], codes: &[u8], out: &mut [u8]) {
    check_dim(out.len());
    assert_eq!(bitmap.len() * 8, out.len(), "bits of a bitmap row");
    dispatch!(level, expand_codes(bitmap, codes, out));
}

/// The codes of a row's values in an 8-bit type, and the bfloat16 pattern of its scale, as `docs/format.md` says.
pub(crate) fn quantize(level: Level, values: ValueType, from: &[f32], codes: &mut [u8]) -> u16 {
    check_dim(from.len());
    assert_eq!(from.len(), codes.len(), "elements");
    dispatch!(level, quantize(values, from, codes))
}

/// `scale * code` for every code of an 8-bit type, exact.
pub(crate) fn dequantize(level: Level, values: ValueType, scale: f32, codes: &[u8], to: &mut [f32]) {
    check_dim(codes.len());
    assert_eq!(codes.len(), to.len(), "elements");
    dispatch!(level, dequantize(values, scale, codes, to));
}
