//! Row primitives at every instruction level: select, pack, expand, convert.
//!
//! A row is `dim` 16-bit values (f16 or bf16 bits), dim a multiple of 32 up to 256. Every level gives the same
//! bits. `unsafe` stays in this folder.
#![allow(unsafe_code)]

#[cfg(target_arch = "x86_64")]
pub(crate) mod avx2;
#[cfg(target_arch = "x86_64")]
pub(crate) mod avx512;
mod portable;
#[cfg(target_arch = "x86_64")]
pub(crate) mod tables;
#[cfg(test)]
mod tests;

use super::Level;
use crate::dtype::DType;

/// Largest head_dim.
pub(crate) const MAX_DIM: usize = 256;

/// Tokens that channel-direction selection ranks against each other.
pub(crate) const GROUP: usize = crate::variants::CHANNEL_GROUP;

/// Rows of one group of tokens; channels past the row's dim mean nothing.
pub(crate) type Group = [[u16; MAX_DIM]; GROUP];

/// The bits of a 16-bit value that make its magnitude.
const MAGNITUDE: u16 = 0x7fff;
const MAGNITUDE_BITS: u32 = 15;

/// Bits of a selection key (the bits of a non-negative f32).
const KEY_BITS: u32 = 31;

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

/// Finds the channels of the `keep` largest keys; `at_least(k)` gives the channels whose key is k or more, and
/// keys have `bits` bits. Of equal keys at the border the lower channels are taken, or all with `all_ties`.
///
/// Binary search for the largest threshold that still keeps enough; it ends early once a threshold separates
/// exactly `keep`, which makes ties irrelevant.
#[inline(always)]
fn search(bits: u32, keep: u32, all_ties: bool, at_least: impl Fn(u32) -> Mask) -> Mask {
    let mut threshold = 0;
    for bit in (0..bits).rev() {
        let candidate = threshold | 1 << bit;
        let count = at_least(candidate).count();
        if count >= keep {
            threshold = candidate;
        }
        if count == keep {
            break;
        }
    }
    let mut mask = at_least(threshold);
    let surplus = mask.count().saturating_sub(keep);
    if surplus > 0 && !all_ties {
        drop_ties(&mut mask, &at_least(threshold + 1), surplus);
    }
    mask
}

/// Clears the `surplus` highest channels that are in `mask` and not in `above`.
fn drop_ties(mask: &mut Mask, above: &Mask, mut surplus: u32) {
    for (word, above) in mask.0.iter_mut().zip(above.0).rev() {
        while surplus > 0 && *word & !above != 0 {
            *word ^= 1 << (*word & !above).ilog2();
            surplus -= 1;
        }
    }
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
    dispatch!(level, select(row, keep as u32, all_ties))
}

/// The channels of the `keep` largest keys below 2^31; ties go to the lower channel.
pub(crate) fn select_keys(level: Level, keys: &[u32], keep: usize) -> Mask {
    check_dim(keys.len());
    dispatch!(level, select_keys(keys, keep as u32))
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
