//! The ops, one C function each. An argument structure points to tensors, pools and sequences; a null pointer to an
//! optional one turns its feature off.

pub mod advice;
pub mod append;
pub mod attend;
pub mod compress;
pub mod decompress;
pub mod merge;
pub mod prune;
pub mod score;
pub mod spmv;
pub mod validate;

use crate::backend::{Context, Stream};
use crate::capi::context::mustafar_context;
use crate::capi::error::boundary;
use crate::capi::handle::borrow;
use crate::capi::status::mustafar_status;
use crate::capi::structs::{Extensible, read};
use crate::capi::views::Pointers;
use crate::error::Result;
use std::ffi::c_void;

/// What every op does: borrow the context, read the argument structure, run `op`.
///
/// # Safety
/// `context` and `args` are as [`borrow`] and [`read`] want them.
unsafe fn run<T: Extensible>(
    context: *const mustafar_context,
    args: *const T,
    stream: *mut c_void,
    op: impl FnOnce(&Context, Stream, Pointers, T) -> Result<()>,
) -> mustafar_status {
    boundary(|| {
        // SAFETY: the caller's promise.
        let context = unsafe { &borrow("context", context)?.context };
        // SAFETY: the caller's promise.
        let args = unsafe { read("args", args)? };
        // SAFETY: the contract of this module.
        let stream = unsafe { Stream::from_raw(stream) };
        op(context, stream, Pointers::of(context), args)
    })
}
