//! Version of the library at run time. The header's macros say what a program was compiled with.

use std::ffi::{CStr, c_char};

/// `CARGO_PKG_VERSION` as C sees it.
const VERSION: &CStr = match CStr::from_bytes_with_nul(concat!(env!("CARGO_PKG_VERSION"), "\0").as_bytes()) {
    Ok(text) => text,
    Err(_) => c"",
};

/// `major * 1000000 + minor * 1000 + patch`.
const NUMBER: u32 = part(env!("CARGO_PKG_VERSION_MAJOR")) * 1_000_000
    + part(env!("CARGO_PKG_VERSION_MINOR")) * 1_000
    + part(env!("CARGO_PKG_VERSION_PATCH"));

/// A decimal number that Cargo has already checked.
const fn part(text: &str) -> u32 {
    let (digits, mut value, mut i) = (text.as_bytes(), 0, 0);
    while i < digits.len() {
        value = value * 10 + (digits[i] - b'0') as u32;
        i += 1;
    }
    value
}

/// The version of the library, such as "0.1.0"; compare with MUSTAFAR_VERSION.
///
/// @return A string that is never freed and never NULL.
///
/// Async: no. Graph capture: yes. Workspace: none. Deterministic: yes. Thread-safe: yes.
#[unsafe(no_mangle)]
pub extern "C" fn mustafar_version() -> *const c_char {
    VERSION.as_ptr()
}

/// The version of the library as major * 1000000 + minor * 1000 + patch; compare with MUSTAFAR_VERSION_NUMBER.
///
/// Async: no. Graph capture: yes. Workspace: none. Deterministic: yes. Thread-safe: yes.
#[unsafe(no_mangle)]
pub extern "C" fn mustafar_version_number() -> u32 {
    NUMBER
}
