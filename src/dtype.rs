//! Element types of tensors and of stored values.

use crate::error::{Error, Result};
use std::fmt;

/// Element type of a tensor or of the values in a page. The discriminants are the codes of the C ABI and of
/// snapshots; they are never reused.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[repr(u32)]
#[non_exhaustive]
pub enum DType {
    /// IEEE 754 binary16.
    F16 = 1,
    /// bfloat16.
    Bf16 = 2,
    /// IEEE 754 binary32; queries and outputs only.
    F32 = 3,
    // 16.. are reserved for 8-bit page values, 32.. for 4-bit ones.
}

impl DType {
    /// Bytes of one element.
    #[must_use]
    pub const fn bytes(self) -> usize {
        match self {
            Self::F16 | Self::Bf16 => 2,
            Self::F32 => 4,
        }
    }

    /// The type with this code, or an error that lists the known codes.
    pub fn from_code(argument: &'static str, code: u32) -> Result<Self> {
        match code {
            1 => Ok(Self::F16),
            2 => Ok(Self::Bf16),
            3 => Ok(Self::F32),
            _ => Err(Error::invalid(argument, code, "1 (f16), 2 (bf16), 3 (f32)")),
        }
    }
}

impl fmt::Display for DType {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::F16 => "f16",
            Self::Bf16 => "bf16",
            Self::F32 => "f32",
        })
    }
}
