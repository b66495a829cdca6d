//! Attention over a cache.

use crate::backend::Stream;
use crate::cache::CacheAttend;
use crate::capi::cache::sequence::ids;
use crate::capi::cache::{change, mustafar_cache};
use crate::capi::status::mustafar_status;
use crate::capi::structs::{extensible, read};
use crate::capi::tensor::{
    mustafar_tensor, mustafar_tensor_mut, tensor, tensor_mut, tensor_mut_optional, tensor_names,
};
use crate::capi::views::{number_optional, reserved, size_optional};
use std::ffi::c_void;

/// Arguments of mustafar_cache_attend: num_sequences sequences with total_q / num_sequences queries each.
#[derive(Debug, Clone, Copy)]
#[repr(C)]
pub struct mustafar_cache_attend_args {
    /// sizeof(mustafar_cache_attend_args).
    pub struct_size: usize,
    /// Sequences in the order of the queries, host memory; no sequence twice. Required.
    pub sequences: *const u64,
    /// How many.
    pub num_sequences: i64,
    /// Queries [1, total_q, q_heads, k head_dim] in f16, bf16 or f32. Required.
    pub q: *const mustafar_tensor,
    /// Receives [1, total_q, q_heads, v head_dim] in f16, bf16 or f32. Required.
    pub out: *const mustafar_tensor_mut,
    /// Receives the natural-log log-sum-exp, f32 [1, total_q, q_heads, 1]. May be NULL.
    pub lse: *const mustafar_tensor_mut,
    /// A query sees only this many last positions, its own included; 0: all.
    pub sliding_window: i64,
    /// Factor of q.k; 0 is 1 / sqrt(k head_dim).
    pub scale: f32,
    /// c > 0 turns a score s into c * tanh(s / c); 0: off.
    pub softcap: f32,
    /// Layer, 0 to layers - 1.
    pub layer: u32,
    /// Must be 0.
    pub reserved: u32,
}

extensible!(mustafar_cache_attend_args, first_release_ends_with reserved, {
    struct_size, sequences, num_sequences, q, out, lse, sliding_window, scale, softcap, layer, reserved,
});

/// Attention of the newest query tokens of each sequence over everything appended to the layer, as mustafar_attend.
///
/// @param cache   The cache.
/// @param args    Sequences, queries and destination.
/// @param stream  CUDA stream, NULL the default one; NULL on the CPU backend.
/// @return SUCCESS; INVALID_ARGUMENT or OUT_OF_RANGE for unknown or repeated sequences, layer, shapes, dtypes;
///         NULL_POINTER, MISALIGNED, OVERFLOW, UNSUPPORTED, VERSION_MISMATCH as docs/c-api.md describes.
///
/// Async: CUDA yes, CPU no. Graph capture: no. Workspace: the cache's own, which grows in a call with more than 16
/// query tokens per sequence. Deterministic: yes, for the same instruction set or device, alone and in any batch.
/// Thread-safe: one call at a time.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn mustafar_cache_attend(
    cache: *mut mustafar_cache,
    args: *const mustafar_cache_attend_args,
    stream: *mut c_void,
) -> mustafar_status {
    let body = |cache: &mut crate::Cache, pointers| {
        // SAFETY: the contract of this module.
        let a = unsafe { read("args", args)? };
        reserved("reserved", a.reserved)?;
        // SAFETY: the contract of this module.
        let sequences = unsafe { ids(a.sequences, a.num_sequences)? };
        let args = CacheAttend {
            layer: a.layer as usize,
            sequences: &sequences,
            // SAFETY: the contract of this module.
            q: unsafe { tensor(pointers, &tensor_names!("q"), a.q)? },
            scale: number_optional(a.scale),
            softcap: number_optional(a.softcap),
            sliding_window: size_optional("sliding_window", a.sliding_window)?,
            // SAFETY: the contract of this module.
            out: unsafe { tensor_mut(pointers, &tensor_names!("out"), a.out)? },
            // SAFETY: the contract of this module.
            lse: unsafe { tensor_mut_optional(pointers, &tensor_names!("lse"), a.lse)? },
        };
        // SAFETY: the contract of this module.
        let stream = unsafe { Stream::from_raw(stream) };
        cache.attend(stream, args)
    };
    // SAFETY: the contract of this module.
    unsafe { change(cache, body) }
}
