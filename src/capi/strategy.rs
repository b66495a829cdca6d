//! Strategies by name. Pure host functions that need no context.

use crate::capi::error::boundary;
use crate::capi::format::{mustafar_format, mustafar_rows};
use crate::capi::handle::{check_pointer, put};
use crate::capi::status::mustafar_status;
use crate::capi::structs::write;
use crate::dtype::ValueType;
use crate::error::{Error, Result};
use crate::strategy::Strategy;
use std::ffi::{CStr, c_char};

/// How keys (K) or values (V) are chosen; docs/accuracy.md says what each costs. x is an element of K or V.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u32)]
pub enum mustafar_strategy {
    /// KT_MAG for keys, VT_MAG for values.
    Default = 0,
    /// "Kt_Mag": in each row of K the largest abs(x).
    KtMag = 1,
    /// "Kt_Opa": in each row of K the largest abs(x) * w, w being the mean abs(q) of the last 32 queries, summed over the
    /// query heads of the KV head.
    KtOpa = 2,
    /// "Kc_Mag": in 32 consecutive tokens, each channel of K keeps its largest abs(x).
    KcMag = 3,
    /// "think": whole channels of K, chosen once by mean q^2 of the last 32 queries times mean x^2.
    Think = 4,
    /// "Vt_Mag": in each row of V the largest abs(x).
    VtMag = 5,
    /// "Vt_Opa": in each row of V the largest abs(x) times the token's attention, which is the choice of VT_MAG.
    VtOpa = 6,
    /// "Vc_Mag": in 32 consecutive tokens, each channel of V keeps its largest abs(x).
    VcMag = 7,
    /// "Vc_Opa": in 32 consecutive tokens, each channel of V keeps its largest abs(x) * a, a being the token's attention,
    /// summed over the last 32 queries and the query heads of the KV head.
    VcOpa = 8,
    /// "thinv": whole channels of V, chosen once by mean x^2.
    Thinv = 9,
}

/// The strategy of a code; 0 is `default`.
pub(super) fn strategy(argument: &'static str, code: u32, default: Strategy) -> Result<Strategy> {
    if code == mustafar_strategy::Default as u32 {
        return Ok(default);
    }
    Strategy::ALL.into_iter().find(|strategy| *strategy as u32 == code).ok_or_else(|| {
        let all: Vec<String> = Strategy::ALL.iter().map(|s| format!("{} ({s})", *s as u32)).collect();
        Error::invalid(argument, code, format!("0 (default), {}", all.join(", ")))
    })
}

/// The strategy of a name, such as "Kt_Opa".
///
/// @param name      Zero-terminated name, as mustafar_strategy lists them.
/// @param strategy  Receives the mustafar_strategy.
/// @return SUCCESS; INVALID_ARGUMENT for an unknown name, with the known ones; NULL_POINTER, MISALIGNED.
///
/// Async: no, and needs no context. Graph capture: yes. Workspace: none. Deterministic: yes. Thread-safe: yes.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn mustafar_strategy_from_name(
    name: *const c_char,
    strategy: *mut u32,
) -> mustafar_status {
    boundary(|| {
        check_pointer("name", name)?;
        // SAFETY: the contract of this module: a zero-terminated string.
        let found: Strategy = unsafe { CStr::from_ptr(name) }.to_string_lossy().parse()?;
        // SAFETY: the contract of this module.
        unsafe { put("strategy", strategy, found as u32) }
    })
}

/// The pages that hold what a strategy keeps at a sparsity: uniform ones, or in channel direction ragged ones with room for
/// exactly what is kept of each channel in every 32 tokens.
///
/// @param strategy     A mustafar_strategy other than DEFAULT.
/// @param value_type   Type of the values.
/// @param head_dim     Channels per row.
/// @param page_tokens  Tokens per page; a multiple of 32 in channel direction.
/// @param sparsity     Share to drop, 0 <= sparsity < 1.
/// @param format       Receives the format; its struct_size must be set.
/// @return SUCCESS; INVALID_ARGUMENT or UNSUPPORTED for an argument; NULL_POINTER, MISALIGNED.
///
/// Async: no, and needs no context. Graph capture: yes. Workspace: none. Deterministic: yes. Thread-safe: yes.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn mustafar_strategy_format(
    strategy: u32,
    value_type: u32,
    head_dim: u32,
    page_tokens: u32,
    sparsity: f64,
    format: *mut mustafar_format,
) -> mustafar_status {
    boundary(|| {
        if strategy == mustafar_strategy::Default as u32 {
            return Err(Error::invalid("strategy", strategy, "1 to 9, a named one"));
        }
        let strategy = self::strategy("strategy", strategy, Strategy::KtMag)?;
        let value_type = ValueType::from_code("value_type", value_type)?;
        let made = strategy.page_format(value_type, head_dim as usize, page_tokens as usize, sparsity)?;
        let rows = if made.keep().is_some() { mustafar_rows::Uniform } else { mustafar_rows::Ragged };
        let value = mustafar_format {
            struct_size: size_of::<mustafar_format>(),
            rows: rows as u32,
            value_type: made.value_type() as u32,
            head_dim,
            page_tokens,
            // Both are at most page_tokens * head_dim, a product of two table entries.
            keep: made.keep().unwrap_or(0) as u32,
            capacity: if made.keep().is_some() { 0 } else { made.capacity() as u32 },
        };
        // SAFETY: the contract of this module.
        unsafe { write("format", format, &value) }
    })
}
