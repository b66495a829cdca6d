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
    // 19 digits times any n below 2^64 fit in 128 bits. What is cut off is worth less than n * 1e-19.
    let digits = &digits[..digits.len().min(19)];
    let scale = 10u128.pow(digits.len() as u32);
    let numerator = digits.bytes().fold(0u128, |acc, d| acc * 10 + u128::from(d - b'0'));
    Ok((numerator * n as u128 / scale) as usize)
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    /// Channels dropped at a sparsity of 0.1, 0.2 ... 0.9, worked out in decimal.
    const DROPPED: [(usize, [usize; 9]); 5] = [
        (64, [6, 12, 19, 25, 32, 38, 44, 51, 57]),
        (80, [8, 16, 24, 32, 40, 48, 56, 64, 72]),
        (96, [9, 19, 28, 38, 48, 57, 67, 76, 86]),
        (128, [12, 25, 38, 51, 64, 76, 89, 102, 115]),
        (256, [25, 51, 76, 102, 128, 153, 179, 204, 230]),
    ];
    const TENTHS: [f64; 9] = [0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9];

    #[test]
    fn tenths_are_exact() {
        for (dim, dropped) in DROPPED {
            for (sparsity, dropped) in TENTHS.into_iter().zip(dropped) {
                assert_eq!(keep_for_sparsity(dim, sparsity), Ok(dim - dropped), "{dim} at {sparsity}");
                assert_eq!(reference_keep(dim, sparsity), Ok(dim - dropped + 1), "{dim} at {sparsity}");
            }
        }
    }

    #[test]
    fn thousandths_are_exact_for_every_count() {
        for n in 0..=512usize {
            for thousandths in 0..1000usize {
                // Dividing gives the f64 nearest to the decimal, which is what a literal gives too.
                let sparsity = thousandths as f64 / 1000.0;
                assert_eq!(
                    keep_for_sparsity(n, sparsity),
                    Ok(n - thousandths * n / 1000),
                    "{n} at {sparsity}"
                );
            }
        }
    }

    #[test]
    fn the_papers_counts() {
        assert_eq!((keep_for_sparsity(128, 0.5), keep_for_sparsity(128, 0.7)), (Ok(64), Ok(39)));
        assert_eq!((reference_keep(128, 0.5), reference_keep(128, 0.7)), (Ok(65), Ok(40)));
    }

    #[test]
    fn extremes() {
        // 5e-324 prints with 324 digits; the last is the largest f64 below 1.
        for (sparsity, keep) in [(0.0, 128), (-0.0, 128), (5e-324, 128), (1e-7, 128), (1.0 - 1.2e-16, 1)] {
            assert_eq!(keep_for_sparsity(128, sparsity), Ok(keep), "{sparsity}");
            assert_eq!(reference_keep(128, sparsity), Ok(keep + usize::from(keep == 1)), "{sparsity}");
        }
        assert_eq!(keep_for_sparsity(0, 0.5), Ok(0));
        // Decimals that f64 arithmetic gets wrong: 0.29 * 100 is 28.999999999999996.
        assert_eq!((keep_for_sparsity(100, 0.29), keep_for_sparsity(10, 0.7)), (Ok(71), Ok(3)));
        assert_eq!(keep_for_sparsity(10, 0.1 + 0.2), Ok(7));
    }

    #[test]
    fn outside_zero_to_one_is_refused() {
        for sparsity in [1.0, 1.5, -0.1, -5e-324, f64::NAN, f64::INFINITY, f64::NEG_INFINITY] {
            let error = keep_for_sparsity(128, sparsity).unwrap_err();
            assert_eq!(
                error.to_string(),
                format!("sparsity is {sparsity}; allowed: at least 0 and less than 1")
            );
            assert_eq!(reference_keep(128, sparsity), Err(error));
        }
    }
}
