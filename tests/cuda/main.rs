//! What only the CUDA backend has: graphs, streams, large device memory, CUDA contexts of the caller, and refusals of
//! memory that is not the device's. Without a GPU each test says that it skips.
#![allow(unreachable_pub, unsafe_code, clippy::unwrap_used, clippy::panic, clippy::print_stderr)]

mod capi_cache;
#[path = "../common/mod.rs"]
mod common;
mod contexts;
mod errors;
mod graph;
mod large;
mod refusals;
mod score;
mod step;
mod streams;
#[path = "../capi/support.rs"]
#[allow(dead_code)]
mod support;

use mustafar::Context;
use std::sync::{Mutex, MutexGuard, PoisonError};

/// The backend for one test at a time: a capture in global mode forbids every other thread to allocate.
fn gpu() -> Option<(&'static Context, MutexGuard<'static, ()>)> {
    static ONE_TEST: Mutex<()> = Mutex::new(());
    let lock = ONE_TEST.lock().unwrap_or_else(PoisonError::into_inner);
    let context = common::device::cuda()?;
    common::device::make_current();
    Some((context, lock))
}
