//! `query_weights`, `structured_weights`, `token_weights`.

use crate::capi::context::mustafar_context;
use crate::capi::ops::run;
use crate::capi::pool::{center, mustafar_center};
use crate::capi::status::mustafar_status;
use crate::capi::structs::extensible;
use crate::capi::tensor::{mustafar_tensor, tensor, tensor_names, tensor_optional};
use crate::capi::views::{Pointers, number_optional, product, size, size_optional};
use crate::ops::{self, QueryWeights, StructuredWeights, TokenWeights};
use std::ffi::c_void;

/// Arguments of mustafar_query_weights.
#[derive(Debug, Clone, Copy)]
#[repr(C)]
pub struct mustafar_query_weights_args {
    /// sizeof(mustafar_query_weights_args).
    pub struct_size: usize,
    /// Queries of one sequence after RoPE, f16, bf16 or f32 [1, tokens, q_heads, dim]; the newest 32 for Kt_Opa. Required.
    pub q: *const mustafar_tensor,
    /// KV heads, a divisor of q_heads.
    pub kv_heads: i64,
    /// Receives float [kv_heads, dim]. Required.
    pub out: *mut f32,
}

/// Arguments of mustafar_structured_weights.
#[derive(Debug, Clone, Copy)]
#[repr(C)]
pub struct mustafar_structured_weights_args {
    /// sizeof(mustafar_structured_weights_args).
    pub struct_size: usize,
    /// K or V of one sequence, f16 or bf16 [1, tokens, kv_heads, dim]. Required.
    pub x: *const mustafar_tensor,
    /// Centre subtracted before x is judged; batch 1. NULL: none.
    pub center: *const mustafar_center,
    /// Queries as mustafar_query_weights takes them ("think"). NULL: x alone counts ("thinv").
    pub q: *const mustafar_tensor,
    /// Channels kept of each KV head, 1 to dim.
    pub keep: i64,
    /// Receives float [kv_heads, dim]. Required.
    pub out: *mut f32,
}

/// Arguments of mustafar_token_weights.
#[derive(Debug, Clone, Copy)]
#[repr(C)]
pub struct mustafar_token_weights_args {
    /// sizeof(mustafar_token_weights_args).
    pub struct_size: usize,
    /// Queries as mustafar_query_weights takes them. Required.
    pub q: *const mustafar_tensor,
    /// Their natural-log log-sum-exps as mustafar_attend gives them, f32 [1, tokens of q, q_heads, 1]. Required.
    pub lse: *const mustafar_tensor,
    /// Position of the newest query in its sequence; the others stand one before another. With their number below 2^31, as
    /// that of the first key with the number of keys.
    pub q_position: i64,
    /// Keys as the queries saw them, f16, bf16 or f32 [1, tokens, kv_heads, dim]. Required.
    pub k: *const mustafar_tensor,
    /// Position of the first key.
    pub k_position: i64,
    /// A query sees only this many last positions, its own included; 0: all.
    pub sliding_window: i64,
    /// Factor of q.k; 0 is 1 / sqrt(dim).
    pub scale: f32,
    /// c > 0 turns a score s into c * tanh(s / c); 0: off.
    pub softcap: f32,
    /// Receives float [tokens, kv_heads]. Required.
    pub out: *mut f32,
}

extensible!(mustafar_query_weights_args, first_release_ends_with out, { struct_size, q, kv_heads, out });
extensible!(mustafar_structured_weights_args, first_release_ends_with out, {
    struct_size, x, center, q, keep, out,
});
extensible!(mustafar_token_weights_args, first_release_ends_with out, {
    struct_size, q, lse, q_position, k, k_position, sliding_window, scale, softcap, out,
});

/// Selection weights of the strategy Kt_Opa for mustafar_append and mustafar_prune: per KV head and channel the mean of
/// abs(q) over the tokens, summed over the query heads of the KV head. A NaN becomes infinity.
///
/// @param context  The context.
/// @param args     Queries and destination.
/// @param stream   CUDA stream, NULL the default one; NULL on the CPU backend.
/// @return SUCCESS; INVALID_ARGUMENT for shapes, dtypes and ranges; NULL_POINTER, MISALIGNED, OVERFLOW, VERSION_MISMATCH as
///         docs/c-api.md describes.
///
/// Async: CUDA yes, CPU no. Graph capture: yes. Workspace: none; on the CPU it allocates sums. Deterministic: yes, the same
/// bits on every backend. Thread-safe: yes.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn mustafar_query_weights(
    context: *const mustafar_context,
    args: *const mustafar_query_weights_args,
    stream: *mut c_void,
) -> mustafar_status {
    let op = |context: &_, stream, pointers: Pointers, a: mustafar_query_weights_args| {
        // SAFETY: the contract of this module.
        let q = unsafe { tensor(pointers, &tensor_names!("q"), a.q)? };
        let kv_heads = size("kv_heads", a.kv_heads)?;
        let count = product("out", &[kv_heads, q.shape.dim])?;
        // SAFETY: the contract of this module.
        let out = unsafe { pointers.mem_mut("out", a.out, count)? };
        ops::query_weights(context, stream, QueryWeights { q, kv_heads, out })
    };
    // SAFETY: the contract of this module.
    unsafe { run(context, args, stream, op) }
}

