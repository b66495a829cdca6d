//! Helpers that all integration tests share. `mod common;` brings in everything; a test binary uses what it needs.
#![allow(dead_code, unreachable_pub, unused_imports, clippy::panic, clippy::unwrap_used)]

mod attend;
mod bytes;
mod cases;
mod compare;
mod dense;
pub mod device;
mod expect;
mod pages;
mod rng;
pub mod run;

pub use attend::{Scene, Step, dense_rows, scenes};
pub use bytes::Bytes;
pub use cases::{CHANNEL_GROUPS, DIMS, DTYPES, HEADS, PAGE_SIZES, VALUE_TYPES, keeps, lengths, values_of};
pub use compare::{Tolerance, assert_close, cosine_distance};
pub use dense::{Dense, Layout};
pub use expect::attention;
pub use pages::{Paged, Pool, Table, copy_row, source_dtype};
pub use rng::{Dist, Rng};

use mustafar::{Backend, Context, DType, Level, Mem, PageFormat, Stream, ValueType};
use proptest::test_runner::Config;

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

/// Every instruction level this processor has, each with these numbers of threads.
pub fn cpu_contexts(threads: &[usize]) -> Vec<Context> {
    let levels = Level::ALL.into_iter().filter(|level| level.available());
    levels
        .flat_map(|level| threads.iter().map(move |&n| Context::cpu_with_level(n, level).unwrap()))
        .collect()
}

/// As [`cpu_contexts`], and the GPU if there is one: for calls through [`run`], which stages memory there.
pub fn contexts(threads: &[usize]) -> Vec<Context> {
    cpu_contexts(threads).into_iter().chain(device::cuda().cloned()).collect()
}

/// The nearest number that f16, bf16 and float32 all hold. CUDA kernels round queries and dense tokens to the type of
/// the pages; from numbers like these nothing is lost.
pub fn coarse(x: f64) -> f64 {
    let x = mustafar::reference::value(DType::Bf16, mustafar::reference::round(DType::Bf16, x as f32));
    if x.abs() < 2f64.powi(-14) { 0.0 } else { x }
}

/// Slots for `context`: on CUDA they must be distinct, so tokens whose slot comes again later are skipped, which is what
/// the CPU makes of them.
pub fn distinct_slots(context: &Context, slots: &[i64]) -> Vec<i64> {
    let again = |i: usize| is_cuda(context) && slots[i + 1..].contains(&slots[i]);
    slots.iter().enumerate().map(|(i, &slot)| if again(i) { -1 } else { slot }).collect()
}

pub fn is_cuda(context: &Context) -> bool {
    context.backend() == Backend::Cuda
}

/// A stream where there can be none.
#[allow(unsafe_code)]
pub fn foreign_stream() -> Stream {
    // SAFETY: for calls of the CPU backend, which refuses it unseen.
    unsafe { Stream::from_raw(std::ptr::dangling_mut()) }
}

/// Proptest settings: `cases` unless PROPTEST_CASES says otherwise. A failure prints its minimal input, which is all
/// there is to it: data comes from a seed in the input.
pub fn config(cases: u32) -> Config {
    let cases = if std::env::var_os("PROPTEST_CASES").is_some() { Config::default().cases } else { cases };
    Config { cases, failure_persistence: None, ..Config::default() }
}
