//! `attend` and the size of its workspace.

use crate::capi::context::mustafar_context;
use crate::capi::handle::put;
use crate::capi::ops::run;
use crate::capi::pool::{
    center, mustafar_center, mustafar_pool, mustafar_sequences, pool, pool_names, sequences,
};
use crate::capi::status::mustafar_status;
use crate::capi::structs::{extensible, read_optional};
use crate::capi::tensor::{
    Names, mustafar_tensor, mustafar_tensor_mut, tensor, tensor_mut, tensor_mut_optional, tensor_names,
};
use crate::capi::views::{Pointers, number_optional, size, size_optional};
use crate::error::{Error, Result};
use crate::ops::{self, Attend, Compressed, Dense};
use std::ffi::c_void;

/// The compressed tokens of a batch.
#[derive(Debug, Clone, Copy)]
#[repr(C)]
pub struct mustafar_compressed {
    /// sizeof(mustafar_compressed).
    pub struct_size: usize,
    /// Key pages. Required.
    pub k: *const mustafar_pool,
    /// Value pages: page_tokens, num_pages and kv_heads as in `k`; rows and keep may differ, on the CPU value type and
    /// head_dim too. Required.
    pub v: *const mustafar_pool,
    /// Which pages, and how many tokens. Required.
    pub sequences: *const mustafar_sequences,
    /// The centre that the key pages were written with; NULL: none.
    pub k_center: *const mustafar_center,
}

/// Dense tokens of a batch: the window after the compressed tokens, or the sinks before them.
#[derive(Debug, Clone, Copy)]
#[repr(C)]
pub struct mustafar_dense {
    /// sizeof(mustafar_dense).
    pub struct_size: usize,
    /// Keys [rows, max_len, kv_heads, k head_dim] in f16, bf16 or f32; never centred. CUDA rounds them to the type of
    /// the pages, beside 8-bit values to f16 or bf16. Required.
    pub k: *const mustafar_tensor,
    /// Values [rows, max_len, kv_heads, v head_dim]. Required.
    pub v: *const mustafar_tensor,
    /// Valid tokens of each sequence, int32 [batch], 0 to max_len. Required.
    pub lens: *const i32,
    /// Row of the tensors that holds each sequence, int32 [batch]; NULL: row b for sequence b.
    pub rows: *const i32,
}

/// Arguments of mustafar_attend. The tokens of a sequence are, in order, its sinks, its compressed tokens and its
/// window; positions count from 0. The last query token stands at the last position, the one before it one earlier,
/// and a query sees the positions up to its own.
#[derive(Debug, Clone, Copy)]
#[repr(C)]
pub struct mustafar_attend_args {
    /// sizeof(mustafar_attend_args).
    pub struct_size: usize,
    /// Queries [1, total_q, q_heads, k head_dim] in f16, bf16 or f32. q_heads is a multiple of kv_heads; query head h
    /// reads KV head h / (q_heads / kv_heads). CUDA rounds them to the type of the pages (without pages: of the window,
    /// the sinks or q, the first that is f16 or bf16; for pages of e4m3 to f16, of int8 to integers of 16 bits with a
    /// factor for each head). Required.
    pub q: *const mustafar_tensor,
    /// Receives [1, total_q, q_heads, v head_dim] in f16, bf16 or f32; 0 where a query sees nothing. On CUDA v head_dim
    /// is k head_dim. Required.
    pub out: *const mustafar_tensor_mut,
    /// Receives the natural-log log-sum-exp of the scaled (and softcapped) scores, f32 [1, total_q, q_heads, 1]; -inf
    /// where a query sees nothing. May be NULL.
    pub lse: *const mustafar_tensor_mut,
    /// Sequences in the batch.
    pub batch: i64,
    /// First query token of each sequence, int32 [batch + 1], rising from 0 to total_q. NULL: every sequence has
    /// total_q / batch query tokens.
    pub q_indptr: *const i32,
    /// Upper bound of the query tokens of a sequence; 0 is total_q / batch, and only without q_indptr.
    pub max_q_len: i64,
    /// First tokens, kept dense; NULL: none.
    pub sinks: *const mustafar_dense,
    /// Compressed tokens; NULL: none.
    pub compressed: *const mustafar_compressed,
    /// Most recent tokens, dense; NULL: none.
    pub window: *const mustafar_dense,
    /// First position of each sequence that may be seen (left padding), int32 [batch]; NULL: 0.
    pub first: *const i32,
    /// A query sees only this many last positions, its own included; 0: all.
    pub sliding_window: i64,
    /// Tokens that one work item covers; CUDA rounds it up to a multiple of 32. A number fixed here makes a sequence's
    /// result independent of the rest of the batch, bit for bit. 0: on the CPU a fixed number, on CUDA what is fastest
    /// for the batch and the upper bounds, so that results may differ in the last bits between batch sizes.
    pub split_tokens: i64,
    /// Factor of q.k; 0 is 1 / sqrt(k head_dim).
    pub scale: f32,
    /// c > 0 turns a score s into c * tanh(s / c); 0: off.
    pub softcap: f32,
}

