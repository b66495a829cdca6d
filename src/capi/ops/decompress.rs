//! `decompress`.

use crate::capi::context::mustafar_context;
use crate::capi::ops::run;
use crate::capi::pool::{
    center, mustafar_center, mustafar_pool, mustafar_sequences, pool, pool_names, sequences,
};
use crate::capi::status::mustafar_status;
use crate::capi::structs::extensible;
use crate::capi::tensor::{mustafar_tensor_mut, tensor_mut, tensor_names};
use crate::capi::views::Pointers;
use crate::ops::{self, Decompress};
use std::ffi::c_void;

/// Arguments of mustafar_decompress.
#[derive(Debug, Clone, Copy)]
#[repr(C)]
pub struct mustafar_decompress_args {
    /// sizeof(mustafar_decompress_args).
    pub struct_size: usize,
    /// Pages, uniform or ragged. Required.
    pub pool: *const mustafar_pool,
    /// Which pages, and how many tokens. Required.
    pub sequences: *const mustafar_sequences,
    /// Centre to add back: every element becomes round(x + c), dropped ones round(c). NULL: dropped elements become +0.
    pub center: *const mustafar_center,
    /// Receives [batch, >= max_len, kv_heads, head_dim] in f16, bf16 or f32. Tokens past a sequence's length are not
    /// written. Required.
    pub out: *const mustafar_tensor_mut,
}

extensible!(mustafar_decompress_args, first_release_ends_with out, {
    struct_size, pool, sequences, center, out,
});

/// Writes the dense form of compressed tokens.
///
/// @param context  The context.
/// @param args     Pages and destination.
/// @param stream   CUDA stream, NULL the default one; NULL on the CPU backend.
/// @return SUCCESS; on the CPU OUT_OF_RANGE for lengths and page numbers, and CORRUPT_DATA for rows that leave their
///         page. CUDA counts them, see mustafar_context_take_device_errors: tokens without a page are not written, rows
///         whose bitmap does not fit their values become +0. INVALID_ARGUMENT for shapes; NULL_POINTER, MISALIGNED,
///         OVERFLOW, UNSUPPORTED, VERSION_MISMATCH as docs/c-api.md describes.
///
/// Async: CUDA yes, CPU no. Graph capture: yes. Workspace: none. Deterministic: yes, the same bits on every backend.
/// Thread-safe: yes.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn mustafar_decompress(
    context: *const mustafar_context,
    args: *const mustafar_decompress_args,
    stream: *mut c_void,
) -> mustafar_status {
    let op = |context: &_, stream, pointers: Pointers, a: mustafar_decompress_args| {
        // SAFETY: the contract of this module.
        let pool = unsafe { pool(pointers, &pool_names!("pool"), a.pool)? };
        let (heads, dim) = (pool.layout.kv_heads, pool.layout.format.head_dim());
        let args = Decompress {
            pool,
            // SAFETY: the contract of this module.
            sequences: unsafe { sequences(pointers, a.sequences, &pool.layout)? },
            // SAFETY: the contract of this module.
            center: unsafe { center(pointers, a.center, heads, dim)? },
            // SAFETY: the contract of this module.
            out: unsafe { tensor_mut(pointers, &tensor_names!("out"), a.out)? },
        };
        ops::decompress(context, stream, args)
    };
    // SAFETY: the contract of this module.
    unsafe { run(context, args, stream, op) }
}
