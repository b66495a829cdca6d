//! Where attention over pages is slower than dense attention: the limits that were measured, in one table.

use crate::backend::Backend;
use crate::cpu::Level;
use crate::cuda;
use crate::dtype::ValueType;
use crate::error::Result;
use crate::format::PageFormat;
use crate::ops::check;
use std::ffi::CStr;
use std::fmt;

/// Attention over pages beside attention over the same tokens dense in 16 bits, on the same machine: by cuDNN on CUDA, by this
/// library on the CPU. The discriminants are the codes of the C ABI.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[repr(u32)]
#[non_exhaustive]
pub enum Speed {
    /// Faster than dense.
    Faster = 1,
    /// Within about a tenth of dense; which of the two is faster depends on machine and shape.
    Even = 2,
    /// Slower than dense, on some of the machines measured if not on all.
    Slower = 3,
}

impl fmt::Display for Speed {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Faster => "faster",
            Self::Even => "about even",
            Self::Slower => "slower",
        })
    }
}

/// No number of values kept reaches it.
const NEVER: usize = usize::MAX;

/// Up to how many values kept of 128 pages are faster than dense, and up to how many about even. `level` is that of
/// the CPU backend, `None` on CUDA. docs/performance.md has the measurements: "Against the share kept" and "CPU: attention".
const fn limits(level: Option<Level>, values: ValueType) -> [usize; 2] {
    match (level, values) {
        (None, ValueType::F16 | ValueType::Bf16) => [103, 113],
        (None, ValueType::E4m3 | ValueType::Int8) => [NEVER, NEVER],
        (Some(Level::Avx512), ValueType::Int8) => [64, 103],
        (Some(Level::Avx512), ValueType::F16 | ValueType::Bf16) => [0, 64],
        (Some(Level::Avx512), ValueType::E4m3) | (Some(Level::Avx2 | Level::Portable), _) => [0, 0],
    }
}

/// A ragged page takes as long as a uniform one with so many times its values (of 16 bits; 1.06 to 1.15 measured).
const RAGGED: f64 = 1.15;

/// What [`attend_advice`] says. Its `Display` is a line for people.
#[derive(Debug, Clone, Copy, PartialEq)]
#[non_exhaustive]
pub struct Advice {
    /// What to expect.
    pub speed: Speed,
    /// Bytes of a token of one KV head in pages, K and V together; of full pages, ragged ones with all of their room.
    pub bytes_per_token: f64,
    /// The same dense in 16 bits.
    pub dense_bytes_per_token: f64,
    pub(crate) reason: &'static CStr,
}

impl Advice {
    /// Why, and what to do instead where pages are slower.
    #[must_use]
    pub fn reason(&self) -> &'static str {
        self.reason.to_str().unwrap_or_default()
    }
}

/// Such as `slower than dense attention (544.0 of 512.0 bytes a token): ...`.
impl fmt::Display for Advice {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { speed, bytes_per_token: bytes, dense_bytes_per_token: dense, .. } = self;
        let than = if *speed == Speed::Even { "with" } else { "than" };
        write!(
            f,
            "{speed} {than} dense attention ({bytes:.1} of {dense:.1} bytes a token): {}",
            self.reason()
        )
    }
}

/// Whether [`super::attend()`] over pages of these formats is expected to be faster than dense attention, so that nobody takes a slower
/// path unawares: nothing refuses formats for their speed.
///
/// Looks at the formats alone and needs no GPU. On the CPU it speaks of the instructions that [`Context::cpu`] would
/// use here. It holds for contexts long enough that reading K and V is most of the work; the measurements, and what short ones
/// cost, are in `docs/performance.md`. Ragged pages count by their capacity.
///
/// ```
/// use mustafar::{Backend, PageFormat, ValueType, ops};
/// let page = |keep| PageFormat::uniform(ValueType::F16, 128, 64, keep);
/// let advice = ops::attend_advice(Backend::Cuda, &page(39)?, &page(64)?)?;
/// assert_eq!(advice.speed, ops::Speed::Faster);
/// assert_eq!((advice.bytes_per_token, advice.dense_bytes_per_token), (94.0 + 144.0, 512.0));
/// # Ok::<(), mustafar::Error>(())
/// ```
///
/// # Errors
/// As [`super::attend()`] for a pair of formats that it does not take: page_tokens must be equal, on CUDA also head_dim and value
/// type. On the CPU [`Error::InvalidArgument`] when `MUSTAFAR_CPU` has a bad value.
///
/// [`Context::cpu`]: crate::Context::cpu
/// [`Error::InvalidArgument`]: crate::Error::InvalidArgument
pub fn attend_advice(backend: Backend, k: &PageFormat, v: &PageFormat) -> Result<Advice> {
    check::same("v.page_tokens", v.page_tokens(), k.page_tokens(), "page_tokens of k")?;
    let level = match backend {
        Backend::Cpu => Some(Level::detect()?),
        Backend::Cuda => {
            cuda::attend_formats(k, v)?;
            None
        }
    };
    Ok(advice(level, k, v))
}