extensible!(mustafar_compressed, first_release_ends_with k_center, { struct_size, k, v, sequences, k_center });
extensible!(mustafar_dense, first_release_ends_with rows, { struct_size, k, v, lens, rows });
extensible!(mustafar_attend_args, first_release_ends_with softcap, {
    struct_size, q, out, lse, batch, q_indptr, max_q_len, sinks, compressed, window, first, sliding_window,
    split_tokens, scale, softcap,
});

struct DenseNames {
    dense: &'static str,
    k: Names,
    v: Names,
    lens: &'static str,
    rows: &'static str,
}

macro_rules! dense_names {
    ($name:literal) => {
        DenseNames {
            dense: $name,
            k: tensor_names!(concat!($name, ".k")),
            v: tensor_names!(concat!($name, ".v")),
            lens: concat!($name, ".lens"),
            rows: concat!($name, ".rows"),
        }
    };
}

/// # Safety
/// The contract of this module.
unsafe fn dense<'a>(
    pointers: Pointers,
    names: &DenseNames,
    dense: *const mustafar_dense,
    batch: usize,
) -> Result<Option<Dense<'a>>> {
    // SAFETY: the caller's promise.
    let Some(d) = (unsafe { read_optional(names.dense, dense)? }) else {
        return Ok(None);
    };
    Ok(Some(Dense {
        // SAFETY: the caller's promise.
        k: unsafe { tensor(pointers, &names.k, d.k)? },
        // SAFETY: the caller's promise.
        v: unsafe { tensor(pointers, &names.v, d.v)? },
        // SAFETY: the caller's promise.
        lens: unsafe { pointers.mem(names.lens, d.lens, batch)? },
        // SAFETY: the caller's promise.
        rows: unsafe { pointers.mem_optional(names.rows, d.rows, batch)? },
    }))
}

/// # Safety
/// The contract of this module.
unsafe fn compressed<'a>(
    pointers: Pointers,
    compressed: *const mustafar_compressed,
) -> Result<Option<Compressed<'a>>> {
    // SAFETY: the caller's promise.
    let Some(c) = (unsafe { read_optional("compressed", compressed)? }) else {
        return Ok(None);
    };
    // SAFETY: the caller's promise.
    let k = unsafe { pool(pointers, &pool_names!("compressed.k"), c.k)? };
    Ok(Some(Compressed {
        k,
        // SAFETY: the caller's promise.
        v: unsafe { pool(pointers, &pool_names!("compressed.v"), c.v)? },
        // SAFETY: the caller's promise.
        sequences: unsafe { sequences(pointers, c.sequences, &k.layout)? },
        // SAFETY: the caller's promise.
        k_center: unsafe { center(pointers, c.k_center, k.layout.kv_heads, k.layout.format.head_dim())? },
    }))
}

