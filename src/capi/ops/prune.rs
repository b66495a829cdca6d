//! `prune`.

use crate::capi::context::mustafar_context;
use crate::capi::ops::run;
use crate::capi::status::mustafar_status;
use crate::capi::structs::extensible;
use crate::capi::tensor::{mustafar_tensor_mut, tensor_mut, tensor_names};
use crate::capi::views::{Pointers, product, reserved};
use crate::error::{Error, Result};
use crate::ops::{self, Prune, Selection};
use std::ffi::c_void;

/// Which elements survive pruning.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u32)]
pub enum mustafar_selection {
    /// Token direction: the `keep` largest scores of each row; ties go to the lower channel.
    Token = 0,
    /// Token direction as the original Mustafar prunes: every magnitude of at least the `dropped`-th smallest, so
    /// rows with ties keep more.
    TokenReferenceTies = 1,
    /// Channel direction: in each group of 32 consecutive tokens, each channel keeps its `keep` largest magnitudes;
    /// ties go to the older token.
    Channel = 2,
}

/// Arguments of mustafar_prune.
#[derive(Debug, Clone, Copy)]
#[repr(C)]
pub struct mustafar_prune_args {
    /// sizeof(mustafar_prune_args).
    pub struct_size: usize,
    /// f16 or bf16 [batch, tokens, heads, dim], changed in place: dropped elements become +0. Tokens must be a multiple
    /// of 32 for the channel direction. Required.
    pub x: *const mustafar_tensor_mut,
    /// A mustafar_selection.
    pub selection: u32,
    /// TOKEN: values kept per row, 1 to dim. CHANNEL: tokens kept per channel and group, 1 to 32. Else 0.
    pub keep: u32,
    /// TOKEN_REFERENCE_TIES: 1 to dim, max(1, floor(sparsity * dim)). Else 0.
    pub dropped: u32,
    /// Must be 0.
    pub reserved: u32,
    /// Selection weights, float [heads, dim], each >= 0 (checked on the CPU only): the score is abs(x) * w. TOKEN only.
    /// NULL: plain magnitude.
    pub weights: *const f32,
    /// Receives the mask, contiguous [batch, tokens, heads, dim / 8] bytes, bit c % 8 of byte c / 8 for channel c. May
    /// be NULL.
    pub mask: *mut u8,
    /// Token weights, float [batch, tokens, heads], each >= 0 (checked on the CPU only): the score is abs(x) * w.
    /// CHANNEL only. NULL: plain magnitude.
    pub token_weights: *const f32,
}

extensible!(mustafar_prune_args, first_release_ends_with mask, {
    struct_size, x, selection, keep, dropped, reserved, weights, mask, token_weights,
});

fn selection(code: u32, keep: u32, dropped: u32) -> Result<Selection> {
    let unused = |argument, value: u32| match value {
        0 => Ok(()),
        _ => Err(Error::invalid(argument, value, "0 for this selection")),
    };
    if code == mustafar_selection::TokenReferenceTies as u32 {
        unused("keep", keep)?;
        return Ok(Selection::TokenReferenceTies { dropped: dropped as usize });
    }
    let keep = keep as usize;
    let selection = if code == mustafar_selection::Token as u32 {
        Selection::Token { keep }
    } else if code == mustafar_selection::Channel as u32 {
        Selection::Channel { keep }
    } else {
        let allowed = "0 (token), 1 (token, reference ties), 2 (channel)";
        return Err(Error::invalid("selection", code, allowed));
    };
    unused("dropped", dropped)?;
    Ok(selection)
}

/// Zeroes what a selection drops, in place on a dense tensor. Magnitudes compare by bit pattern, so NaN outranks
/// everything and is never dropped silently.
///
/// @param context  The context.
/// @param args     Tensor, selection and optional weights and mask.
/// @param stream   CUDA stream, NULL the default one; NULL on the CPU backend.
/// @return SUCCESS; UNSUPPORTED for a dtype or dim without kernels; INVALID_ARGUMENT for selection, keep, dropped,
///         tokens, weights that do not apply or on the CPU are negative or NaN, overlapping rows; NULL_POINTER,
///         MISALIGNED, OVERFLOW, VERSION_MISMATCH as docs/c-api.md describes.
///
/// Async: CUDA yes, CPU no. Graph capture: yes. Workspace: none. Deterministic: yes, the same bits on every backend.
/// Thread-safe: yes.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn mustafar_prune(
    context: *const mustafar_context,
    args: *const mustafar_prune_args,
    stream: *mut c_void,
) -> mustafar_status {
    let op = |context: &_, stream, pointers: Pointers, a: mustafar_prune_args| {
        reserved("reserved", a.reserved)?;
        // SAFETY: the contract of this module.
        let x = unsafe { tensor_mut(pointers, &tensor_names!("x"), a.x)? };
        let s = x.shape;
        let weights = product("weights", &[s.heads, s.dim])?;
        let token_weights = product("token_weights", &[s.batch, s.tokens, s.heads])?;
        let mask = product("mask", &[s.batch, s.tokens, s.heads, s.dim / 8])?;
        let args = Prune {
            selection: selection(a.selection, a.keep, a.dropped)?,
            // SAFETY: the contract of this module.
            weights: unsafe { pointers.mem_optional("weights", a.weights, weights)? },
            // SAFETY: the contract of this module.
            token_weights: unsafe { pointers.mem_optional("token_weights", a.token_weights, token_weights)? },
            // SAFETY: the contract of this module.
            mask: unsafe { pointers.mem_mut_optional("mask", a.mask, mask)? },
            x,
        };
        ops::prune(context, stream, args)
    };
    // SAFETY: the contract of this module.
    unsafe { run(context, args, stream, op) }
}
