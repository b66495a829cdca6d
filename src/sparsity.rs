//! From a sparsity to the number of values a row keeps.

use crate::error::{Error, Result};

/// `n - floor(sparsity * n)`: values kept of `n`. 64 of 128 at 0.5, 39 at 0.7; all at 0.
///
/// The floor is taken on the decimal that `sparsity` prints as, in integer arithmetic, so 0.7 * 10 is exactly 7.
///
/// # Errors
/// [`Error::InvalidArgument`] unless `0 <= sparsity < 1`.
pub fn keep_for_sparsity(n: usize, sparsity: f64) -> Result<usize> {
    Ok(n - dropped(n, sparsity)?)
}

/// `n - max(1, floor(sparsity * n)) + 1`: what the original Mustafar's kthvalue rule keeps when no two magnitudes
/// are equal. 65 of 128 at 0.5, 40 at 0.7; all at 0.
///
/// # Errors
/// [`Error::InvalidArgument`] unless `0 <= sparsity < 1`.
pub fn reference_keep(n: usize, sparsity: f64) -> Result<usize> {
    Ok(n - dropped(n, sparsity)?.max(1) + 1)
}

fn dropped(n: usize, sparsity: f64) -> Result<usize> {
    if !(0.0..1.0).contains(&sparsity) {
        return Err(Error::invalid("sparsity", sparsity, "at least 0 and less than 1"));
    }
    // `{}` prints the shortest decimal that reads back as this f64, without an exponent: "0.7", "0.125", "0".
    let text = sparsity.to_string();
    let digits = text.split_once('.').map_or("", |(_, fraction)| fraction);
    // 19 digits times any n below 2^64 fit in 128 bits; what is cut off cannot reach the floor unless the first
    // 19 digits are all nines, and f64 has no such value below 1 with more digits than that.
    let digits = &digits[..digits.len().min(19)];
    let scale = 10u128.pow(digits.len() as u32);
    let numerator = digits.bytes().fold(0u128, |acc, d| acc * 10 + u128::from(d - b'0'));
    Ok((numerator * n as u128 / scale) as usize)
}
