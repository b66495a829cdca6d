//! Element types: of dense tensors ([`DType`]) and of the values in a page ([`ValueType`]).

use crate::error::{Error, Result};
use std::fmt;

/// Element type of a dense tensor. The discriminants are the codes of the C ABI; they are never reused.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[repr(u32)]
#[non_exhaustive]
pub enum DType {
    /// IEEE 754 binary16.
    F16 = 1,
    /// bfloat16.
    Bf16 = 2,
    /// IEEE 754 binary32; never what is pruned.
    F32 = 3,
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

/// Type of the values in a page. The discriminants are the codes of the page format, of the C ABI and of snapshots;
/// they are never reused, and those of the 16-bit types are the codes of these types for tensors.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[repr(u32)]
#[non_exhaustive]
pub enum ValueType {
    /// IEEE 754 binary16, as the tensor had it.
    F16 = 1,
    /// bfloat16, as the tensor had it.
    Bf16 = 2,
    /// 8-bit floats with 4 bits of exponent and 3 of fraction (OCP E4M3: no infinities, at most 448), times a bfloat16
    /// scale of the row.
    E4m3 = 16,
    /// 8-bit integers, times a bfloat16 scale of the row.
    Int8 = 17,
    // 32.. are reserved for 4-bit values.
}

impl ValueType {
    /// Every type.
    #[must_use]
    pub const fn all() -> [Self; 4] {
        [Self::F16, Self::Bf16, Self::E4m3, Self::Int8]
    }

    /// Bytes of one value.
    #[must_use]
    pub const fn bytes(self) -> usize {
        match self {
            Self::F16 | Self::Bf16 => 2,
            Self::E4m3 | Self::Int8 => 1,
        }
    }

    /// The tensor type whose bits the values are; `None` for types with a scale, which are made from either 16-bit one.
    #[must_use]
    pub const fn dtype(self) -> Option<DType> {
        match self {
            Self::F16 => Some(DType::F16),
            Self::Bf16 => Some(DType::Bf16),
            Self::E4m3 | Self::Int8 => None,
        }
    }

    /// Whether each row has a scale.
    #[must_use]
    pub const fn is_scaled(self) -> bool {
        self.dtype().is_none()
    }

    /// The type with this code, or an error that lists the known codes.
    pub fn from_code(argument: &'static str, code: u32) -> Result<Self> {
        let known = Self::all().into_iter().find(|known| *known as u32 == code);
        known.ok_or_else(|| Error::invalid(argument, code, "1 (f16), 2 (bf16), 16 (e4m3), 17 (int8)"))
    }
}

impl fmt::Display for ValueType {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::F16 => "f16",
            Self::Bf16 => "bf16",
            Self::E4m3 => "e4m3",
            Self::Int8 => "int8",
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
        for (values, code, bytes, name) in [
            (ValueType::F16, 1, 2, "f16"),
            (ValueType::Bf16, 2, 2, "bf16"),
            (ValueType::E4m3, 16, 1, "e4m3"),
            (ValueType::Int8, 17, 1, "int8"),
        ] {
            assert_eq!((values as u32, values.bytes(), values.to_string().as_str()), (code, bytes, name));
            assert_eq!(ValueType::from_code("value_type", code), Ok(values));
            assert!(values.dtype().is_none_or(|dtype| dtype as u32 == code));
        }
    }

    #[test]
    fn unknown_codes_are_refused() {
        for code in [0, 4, 16, 17, 32, u32::MAX] {
            let message = format!("dtype_k is {code}; allowed: 1 (f16), 2 (bf16), 3 (f32)");
            assert_eq!(DType::from_code("dtype_k", code).map_err(|e| e.to_string()), Err(message));
        }
        for code in [0, 3, 15, 18, 32, u32::MAX] {
            let message = format!("value_type is {code}; allowed: 1 (f16), 2 (bf16), 16 (e4m3), 17 (int8)");
            assert_eq!(ValueType::from_code("value_type", code).map_err(|e| e.to_string()), Err(message));
        }
    }
}
