//! `spmv_key` and `spmv_value`.

use crate::capi::context::mustafar_context;
use crate::capi::ops::run;
use crate::capi::pool::{
    center, mustafar_center, mustafar_pool, mustafar_sequences, pool, pool_names, sequences,
};
use crate::capi::status::mustafar_status;
use crate::capi::structs::extensible;
use crate::capi::tensor::{mustafar_tensor, mustafar_tensor_mut, tensor, tensor_mut, tensor_names};
use crate::capi::views::{Pointers, number_optional, reserved};
use crate::ops::{self, SpmvKey, SpmvValue};
use std::ffi::c_void;

/// Arguments of mustafar_spmv_key.
#[derive(Debug, Clone, Copy)]
#[repr(C)]
pub struct mustafar_spmv_key_args {
    /// sizeof(mustafar_spmv_key_args).
    pub struct_size: usize,
    /// Queries [batch, q_len, q_heads, head_dim] in f16, bf16 or f32; q_heads is a multiple of kv_heads. Required.
    pub q: *const mustafar_tensor,
    /// Key pages. Required.
    pub pool: *const mustafar_pool,
    /// Which pages, and how many tokens. Required.
    pub sequences: *const mustafar_sequences,
    /// The centre that the pages were written with; NULL: none.
    pub center: *const mustafar_center,
    /// Receives scores, f32 [batch, q_len, q_heads, >= max_len]. Tokens past a sequence's length are not written.
    /// Required.
    pub scores: *const mustafar_tensor_mut,
    /// Factor of q.k; 0 is 1 / sqrt(head_dim).
    pub scale: f32,
    /// Must be 0.
    pub reserved: u32,
}

/// Arguments of mustafar_spmv_value.
#[derive(Debug, Clone, Copy)]
#[repr(C)]
pub struct mustafar_spmv_value_args {
    /// sizeof(mustafar_spmv_value_args).
    pub struct_size: usize,
    /// Weights of the tokens, f32 [batch, q_len, q_heads, >= max_len]. Required.
    pub weights: *const mustafar_tensor,
    /// Value pages. Required.
    pub pool: *const mustafar_pool,
    /// Which pages, and how many tokens. Required.
    pub sequences: *const mustafar_sequences,
    /// Receives [batch, q_len, q_heads, head_dim] in f16, bf16 or f32. Required.
    pub out: *const mustafar_tensor_mut,
}

extensible!(mustafar_spmv_key_args, first_release_ends_with reserved, {
    struct_size, q, pool, sequences, center, scores, scale, reserved,
});
extensible!(mustafar_spmv_value_args, first_release_ends_with out, {
    struct_size, weights, pool, sequences, out,
});

/// Scores of compressed keys, the first half of unfused attention: scores[b, i, h, t] = scale * (q[b, i, h] . k[b, t,
/// h / group]) for every compressed token, without masking. Accumulates in float32.
///
/// @param context  The context.
/// @param args     Queries, key pages and destination.
/// @param stream   CUDA stream, NULL the default one; NULL on the CPU backend.
/// @return SUCCESS; on the CPU OUT_OF_RANGE for lengths and page numbers. CUDA counts them, see
///         mustafar_context_take_device_errors: scores of tokens without a page are not written, a damaged row counts
///         as +0. INVALID_ARGUMENT for shapes, heads and scale; NULL_POINTER, MISALIGNED, OVERFLOW, UNSUPPORTED,
///         VERSION_MISMATCH as docs/c-api.md describes.
///
/// Async: CUDA yes, CPU no. Graph capture: yes. Workspace: none. Deterministic: yes, for the same instruction set or
/// device. Thread-safe: yes.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn mustafar_spmv_key(
    context: *const mustafar_context,
    args: *const mustafar_spmv_key_args,
    stream: *mut c_void,
) -> mustafar_status {
    let op = |context: &_, stream, pointers: Pointers, a: mustafar_spmv_key_args| {
        reserved("reserved", a.reserved)?;
        // SAFETY: the contract of this module.
        let pool = unsafe { pool(pointers, &pool_names!("pool"), a.pool)? };
        let (heads, dim) = (pool.layout.kv_heads, pool.layout.format.head_dim());
        let args = SpmvKey {
            // SAFETY: the contract of this module.
            q: unsafe { tensor(pointers, &tensor_names!("q"), a.q)? },
            pool,
            // SAFETY: the contract of this module.
            sequences: unsafe { sequences(pointers, a.sequences, &pool.layout)? },
            // SAFETY: the contract of this module.
            center: unsafe { center(pointers, a.center, heads, dim)? },
            scale: number_optional(a.scale),
            // SAFETY: the contract of this module.
            scores: unsafe { tensor_mut(pointers, &tensor_names!("scores"), a.scores)? },
        };
        ops::spmv_key(context, stream, args)
    };
    // SAFETY: the contract of this module.
    unsafe { run(context, args, stream, op) }
}

/// Weighted sums of compressed values, the second half of unfused attention: out[b, i, h] = sum over t of weights[b, i,
/// h, t] * v[b, t, h / group]. Accumulates in float32.
///
/// @param context  The context.
/// @param args     Weights, value pages and destination.
/// @param stream   CUDA stream, NULL the default one; NULL on the CPU backend.
/// @return As mustafar_spmv_key; on CUDA tokens without a page count as no tokens.
///
/// Async: CUDA yes, CPU no. Graph capture: yes. Workspace: none. Deterministic: yes, for the same instruction set or
/// device. Thread-safe: yes.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn mustafar_spmv_value(
    context: *const mustafar_context,
    args: *const mustafar_spmv_value_args,
    stream: *mut c_void,
) -> mustafar_status {
    let op = |context: &_, stream, pointers: Pointers, a: mustafar_spmv_value_args| {
        // SAFETY: the contract of this module.
        let pool = unsafe { pool(pointers, &pool_names!("pool"), a.pool)? };
        let args = SpmvValue {
            // SAFETY: the contract of this module.
            weights: unsafe { tensor(pointers, &tensor_names!("weights"), a.weights)? },
            pool,
            // SAFETY: the contract of this module.
            sequences: unsafe { sequences(pointers, a.sequences, &pool.layout)? },
            // SAFETY: the contract of this module.
            out: unsafe { tensor_mut(pointers, &tensor_names!("out"), a.out)? },
        };
        ops::spmv_value(context, stream, args)
    };
    // SAFETY: the contract of this module.
    unsafe { run(context, args, stream, op) }
}
