//! Which instructions the CPU backend uses.

use crate::error::{Error, Result};
use std::fmt;

/// Instruction level, in rising order.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[non_exhaustive]
pub enum Level {
    /// Plain Rust.
    Portable,
    /// AVX2, FMA and F16C.
    Avx2,
    /// AVX-512 F, BW, VL, VBMI2, VNNI and what [`Level::Avx2`] has.
    Avx512,
}

impl Level {
    /// Every level.
    pub const ALL: [Self; 3] = [Self::Portable, Self::Avx2, Self::Avx512];

    /// The best level this processor has, capped by `MUSTAFAR_CPU` (`portable`, `avx2`, `avx512`) if it is set.
    ///
    /// # Errors
    /// [`Error::InvalidArgument`] when `MUSTAFAR_CPU` has another value.
    pub fn detect() -> Result<Self> {
        let cap = match std::env::var("MUSTAFAR_CPU").as_deref() {
            Err(std::env::VarError::NotPresent) | Ok("" | "avx512") => Self::Avx512,
            Ok("avx2") => Self::Avx2,
            Ok("portable") => Self::Portable,
            other => {
                return Err(Error::invalid(
                    "MUSTAFAR_CPU",
                    format!("{other:?}"),
                    "portable, avx2, avx512 or unset",
                ));
            }
        };
        let best = Self::ALL.into_iter().rev().find(|level| *level <= cap && level.available());
        Ok(best.unwrap_or(Self::Portable))
    }

    /// Whether this processor can run the level.
    #[must_use]
    pub fn available(self) -> bool {
        match self {
            Self::Portable => true,
            #[cfg(target_arch = "x86_64")]
            Self::Avx2 => {
                is_x86_feature_detected!("avx2")
                    && is_x86_feature_detected!("fma")
                    && is_x86_feature_detected!("f16c")
                    && is_x86_feature_detected!("popcnt")
            }
            #[cfg(target_arch = "x86_64")]
            Self::Avx512 => {
                Self::Avx2.available()
                    && is_x86_feature_detected!("avx512f")
                    && is_x86_feature_detected!("avx512bw")
                    && is_x86_feature_detected!("avx512vl")
                    && is_x86_feature_detected!("avx512vbmi2")
                    && is_x86_feature_detected!("avx512vnni")
            }
            #[cfg(not(target_arch = "x86_64"))]
            _ => false,
        }
    }
}

impl fmt::Display for Level {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Portable => "portable",
            Self::Avx2 => "AVX2+FMA+F16C",
            Self::Avx512 => "AVX-512 (F, BW, VL, VBMI2, VNNI)",
        })
    }
}
