//! `validate`.

use crate::capi::context::mustafar_context;
use crate::capi::ops::run;
use crate::capi::pool::{mustafar_pool, mustafar_sequences, pool, pool_names, sequences};
use crate::capi::status::mustafar_status;
use crate::capi::structs::extensible;
use crate::capi::views::Pointers;
use crate::ops::{self, Validate};
use std::ffi::c_void;

/// Arguments of mustafar_validate.
#[derive(Debug, Clone, Copy)]
#[repr(C)]
pub struct mustafar_validate_args {
    /// sizeof(mustafar_validate_args).
    pub struct_size: usize,
    /// Pages, uniform or ragged. Required.
    pub pool: *const mustafar_pool,
    /// Which pages, and how many rows of them count. Required.
    pub sequences: *const mustafar_sequences,
}

extensible!(mustafar_validate_args, first_release_ends_with sequences, { struct_size, pool, sequences });

/// Checks untrusted pages of a pool: every row that the sequences reach.
///
/// @param context  The context.
/// @param args     Pages and sequences.
/// @param stream   CUDA stream; NULL on the CPU backend.
/// @return SUCCESS; CORRUPT_DATA with sequence, head, page and row of the first violation; OUT_OF_RANGE for lengths and
///         page numbers; INVALID_ARGUMENT for shapes; NULL_POINTER, MISALIGNED, OVERFLOW, UNSUPPORTED,
///         VERSION_MISMATCH as docs/c-api.md describes.
///
/// Async: no, the result is the status. Graph capture: no. Workspace: none. Deterministic: yes. Thread-safe: yes.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn mustafar_validate(
    context: *const mustafar_context,
    args: *const mustafar_validate_args,
    stream: *mut c_void,
) -> mustafar_status {
    let op = |context: &_, stream, pointers: Pointers, a: mustafar_validate_args| {
        // SAFETY: the contract of this module.
        let pool = unsafe { pool(pointers, &pool_names!("pool"), a.pool)? };
        // SAFETY: the contract of this module.
        let sequences = unsafe { sequences(pointers, a.sequences, &pool.layout)? };
        ops::validate(context, stream, Validate { pool, sequences })
    };
    // SAFETY: the contract of this module.
    unsafe { run(context, args, stream, op) }
}
