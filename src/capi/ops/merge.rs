//! `merge`.

use crate::capi::context::mustafar_context;
use crate::capi::ops::run;
use crate::capi::status::mustafar_status;
use crate::capi::structs::extensible;
use crate::capi::tensor::{
    mustafar_tensor, mustafar_tensor_mut, tensor, tensor_mut, tensor_mut_optional, tensor_names,
};
use crate::capi::views::Pointers;
use crate::ops::{self, Merge};
use std::ffi::c_void;

/// Arguments of mustafar_merge: two results of mustafar_attend for the same queries over different tokens.
#[derive(Debug, Clone, Copy)]
#[repr(C)]
pub struct mustafar_merge_args {
    /// sizeof(mustafar_merge_args).
    pub struct_size: usize,
    /// First partial result [1, tokens, heads, dim] in f16, bf16 or f32. Required.
    pub a: *const mustafar_tensor,
    /// Its log-sum-exp, f32 [1, tokens, heads, 1], natural log; -inf and +inf mean "no tokens". Required.
    pub a_lse: *const mustafar_tensor,
    /// Second partial result. Required.
    pub b: *const mustafar_tensor,
    /// Its log-sum-exp. Required.
    pub b_lse: *const mustafar_tensor,
    /// Receives the result in f16, bf16 or f32. Required.
    pub out: *const mustafar_tensor_mut,
    /// Receives the log-sum-exp over both, f32 [1, tokens, heads, 1]. May be NULL.
    pub lse: *const mustafar_tensor_mut,
}

extensible!(mustafar_merge_args, first_release_ends_with lse, { struct_size, a, a_lse, b, b_lse, out, lse });

/// Combines attention over two disjoint sets of tokens: (exp(a_lse) * a + exp(b_lse) * b) / (exp(a_lse) + exp(b_lse))
/// in float32 and without overflow; 0 and -inf where neither side has tokens.
///
/// @param context  The context.
/// @param args     The partial results and the destination.
/// @param stream   CUDA stream, NULL the default one; NULL on the CPU backend.
/// @return SUCCESS; INVALID_ARGUMENT for shapes and dtypes; NULL_POINTER, MISALIGNED, OVERFLOW, VERSION_MISMATCH as
///         docs/c-api.md describes.
///
/// Async: CUDA yes, CPU no. Graph capture: yes. Workspace: none. Deterministic: yes, for the same instruction set or
/// device. Thread-safe: yes.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn mustafar_merge(
    context: *const mustafar_context,
    args: *const mustafar_merge_args,
    stream: *mut c_void,
) -> mustafar_status {
    let op = |context: &_, stream, pointers: Pointers, m: mustafar_merge_args| {
        let args = Merge {
            // SAFETY: the contract of this module.
            a: unsafe { tensor(pointers, &tensor_names!("a"), m.a)? },
            // SAFETY: the contract of this module.
            a_lse: unsafe { tensor(pointers, &tensor_names!("a_lse"), m.a_lse)? },
            // SAFETY: the contract of this module.
            b: unsafe { tensor(pointers, &tensor_names!("b"), m.b)? },
            // SAFETY: the contract of this module.
            b_lse: unsafe { tensor(pointers, &tensor_names!("b_lse"), m.b_lse)? },
            // SAFETY: the contract of this module.
            out: unsafe { tensor_mut(pointers, &tensor_names!("out"), m.out)? },
            // SAFETY: the contract of this module.
            lse: unsafe { tensor_mut_optional(pointers, &tensor_names!("lse"), m.lse)? },
        };
        ops::merge(context, stream, args)
    };
    // SAFETY: the contract of this module.
    unsafe { run(context, args, stream, op) }
}
