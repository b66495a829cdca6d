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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn codes_and_names_are_fixed() {
        for (dtype, code, bytes, name) in
            [(DType::F16, 1, 2, "f16"), (DType::Bf16, 2, 2, "bf16"), (DType::F32, 3, 4, "f32")]
        {
            assert_eq!((dtype as u32, dtype.bytes(), dtype.to_string().as_str()), (code, bytes, name));
            assert_eq!(DType::from_code("dtype", code), Ok(dtype));
        }
    }

    #[test]
    fn unknown_codes_are_refused() {
        for code in [0, 4, 16, 17, 32, u32::MAX] {
            let message = format!("dtype_k is {code}; allowed: 1 (f16), 2 (bf16), 3 (f32)");
            assert_eq!(DType::from_code("dtype_k", code).map_err(|e| e.to_string()), Err(message));
        }
    }
}
