//! Initialised structures, a context, and what a failing call must look like.

use mustafar::capi::context::{mustafar_context, mustafar_context_create, mustafar_context_destroy};
use mustafar::capi::error::mustafar_last_error_message;
use mustafar::capi::format::mustafar_format;
use mustafar::capi::status::mustafar_status;
use mustafar::capi::structs::Extensible;
use mustafar::capi::tensor::{mustafar_tensor, mustafar_tensor_mut};
use std::ffi::{CStr, c_void};
use std::ptr;

/// What a `_INIT` macro gives.
pub(crate) fn init<T: Extensible>() -> T {
    // SAFETY: `Extensible` structures have all-zero as a value and begin with a `usize`.
    unsafe {
        let mut value: T = std::mem::zeroed();
        ptr::from_mut(&mut value).cast::<usize>().write(size_of::<T>());
        value
    }
}

pub(crate) fn message() -> String {
    // SAFETY: never null, and copied before anything else can fail on this thread.
    unsafe { CStr::from_ptr(mustafar_last_error_message()) }.to_str().unwrap().to_owned()
}

/// The call succeeded, or the message says why not.
#[track_caller]
pub(crate) fn ok(status: mustafar_status) {
    assert_eq!(status, mustafar_status::Success, "{}", message());
}

/// The call was refused with this status and a message that has all of these parts.
#[track_caller]
pub(crate) fn refused(status: mustafar_status, expected: mustafar_status, parts: &[&str]) {
    let message = message();
    assert_eq!(status, expected, "{message}");
    for part in parts {
        assert!(message.contains(part), "{message:?} does not mention {part:?}");
    }
}

/// A context that ends with the test.
pub(crate) struct Context(pub(crate) *mut mustafar_context);

impl Context {
    pub(crate) fn new() -> Self {
        let mut context = ptr::null_mut();
        // SAFETY: a null configuration is the default; the output is a local.
        ok(unsafe { mustafar_context_create(ptr::null(), &mut context) });
        Self(context)
    }
}

impl Drop for Context {
    fn drop(&mut self) {
        // SAFETY: made by `new`, ended here only.
        ok(unsafe { mustafar_context_destroy(self.0) });
    }
}

/// Contiguous tensor over host data.
pub(crate) fn tensor(data: *const c_void, dtype: u32, sizes: [i64; 4]) -> mustafar_tensor {
    let [batch, tokens, heads, dim] = sizes;
    mustafar_tensor { data, dtype, batch, tokens, heads, dim, ..init() }
}

/// As [`tensor`], writable.
pub(crate) fn tensor_mut(data: *mut c_void, dtype: u32, sizes: [i64; 4]) -> mustafar_tensor_mut {
    let [batch, tokens, heads, dim] = sizes;
    mustafar_tensor_mut { data, dtype, batch, tokens, heads, dim, ..init() }
}

pub(crate) fn uniform(head_dim: u32, page_tokens: u32, keep: u32) -> mustafar_format {
    mustafar_format { value_type: F16, head_dim, page_tokens, keep, ..init() }
}

pub(crate) const F16: u32 = 1;
pub(crate) const F32: u32 = 3;

/// Memory aligned as pages and workspaces need it.
#[repr(C, align(16))]
#[derive(Clone, Copy)]
pub(crate) struct Block(pub(crate) [u8; 16]);

/// At least `bytes` bytes of `fill`.
pub(crate) fn blocks(bytes: usize, fill: u8) -> Vec<Block> {
    vec![Block([fill; 16]); bytes.div_ceil(16)]
}

/// Distinct finite f16 values, no two rows alike.
pub(crate) fn values(count: usize) -> Vec<u16> {
    // 251 is prime: no period of a row or page divides it.
    (0..count).map(|i| half::f16::from_f32(((i * 37) % 251) as f32 / 64.0 - 1.9).to_bits()).collect()
}