fn advice(level: Option<Level>, k: &PageFormat, v: &PageFormat) -> Advice {
    let speed = speed(level, k, v);
    let per_token = |bytes: usize| bytes as f64 / k.page_tokens() as f64;
    Advice {
        speed,
        bytes_per_token: per_token(k.page_bytes() + v.page_bytes()),
        dense_bytes_per_token: per_token(k.dense_bytes() + v.dense_bytes()),
        reason: match (speed, level) {
            (Speed::Faster, _) => c"pages take less time to read and expand than dense tokens to read",
            (Speed::Even, _) => c"expanding values takes about the time that fewer bytes save; what pages save is memory",
            (Speed::Slower, None) => {
                c"16-bit values this dense take longer to expand than fewer bytes save; store int8 values, or these layers dense"
            }
            (Speed::Slower, Some(_)) => {
                c"expanding values takes longer on this processor than fewer bytes save; what pages save is memory"
            }
        },
    }
}

/// By the values kept of 128, of K and V together; where value types differ the slower of the two decides.
fn speed(level: Option<Level>, k: &PageFormat, v: &PageFormat) -> Speed {
    let values =
        |page: &PageFormat| page.capacity() as f64 * if page.keep().is_some() { 1.0 } else { RAGGED };
    let elements = |page: &PageFormat| page.page_tokens() * page.head_dim();
    let kept = 128.0 * (values(k) + values(v)) / (elements(k) + elements(v)) as f64;
    let of = |page: &PageFormat| match limits(level, page.value_type()).map(|limit| kept <= limit as f64) {
        [true, _] => Speed::Faster,
        [_, true] => Speed::Even,
        _ => Speed::Slower,
    };
    of(k).max(of(v))
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use ValueType::{Bf16, F16, Int8};

    const CUDA: Option<Level> = None;
    const LEVELS: [(&str, Option<Level>); 4] = [
        ("CUDA", CUDA),
        ("AVX-512", Some(Level::Avx512)),
        ("AVX2", Some(Level::Avx2)),
        ("portable", Some(Level::Portable)),
    ];

    fn page(values: ValueType, dim: usize, keep: usize) -> PageFormat {
        PageFormat::uniform(values, dim, 64, keep).unwrap()
    }

    #[test]
    fn limits_are_the_documented_ones() {
        let documented = include_str!("../../../docs/performance.md");
        for (name, level) in LEVELS {
            let cells = ValueType::all().map(|values| match limits(level, values) {
                [NEVER, _] => "always faster".to_owned(),
                [_, 0] => "slower".to_owned(),
                [0, even] => format!("even to {even}"),
                [faster, even] => format!("faster to {faster}, even to {even}"),
            });
            let row = format!("| {name} | {} |", cells.join(" | "));
            assert!(documented.contains(&row), "docs/performance.md lacks {row}");
        }
    }

    #[test]
    fn values_of_k_and_v_count_together() {
        let ragged = |kept: usize| PageFormat::ragged(F16, 128, 64, 64 * kept).unwrap();
        for (k, v, expected) in [
            (page(F16, 128, 64), page(F16, 128, 128), Speed::Faster),
            (page(Bf16, 128, 79), page(Bf16, 128, 128), Speed::Even),
            (page(F16, 128, 113), page(F16, 128, 113), Speed::Even),
            (page(F16, 128, 113), page(F16, 128, 114), Speed::Slower),
            (page(F16, 64, 48), page(F16, 64, 48), Speed::Faster),
            (page(F16, 256, 227), page(F16, 256, 227), Speed::Slower),
            (page(Int8, 128, 128), page(Int8, 128, 128), Speed::Faster),
            // 1.15 * 98 of 128 is below 113, 1.15 * 99 above.
            (ragged(98), ragged(98), Speed::Even),
            (ragged(99), ragged(99), Speed::Slower),
        ] {
            assert_eq!(advice(CUDA, &k, &v).speed, expected, "{k:?}, {v:?}");
        }
    }

    #[test]
    fn the_slower_of_two_value_types_decides() {
        for (_, level) in LEVELS {
            let [f16, int8] = [F16, Int8].map(|values| page(values, 128, 100));
            let slower = advice(level, &f16, &f16).speed.max(advice(level, &int8, &int8).speed);
            assert_eq!([advice(level, &f16, &int8).speed, advice(level, &int8, &f16).speed], [slower; 2]);
        }
    }

    #[test]
    fn it_reads_as_a_line() {
        for (keep, line) in [
            (39, "faster than dense attention (188.0 of 512.0 bytes a token): pages take less"),
            (112, "about even with dense attention (480.0 of 512.0 bytes a token): expanding"),
            (128, "slower than dense attention (544.0 of 512.0 bytes a token): 16-bit values"),
        ] {
            let found = advice(CUDA, &page(F16, 128, keep), &page(F16, 128, keep)).to_string();
            assert!(found.starts_with(line), "{found}");
        }
    }
}