/// # Safety
/// The contract of this module.
unsafe fn attend<'a>(pointers: Pointers, a: &mustafar_attend_args) -> Result<Attend<'a>> {
    // SAFETY: the caller's promise.
    let q = unsafe { tensor(pointers, &tensor_names!("q"), a.q)? };
    let batch = size("batch", a.batch)?;
    let max_q_len = match size("max_q_len", a.max_q_len)? {
        0 if a.q_indptr.is_null() => q.shape.tokens / batch.max(1),
        n => n,
    };
    let starts = batch.checked_add(1).ok_or(Error::Overflow { argument: "q_indptr" })?;
    Ok(Attend {
        q,
        batch,
        // SAFETY: the caller's promise.
        q_indptr: unsafe { pointers.mem_optional("q_indptr", a.q_indptr, starts)? },
        max_q_len,
        // SAFETY: the caller's promise.
        sinks: unsafe { dense(pointers, &dense_names!("sinks"), a.sinks, batch)? },
        // SAFETY: the caller's promise.
        compressed: unsafe { compressed(pointers, a.compressed)? },
        // SAFETY: the caller's promise.
        window: unsafe { dense(pointers, &dense_names!("window"), a.window, batch)? },
        // SAFETY: the caller's promise.
        first: unsafe { pointers.mem_optional("first", a.first, batch)? },
        scale: number_optional(a.scale),
        softcap: number_optional(a.softcap),
        sliding_window: size_optional("sliding_window", a.sliding_window)?,
        split_tokens: size_optional("split_tokens", a.split_tokens)?,
        // SAFETY: the caller's promise.
        out: unsafe { tensor_mut(pointers, &tensor_names!("out"), a.out)? },
        // SAFETY: the caller's promise.
        lse: unsafe { tensor_mut_optional(pointers, &tensor_names!("lse"), a.lse)? },
    })
}

/// Bytes of workspace that mustafar_attend needs. Depends on shapes and upper bounds only and never shrinks when one of
/// them grows, so a size taken at the largest batch serves every smaller one with the same split_tokens.
///
/// @param context  The context.
/// @param args     As for mustafar_attend. Data pointers and arrays are not looked at and required ones may be NULL; an
///                 optional one counts as given if it is not NULL.
/// @param bytes    Receives the size in bytes; may be 0.
/// @return As mustafar_attend for shapes and bounds.
///
/// Async: no. Graph capture: yes. Workspace: none. Deterministic: yes. Thread-safe: yes.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn mustafar_attend_workspace_size(
    context: *const mustafar_context,
    args: *const mustafar_attend_args,
    bytes: *mut usize,
) -> mustafar_status {
    let op = |context: &_, _, _, a: mustafar_attend_args| {
        // SAFETY: the contract of this module; `Unread` looks at structures only.
        let args = unsafe { attend(Pointers::Unread, &a)? };
        let needed = ops::attend_workspace(context, &args)?;
        // SAFETY: the contract of this module.
        unsafe { put("bytes", bytes, needed) }
    };
    // SAFETY: the contract of this module.
    unsafe { run(context, args, std::ptr::null_mut(), op) }
}

/// Decode attention over sinks, compressed pages and dense window in one pass: softmax(scores) . v over all tokens a
/// query sees, accumulated in float32.
///
/// @param context          The context.
/// @param args             Queries, tokens and destination.
/// @param workspace        Scratch memory of the context, aligned to 16 bytes; its contents do not matter. May be NULL
///                         if mustafar_attend_workspace_size says 0. Not shared with a call that may run at the same
///                         time.
/// @param workspace_bytes  Bytes at `workspace`, at least what mustafar_attend_workspace_size says.
/// @param stream           CUDA stream, NULL the default one; NULL on the CPU backend.
/// @return SUCCESS; BUFFER_TOO_SMALL for the workspace; on the CPU OUT_OF_RANGE for q_indptr, lengths, rows, first and
///         page numbers, which CUDA trusts: it reads or writes wherever wrong ones lead; INVALID_ARGUMENT for
///         shapes or dtypes that contradict each other, heads, scale and softcap; NULL_POINTER, MISALIGNED, OVERFLOW,
///         UNSUPPORTED, VERSION_MISMATCH as docs/c-api.md describes. On CUDA UNSUPPORTED where K and V differ in value
///         type or head_dim.
///
/// Async: CUDA yes, CPU no. Graph capture: yes. Workspace: mustafar_attend_workspace_size. Deterministic: yes, for the
/// same instruction set or device, and see split_tokens. Thread-safe: yes, with a workspace each.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn mustafar_attend(
    context: *const mustafar_context,
    args: *const mustafar_attend_args,
    workspace: *mut c_void,
    workspace_bytes: usize,
    stream: *mut c_void,
) -> mustafar_status {
    let op = |context: &_, stream, pointers: Pointers, a: mustafar_attend_args| {
        // SAFETY: the contract of this module.
        let args = unsafe { attend(pointers, &a)? };
        // SAFETY: the contract of this module.
        let workspace = unsafe { pointers.mem_mut("workspace", workspace, workspace_bytes)? };
        ops::attend(context, stream, args, workspace)
    };
    // SAFETY: the contract of this module.
    unsafe { run(context, args, stream, op) }
}
