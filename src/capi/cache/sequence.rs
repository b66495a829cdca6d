//! Sequences of a cache: life, length, appending.

use crate::backend::Stream;
use crate::cache::{CacheQueries, SequenceId};
use crate::capi::cache::{change, look, mustafar_cache, mustafar_cache_bytes_info, write_bytes};
use crate::capi::handle::{check_pointer, put};
use crate::capi::status::mustafar_status;
use crate::capi::structs::{extensible, read};
use crate::capi::tensor::{mustafar_tensor, tensor, tensor_names, tensor_optional};
use crate::capi::views::{Pointers, number_optional, size, size_optional, to_i64};
use crate::error::Result;
use crate::mem::Place;
use std::ffi::c_void;

/// The sequences an array names.
///
/// # Safety
/// `ids` points to `count` readable values, if count is not 0.
pub(super) unsafe fn ids(ids: *const u64, count: i64) -> Result<Vec<SequenceId>> {
    let count = size("num_sequences", count)?;
    // SAFETY: the caller's promise; sequence numbers are host memory on every backend.
    let ids = unsafe { Pointers::Into(Place::Host).mem("sequences", ids, count)? };
    Ok(ids.slice::<u64>("sequences", count)?.iter().copied().map(SequenceId::from_raw).collect())
}

/// A new, empty sequence.
///
/// @param cache     The cache.
/// @param sequence  Receives its number, which this cache never uses again.
/// @return SUCCESS; CACHE_FULL when max_sequences are live; NULL_POINTER, MISALIGNED.
///
/// Async: no. Graph capture: no. Workspace: none. Deterministic: yes. Thread-safe: one call at a time.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn mustafar_cache_sequence_create(
    cache: *mut mustafar_cache,
    sequence: *mut u64,
) -> mustafar_status {
    let body = |cache: &mut crate::Cache, _| {
        // Before the sequence exists, so that none is lost.
        check_pointer("sequence", sequence)?;
        // SAFETY: the contract of this module.
        unsafe { put("sequence", sequence, cache.create()?.to_raw()) }
    };
    // SAFETY: the contract of this module.
    unsafe { change(cache, body) }
}

/// A new sequence with the same tokens as another. Full pages are shared, dense tokens copied.
///
/// @param cache     The cache.
/// @param sequence  The sequence to copy.
/// @param fork      Receives the number of the new one.
/// @return SUCCESS; CACHE_FULL; INVALID_ARGUMENT for an unknown sequence; NULL_POINTER, MISALIGNED.
///
/// Async: no. Graph capture: no. Workspace: none. Deterministic: yes. Thread-safe: one call at a time.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn mustafar_cache_sequence_fork(
    cache: *mut mustafar_cache,
    sequence: u64,
    fork: *mut u64,
) -> mustafar_status {
    let body = |cache: &mut crate::Cache, _| {
        check_pointer("fork", fork)?;
        let new = cache.fork(SequenceId::from_raw(sequence))?;
        // SAFETY: the contract of this module.
        unsafe { put("fork", fork, new.to_raw()) }
    };
    // SAFETY: the contract of this module.
    unsafe { change(cache, body) }
}

/// Drops all tokens from position `len` on, in every layer. Tokens that were compressed stay compressed.
///
/// @param cache     The cache.
/// @param sequence  The sequence.
/// @param len       Tokens to keep, 0 to the length of the shortest layer.
/// @return SUCCESS; INVALID_ARGUMENT or OUT_OF_RANGE for an unknown sequence or len; NULL_POINTER, MISALIGNED.
///
/// Async: no. Graph capture: no. Workspace: none. Deterministic: yes. Thread-safe: one call at a time.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn mustafar_cache_sequence_truncate(
    cache: *mut mustafar_cache,
    sequence: u64,
    len: i64,
) -> mustafar_status {
    let body =
        |cache: &mut crate::Cache, _| cache.truncate(SequenceId::from_raw(sequence), size("len", len)?);
    // SAFETY: the contract of this module.
    unsafe { change(cache, body) }
}

/// Ends a sequence; its unshared pages become free.
///
/// @param cache     The cache.
/// @param sequence  The sequence; refused from then on.
/// @return SUCCESS; INVALID_ARGUMENT for an unknown sequence; NULL_POINTER, MISALIGNED.
///
/// Async: no. Graph capture: no. Workspace: none. Deterministic: yes. Thread-safe: one call at a time.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn mustafar_cache_sequence_free(
    cache: *mut mustafar_cache,
    sequence: u64,
) -> mustafar_status {
    // SAFETY: the contract of this module.
    unsafe { change(cache, |cache, _| cache.free(SequenceId::from_raw(sequence))) }
}