/// Selection weights of the strategies think and thinv for mustafar_append and mustafar_prune: infinity for the `keep`
/// channels of the largest mean(q^2) * mean(x^2) of each KV head, 0 for the others. With the same keep, selection takes
/// exactly these channels of every row of finite elements.
///
/// @param context  The context.
/// @param args     Tokens, queries and destination.
/// @param stream   CUDA stream, NULL the default one; NULL on the CPU backend.
/// @return As mustafar_query_weights.
///
/// Async: CUDA yes, CPU no. Graph capture: yes. Workspace: none; on the CPU it allocates sums. Deterministic: yes, the same
/// bits on every backend. Thread-safe: yes.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn mustafar_structured_weights(
    context: *const mustafar_context,
    args: *const mustafar_structured_weights_args,
    stream: *mut c_void,
) -> mustafar_status {
    let op = |context: &_, stream, pointers: Pointers, a: mustafar_structured_weights_args| {
        // SAFETY: the contract of this module.
        let x = unsafe { tensor(pointers, &tensor_names!("x"), a.x)? };
        let (heads, dim) = (x.shape.heads, x.shape.dim);
        let count = product("out", &[heads, dim])?;
        let args = StructuredWeights {
            x: &[x],
            // SAFETY: the contract of this module.
            center: unsafe { center(pointers, a.center, heads, dim)? },
            // SAFETY: the contract of this module.
            q: unsafe { tensor_optional(pointers, &tensor_names!("q"), a.q)? },
            keep: size("keep", a.keep)?,
            // SAFETY: the contract of this module.
            out: unsafe { pointers.mem_mut("out", a.out, count)? },
        };
        ops::structured_weights(context, stream, args)
    };
    // SAFETY: the contract of this module.
    unsafe { run(context, args, stream, op) }
}

/// Token weights of the strategy Vc_Opa for mustafar_prune: per token and KV head the attention weight exp(score - lse),
/// summed over the queries that see the token and over the query heads of the KV head. A weight below exp(-87.3) counts as
/// 0, one above exp(88) and a NaN as infinity.
///
/// @param context  The context.
/// @param args     Queries, keys and destination.
/// @param stream   CUDA stream, NULL the default one; NULL on the CPU backend.
/// @return As mustafar_query_weights.
///
/// Async: CUDA yes, CPU no. Graph capture: yes. Workspace: none; on the CPU it allocates the queries in float.
/// Deterministic: yes, the same bits on every backend. Thread-safe: yes.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn mustafar_token_weights(
    context: *const mustafar_context,
    args: *const mustafar_token_weights_args,
    stream: *mut c_void,
) -> mustafar_status {
    let op = |context: &_, stream, pointers: Pointers, a: mustafar_token_weights_args| {
        // SAFETY: the contract of this module.
        let q = unsafe { tensor(pointers, &tensor_names!("q"), a.q)? };
        // SAFETY: the contract of this module.
        let lse = unsafe { tensor(pointers, &tensor_names!("lse"), a.lse)? };
        // SAFETY: the contract of this module.
        let k = unsafe { tensor(pointers, &tensor_names!("k"), a.k)? };
        let count = product("out", &[k.shape.tokens, k.shape.heads])?;
        let args = TokenWeights {
            q,
            lse,
            q_position: size("q_position", a.q_position)?,
            k,
            k_position: size("k_position", a.k_position)?,
            scale: number_optional(a.scale),
            softcap: number_optional(a.softcap),
            sliding_window: size_optional("sliding_window", a.sliding_window)?,
            // SAFETY: the contract of this module.
            out: unsafe { pointers.mem_mut("out", a.out, count)? },
        };
        ops::token_weights(context, stream, args)
    };
    // SAFETY: the contract of this module.
    unsafe { run(context, args, stream, op) }
}
