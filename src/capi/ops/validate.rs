//! `validate`.

use crate::capi::context::mustafar_context;
use crate::capi::error::boundary;
use crate::capi::ops::run;
use crate::capi::pool::{mustafar_pool, mustafar_sequences, pool, pool_names, sequences};
use crate::capi::status::mustafar_status;
use crate::capi::structs::extensible;
use crate::capi::views::{Pointers, size};
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
    /// CUDA: one uint64_t of device memory that holds UINT64_MAX; it is lowered to the record of the first violation,
    /// which mustafar_validate_record reads once it has been copied to the host. Required. CPU: NULL.
    pub record: *mut u64,
}

extensible!(mustafar_validate_args, first_release_ends_with record, { struct_size, pool, sequences, record });

/// Checks untrusted pages of a pool: every row that the sequences reach.
///
/// @param context  The context.
/// @param args     Pages and sequences.
/// @param stream   CUDA stream, NULL the default one; NULL on the CPU backend.
/// @return SUCCESS; on the CPU CORRUPT_DATA with sequence, head, page and row of the first violation, and OUT_OF_RANGE
///         for lengths and page numbers, all of which go to args.record on CUDA; INVALID_ARGUMENT for shapes and for a
///         record on the CPU; NULL_POINTER, MISALIGNED, OVERFLOW, UNSUPPORTED, VERSION_MISMATCH as docs/c-api.md
///         describes.
///
/// Async: CUDA yes, CPU no. Graph capture: yes. Workspace: none. Deterministic: yes. Thread-safe: yes.
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
        // SAFETY: the contract of this module.
        let record = unsafe { pointers.mem_mut_optional("record", a.record, 1)? };
        ops::validate(context, stream, Validate { pool, sequences, record })
    };
    // SAFETY: the contract of this module.
    unsafe { run(context, args, stream, op) }
}

/// Turns the record of a CUDA mustafar_validate, copied to the host, into a status.
///
/// @param record   What args.record held after the check.
/// @param pool     The pool of the check; its memory is not looked at.
/// @param max_len  max_len of the sequences of the check.
/// @return SUCCESS when nothing is wrong; CORRUPT_DATA with sequence, head, page of the sequence and row of the first
///         violation; INVALID_ARGUMENT for a number that is no record; NULL_POINTER, MISALIGNED, OVERFLOW, UNSUPPORTED,
///         VERSION_MISMATCH for the pool.
///
/// Async: no, and needs no context. Graph capture: yes. Workspace: none. Deterministic: yes. Thread-safe: yes.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn mustafar_validate_record(
    record: u64,
    pool: *const mustafar_pool,
    max_len: i64,
) -> mustafar_status {
    boundary(|| {
        // SAFETY: the contract of this module.
        let pool = unsafe { self::pool(Pointers::Unread, &pool_names!("pool"), pool)? };
        ops::validate::check_record(record, &pool.layout, size("max_len", max_len)?)
    })
}