/// Tokens of a layer of a sequence.
///
/// @param cache       The cache.
/// @param layer       Layer, 0 to layers - 1.
/// @param sequence    The sequence.
/// @param tokens      Receives how many there are.
/// @param compressed  Receives how many of them are compressed; may be NULL.
/// @return SUCCESS; INVALID_ARGUMENT or OUT_OF_RANGE for an unknown sequence or layer; NULL_POINTER, MISALIGNED.
///
/// Async: no. Graph capture: yes. Workspace: none. Deterministic: yes. Thread-safe: with other calls that take the
/// cache const.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn mustafar_cache_len(
    cache: *const mustafar_cache,
    layer: u32,
    sequence: u64,
    tokens: *mut i64,
    compressed: *mut i64,
) -> mustafar_status {
    let body = |cache: &crate::Cache| {
        let (all, pruned) = cache.len(layer as usize, SequenceId::from_raw(sequence))?;
        let (all, pruned) = (to_i64("tokens", all)?, to_i64("compressed", pruned)?);
        check_pointer("tokens", tokens)?;
        if !compressed.is_null() {
            // SAFETY: the contract of this module.
            unsafe { put("compressed", compressed, pruned)? };
        }
        // SAFETY: the contract of this module.
        unsafe { put("tokens", tokens, all) }
    };
    // SAFETY: the contract of this module.
    unsafe { look(cache, body) }
}

/// What one sequence holds; shared pages count in full.
///
/// @param cache     The cache.
/// @param sequence  The sequence.
/// @param bytes     Receives the sizes; its struct_size must be set.
/// @return SUCCESS; INVALID_ARGUMENT for an unknown sequence; NULL_POINTER, MISALIGNED.
///
/// Async: no. Graph capture: yes. Workspace: none. Deterministic: yes. Thread-safe: with other calls that take the
/// cache const.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn mustafar_cache_sequence_bytes(
    cache: *const mustafar_cache,
    sequence: u64,
    bytes: *mut mustafar_cache_bytes_info,
) -> mustafar_status {
    // SAFETY: the contract of this module.
    let body = |cache: &crate::Cache| unsafe {
        write_bytes(bytes, cache.sequence_bytes(SequenceId::from_raw(sequence))?)
    };
    // SAFETY: the contract of this module.
    unsafe { look(cache, body) }
}

/// Appends tokens to one layer of one sequence: a whole prompt after prefill, or what a decode step produced. After the
/// call the newest tokens are dense and the older ones compressed, however they were split over calls. Every layer must
/// receive the same tokens.
///
/// @param cache     The cache.
/// @param layer     Layer, 0 to layers - 1.
/// @param sequence  The sequence.
/// @param k         Keys [1, tokens, kv_heads, head_dim] in the value type of the key pages, after RoPE.
/// @param v         Values [1, tokens, kv_heads, head_dim] in the value type of the value pages.
/// @param stream    CUDA stream, NULL the default one; NULL on the CPU backend.
/// @return SUCCESS; CACHE_FULL when pages run out; INVALID_ARGUMENT or OUT_OF_RANGE for sequence, layer, shapes,
///         dtypes; NULL_POINTER, MISALIGNED, OVERFLOW, VERSION_MISMATCH as docs/c-api.md describes. Nothing is appended
///         then.
///
/// Async: CUDA yes, CPU no. Graph capture: no. Workspace: none. Deterministic: yes. Thread-safe: one call at a time.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn mustafar_cache_append(
    cache: *mut mustafar_cache,
    layer: u32,
    sequence: u64,
    k: *const mustafar_tensor,
    v: *const mustafar_tensor,
    stream: *mut c_void,
) -> mustafar_status {
    let body = |cache: &mut crate::Cache, pointers| {
        // SAFETY: the contract of this module.
        let k = unsafe { tensor(pointers, &tensor_names!("k"), k)? };
        // SAFETY: the contract of this module.
        let v = unsafe { tensor(pointers, &tensor_names!("v"), v)? };
        // SAFETY: the contract of this module.
        let stream = unsafe { Stream::from_raw(stream) };
        cache.append(stream, layer as usize, SequenceId::from_raw(sequence), k, v)
    };
    // SAFETY: the contract of this module.
    unsafe { change(cache, body) }
}

