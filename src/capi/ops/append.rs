//! `append`.

use crate::capi::context::mustafar_context;
use crate::capi::ops::run;
use crate::capi::pool::{self, center, mustafar_center, mustafar_pool_mut, pool_mut, pool_names};
use crate::capi::status::mustafar_status;
use crate::capi::structs::{extensible, read_optional};
use crate::capi::tensor::{self, mustafar_tensor, tensor, tensor_names};
use crate::capi::views::{Pointers, product};
use crate::error::{Error, Result};
use crate::ops::{self, Append, AppendSide};
use std::ffi::c_void;

/// One side (K or V) of mustafar_append.
#[derive(Debug, Clone, Copy)]
#[repr(C)]
pub struct mustafar_append_side {
    /// sizeof(mustafar_append_side).
    pub struct_size: usize,
    /// New tokens [1, tokens, kv_heads, head_dim] in the type of the pages' values; for pages of 8-bit
    /// values f16 or bf16. Required.
    pub x: *const mustafar_tensor,
    /// Destination: uniform pages. Required.
    pub pool: *const mustafar_pool_mut,
    /// Selection weights, float [kv_heads, head_dim], each >= 0 (checked on the CPU only). NULL: plain magnitude.
    pub weights: *const f32,
    /// Centre subtracted before selecting and storing. NULL: none.
    pub center: *const mustafar_center,
}

/// Arguments of mustafar_append: K, V or both, stored at the same slots.
#[derive(Debug, Clone, Copy)]
#[repr(C)]
pub struct mustafar_append_args {
    /// sizeof(mustafar_append_args).
    pub struct_size: usize,
    /// Keys; NULL: none.
    pub k: *const mustafar_append_side,
    /// Values; NULL: none.
    pub v: *const mustafar_append_side,
    /// Slot of each token, int64 [tokens]: page * page_tokens + offset, or -1 to skip the token. On the CPU a slot
    /// given twice keeps the later token; on CUDA slots must be distinct, else such a row is a mixture. Required.
    pub slots: *const i64,
    /// Sequence of each token, int32 [tokens]: row of a per-sequence centre. Required exactly when a centre has
    /// batch > 1.
    pub sequence: *const i32,
}

extensible!(mustafar_append_side, first_release_ends_with center, { struct_size, x, pool, weights, center });
extensible!(mustafar_append_args, first_release_ends_with sequence, { struct_size, k, v, slots, sequence });

struct Names {
    side: &'static str,
    x: tensor::Names,
    pool: pool::Names,
    weights: &'static str,
}

/// # Safety
/// The contract of this module.
unsafe fn side<'a>(
    pointers: Pointers,
    names: &Names,
    side: *const mustafar_append_side,
) -> Result<Option<AppendSide<'a>>> {
    // SAFETY: the caller's promise.
    let Some(s) = (unsafe { read_optional(names.side, side)? }) else {
        return Ok(None);
    };
    // SAFETY: the caller's promise.
    let x = unsafe { tensor(pointers, &names.x, s.x)? };
    // SAFETY: the caller's promise.
    let pool = unsafe { pool_mut(pointers, &names.pool, s.pool)? };
    let (heads, dim) = (pool.layout.kv_heads, pool.layout.format.head_dim());
    let weights = product(names.weights, &[heads, dim])?;
    Ok(Some(AppendSide {
        x,
        pool,
        // SAFETY: the caller's promise.
        weights: unsafe { pointers.mem_optional(names.weights, s.weights, weights)? },
        // SAFETY: the caller's promise.
        center: unsafe { center(pointers, s.center, heads, dim)? },
    }))
}

/// Prunes new tokens and stores them into uniform pages: selects `keep` values of each row (ties to the lower channel)
/// and writes bitmap and values at the token's slot. Other slots are untouched.
///
/// @param context  The context.
/// @param args     Keys, values and slots.
/// @param stream   CUDA stream, NULL the default one; NULL on the CPU backend.
/// @return SUCCESS; on the CPU OUT_OF_RANGE for a slot below -1 or past the pool, or a sequence without centre, and
///         INVALID_ARGUMENT for negative or NaN weights. On CUDA any negative slot skips its token, and a token whose
///         slot lies past the pool or whose sequence has no centre is skipped and counted, see
///         mustafar_context_take_device_errors. INVALID_ARGUMENT for shapes, dtypes or tokens that differ, ragged
///         pages; NULL_POINTER, MISALIGNED, OVERFLOW, UNSUPPORTED, VERSION_MISMATCH as docs/c-api.md describes.
///
/// Async: CUDA yes, CPU no. Graph capture: yes. Workspace: none. Deterministic: yes, the same pages on every backend.
/// Thread-safe: yes, for different slots.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn mustafar_append(
    context: *const mustafar_context,
    args: *const mustafar_append_args,
    stream: *mut c_void,
) -> mustafar_status {
    let op = |context: &_, stream, pointers: Pointers, a: mustafar_append_args| {
        const K: Names =
            Names { side: "k", x: tensor_names!("k.x"), pool: pool_names!("k.pool"), weights: "k.weights" };
        const V: Names =
            Names { side: "v", x: tensor_names!("v.x"), pool: pool_names!("v.pool"), weights: "v.weights" };
        // SAFETY: the contract of this module.
        let k = unsafe { side(pointers, &K, a.k)? };
        // SAFETY: the contract of this module.
        let v = unsafe { side(pointers, &V, a.v)? };
        let Some(first) = k.as_ref().or(v.as_ref()) else {
            return Err(Error::invalid("k and v", "NULL", "at least one of them"));
        };
        // One slot per token of the first side; the op refuses a second side with another number of tokens.
        let tokens = first.x.shape.tokens;
        // SAFETY: the contract of this module.
        let slots = unsafe { pointers.mem("slots", a.slots, tokens)? };
        // SAFETY: the contract of this module.
        let sequence = unsafe { pointers.mem_optional("sequence", a.sequence, tokens)? };
        ops::append(context, stream, Append { k, v, slots, sequence })
    };
    // SAFETY: the contract of this module.
    unsafe { run(context, args, stream, op) }
}
