//! How fast attention over pages is expected to be.

use crate::capi::context::backend;
use crate::capi::error::boundary;
use crate::capi::format::{format, mustafar_format};
use crate::capi::status::mustafar_status;
use crate::capi::structs::{extensible, write};
use crate::ops;
use std::ffi::c_char;

/// What to expect of mustafar_attend over pages of two formats.
#[derive(Debug, Clone, Copy)]
#[repr(C)]
pub struct mustafar_advice {
    /// sizeof(mustafar_advice).
    pub struct_size: usize,
    /// A mustafar_speed.
    pub speed: u32,
    /// Written as 0.
    pub reserved: u32,
    /// Bytes of a token of one KV head in pages, K and V together; of full pages, ragged ones with all of their room.
    pub bytes_per_token: f64,
    /// The same dense in 16 bits.
    pub dense_bytes_per_token: f64,
    /// Why, and what to do instead where pages are slower: one line of English that is never freed.
    pub reason: *const c_char,
}

extensible!(mustafar_advice, first_release_ends_with reason, {
    struct_size, speed, reserved, bytes_per_token, dense_bytes_per_token, reason,
});

/// Whether mustafar_attend over pages of these formats is expected to be faster than dense attention, so that nobody takes a
/// slower path unawares: nothing refuses formats for their speed. It looks at the formats alone and needs no GPU. It holds for
/// contexts long enough that reading K and V is most of the work; docs/performance.md has the measurements.
///
/// @param backend  A mustafar_backend. For the CPU the answer is that for the instructions that a context would use in this
///                 process.
/// @param k        Format of the key pages.
/// @param v        Format of the value pages.
/// @param advice   Receives the answer; its struct_size must be set.
/// @return SUCCESS; INVALID_ARGUMENT for the backend, MUSTAFAR_CPU, or formats of different page_tokens; UNSUPPORTED for a
///         pair of formats that mustafar_attend does not take on CUDA; as mustafar_format_page_bytes for each format.
///
/// Async: no, and needs no context. Graph capture: yes. Workspace: none. Deterministic: yes. Thread-safe: yes.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn mustafar_attend_advice(
    backend: u32,
    k: *const mustafar_format,
    v: *const mustafar_format,
    advice: *mut mustafar_advice,
) -> mustafar_status {
    boundary(|| {
        let backend = self::backend("backend", backend)?;
        // SAFETY: the contract of this module.
        let (k, v) = unsafe { (format("k", k)?, format("v", v)?) };
        let found = ops::attend_advice(backend, &k, &v)?;
        let value = mustafar_advice {
            struct_size: size_of::<mustafar_advice>(),
            speed: found.speed as u32,
            reserved: 0,
            bytes_per_token: found.bytes_per_token,
            dense_bytes_per_token: found.dense_bytes_per_token,
            reason: found.reason.as_ptr(),
        };
        // SAFETY: the contract of this module.
        unsafe { write("advice", advice, &value) }
    })
}