/// Appends the same number of tokens to one layer of several sequences.
///
/// @param cache          The cache.
/// @param layer          Layer, 0 to layers - 1.
/// @param sequences      Host memory; no sequence twice.
/// @param num_sequences  How many.
/// @param k              Keys [num_sequences, tokens, kv_heads, head_dim].
/// @param v              Values [num_sequences, tokens, kv_heads, head_dim].
/// @param stream         CUDA stream, NULL the default one; NULL on the CPU backend.
/// @return As mustafar_cache_append; on error no sequence has changed.
///
/// Async: CUDA yes, CPU no. Graph capture: no. Workspace: none. Deterministic: yes. Thread-safe: one call at a time.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn mustafar_cache_append_batch(
    cache: *mut mustafar_cache,
    layer: u32,
    sequences: *const u64,
    num_sequences: i64,
    k: *const mustafar_tensor,
    v: *const mustafar_tensor,
    stream: *mut c_void,
) -> mustafar_status {
    let body = |cache: &mut crate::Cache, pointers| {
        // SAFETY: the contract of this module.
        let ids = unsafe { ids(sequences, num_sequences)? };
        // SAFETY: the contract of this module.
        let k = unsafe { tensor(pointers, &tensor_names!("k"), k)? };
        // SAFETY: the contract of this module.
        let v = unsafe { tensor(pointers, &tensor_names!("v"), v)? };
        // SAFETY: the contract of this module.
        let stream = unsafe { Stream::from_raw(stream) };
        cache.append_batch(stream, layer as usize, &ids, k, v)
    };
    // SAFETY: the contract of this module.
    unsafe { change(cache, body) }
}

/// Queries of the newest tokens of each sequence, for mustafar_cache_append_with_queries.
#[derive(Debug, Clone, Copy)]
#[repr(C)]
pub struct mustafar_cache_queries {
    /// sizeof(mustafar_cache_queries).
    pub struct_size: usize,
    /// Queries after RoPE, f16, bf16 or f32 [num_sequences, n, q_heads, k head_dim]: those of the last n tokens appended,
    /// 1 to all of them; more than 32 are not needed. Required.
    pub q: *const mustafar_tensor,
    /// Their natural-log log-sum-exps, f32 [num_sequences, n, q_heads, 1], over all tokens that each query saw. Required for
    /// VC_OPA, else may be NULL.
    pub lse: *const mustafar_tensor,
    /// A query sees only this many last positions, its own included; 0: all.
    pub sliding_window: i64,
    /// Factor of q.k; 0 is 1 / sqrt(k head_dim).
    pub scale: f32,
    /// c > 0 turns a score s into c * tanh(s / c); 0: off.
    pub softcap: f32,
}

extensible!(mustafar_cache_queries, first_release_ends_with softcap, {
    struct_size, q, lse, sliding_window, scale, softcap,
});

/// As mustafar_cache_append_batch, with the queries of the newest of these tokens: what a caller that has computed their
/// attention itself, as for a prompt, owes strategies that judge by queries (KT_OPA, THINK, VC_OPA). mustafar_cache_attend
/// remembers its own.
///
/// @param cache          The cache.
/// @param layer          Layer, 0 to layers - 1.
/// @param sequences      Host memory; no sequence twice.
/// @param num_sequences  How many.
/// @param k              Keys [num_sequences, tokens, kv_heads, head_dim].
/// @param v              Values [num_sequences, tokens, kv_heads, head_dim].
/// @param queries        The queries.
/// @param stream         CUDA stream, NULL the default one; NULL on the CPU backend.
/// @return As mustafar_cache_append_batch; INVALID_ARGUMENT for the queries.
///
/// Async: CUDA yes, CPU no. Graph capture: no. Workspace: none. Deterministic: yes. Thread-safe: one call at a time.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn mustafar_cache_append_with_queries(
    cache: *mut mustafar_cache,
    layer: u32,
    sequences: *const u64,
    num_sequences: i64,
    k: *const mustafar_tensor,
    v: *const mustafar_tensor,
    queries: *const mustafar_cache_queries,
    stream: *mut c_void,
) -> mustafar_status {
    let body = |cache: &mut crate::Cache, pointers| {
        // SAFETY: the contract of this module.
        let ids = unsafe { ids(sequences, num_sequences)? };
        // SAFETY: the contract of this module.
        let k = unsafe { tensor(pointers, &tensor_names!("k"), k)? };
        // SAFETY: the contract of this module.
        let v = unsafe { tensor(pointers, &tensor_names!("v"), v)? };
        // SAFETY: the contract of this module.
        let a = unsafe { read("queries", queries)? };
        let queries = CacheQueries {
            // SAFETY: the contract of this module.
            q: unsafe { tensor(pointers, &tensor_names!("queries.q"), a.q)? },
            // SAFETY: the contract of this module.
            lse: unsafe { tensor_optional(pointers, &tensor_names!("queries.lse"), a.lse)? },
            scale: number_optional(a.scale),
            softcap: number_optional(a.softcap),
            sliding_window: size_optional("queries.sliding_window", a.sliding_window)?,
        };
        // SAFETY: the contract of this module.
        let stream = unsafe { Stream::from_raw(stream) };
        cache.append_with_queries(stream, layer as usize, &ids, k, v, queries)
    };
    // SAFETY: the contract of this module.
    unsafe { change(cache, body) }
}
