//! Helpers that all integration tests share. `mod common;` brings in everything; a test binary uses what it needs.
#![allow(dead_code, unreachable_pub, unused_imports, clippy::panic, clippy::unwrap_used)]

mod bytes;
mod cases;
mod compare;
mod dense;
mod expect;
mod pages;
mod rng;

pub use bytes::Bytes;
pub use cases::{CHANNEL_GROUPS, DIMS, DTYPES, HEADS, PAGE_SIZES, keeps, lengths};
pub use compare::{Tolerance, assert_close, cosine_distance};
pub use dense::{Dense, Layout};
pub use expect::{attention, scoring};
pub use pages::{Paged, Pool, Table};
pub use rng::{Dist, Rng};

use mustafar::{DType, Mem};

/// Number for an element of any tensor dtype.
pub fn to_f64(dtype: DType, bytes: &[u8]) -> f64 {
    match dtype {
        DType::F32 => f64::from(f32::from_le_bytes(bytes.try_into().unwrap())),
        _ => mustafar::reference::value(dtype, u16::from_le_bytes(bytes.try_into().unwrap())),
    }
}

/// Lengths, slots, tables: a view of any slice, or none.
pub fn mem<T: mustafar::mem::Element>(slice: Option<&Vec<T>>) -> Option<Mem<'_>> {
    slice.map(|s| Mem::host(s))
}
