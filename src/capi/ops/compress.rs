//! `compress`.

use crate::capi::context::mustafar_context;
use crate::capi::ops::run;
use crate::capi::pool::{mustafar_pool_mut, pool_mut, pool_names};
use crate::capi::status::mustafar_status;
use crate::capi::structs::extensible;
use crate::capi::tensor::{mustafar_tensor, tensor, tensor_names};
use crate::capi::views::{Pointers, product};
use crate::ops::{self, Compress};
use std::ffi::c_void;

/// Arguments of mustafar_compress.
#[derive(Debug, Clone, Copy)]
#[repr(C)]
pub struct mustafar_compress_args {
    /// sizeof(mustafar_compress_args).
    pub struct_size: usize,
    /// Dense tokens [1, tokens, kv_heads, head_dim] in the type of the pages' values; for pages of 8-bit
    /// values f16 or bf16. Required.
    pub x: *const mustafar_tensor,
    /// What to keep, contiguous [tokens, kv_heads, head_dim / 8] bytes as mustafar_prune writes them. NULL: everything
    /// but +0 and -0.
    pub mask: *const u8,
    /// Destination: ragged pages. Required.
    pub pool: *const mustafar_pool_mut,
    /// Page that receives tokens i * page_tokens and following, int32 [ceil(tokens / page_tokens)], no page twice
    /// (checked on the CPU only). Rows of the last page after the last token become empty. Required.
    pub pages: *const i32,
    /// Receives how many values each page holds, uint32 [pages, kv_heads]; more than its capacity where it cannot hold
    /// them and was not written. May be NULL.
    pub needed: *mut u32,
}

extensible!(mustafar_compress_args, first_release_ends_with needed, {
    struct_size, x, mask, pool, pages, needed,
});

/// Stores any sparsity pattern into whole ragged pages.
///
/// @param context  The context.
/// @param args     Tokens, mask and pages.
/// @param stream   CUDA stream, NULL the default one; NULL on the CPU backend.
/// @return SUCCESS; on the CPU PAGE_OVERFLOW for the first page whose rows do not fit, before any page is written,
///         OUT_OF_RANGE for page numbers and INVALID_ARGUMENT for repeated ones. CUDA leaves a page that is too full or
///         out of range as it was and counts it, see mustafar_context_take_device_errors; it writes the others.
///         INVALID_ARGUMENT for shapes or dtypes that differ, uniform pages; NULL_POINTER, MISALIGNED, OVERFLOW,
///         UNSUPPORTED, VERSION_MISMATCH as docs/c-api.md describes.
///
/// Async: CUDA yes, CPU no. Graph capture: yes. Workspace: none; on the CPU it allocates a list of its pages.
/// Deterministic: yes, the same pages on every backend. Thread-safe: yes, for different pages.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn mustafar_compress(
    context: *const mustafar_context,
    args: *const mustafar_compress_args,
    stream: *mut c_void,
) -> mustafar_status {
    let op = |context: &_, stream, pointers: Pointers, a: mustafar_compress_args| {
        // SAFETY: the contract of this module.
        let x = unsafe { tensor(pointers, &tensor_names!("x"), a.x)? };
        // SAFETY: the contract of this module.
        let pool = unsafe { pool_mut(pointers, &pool_names!("pool"), a.pool)? };
        let mask = product("mask", &[x.shape.tokens, x.shape.heads, x.shape.dim / 8])?;
        let pages = x.shape.tokens.div_ceil(pool.layout.format.page_tokens());
        let needed = product("needed", &[pages, pool.layout.kv_heads])?;
        let args = Compress {
            x,
            // SAFETY: the contract of this module.
            mask: unsafe { pointers.mem_optional("mask", a.mask, mask)? },
            pool,
            // SAFETY: the contract of this module.
            pages: unsafe { pointers.mem("pages", a.pages, pages)? },
            // SAFETY: the contract of this module.
            needed: unsafe { pointers.mem_mut_optional("needed", a.needed, needed)? },
        };
        ops::compress(context, stream, args)
    };
    // SAFETY: the contract of this module.
    unsafe { run(context, args, stream, op) }
}
