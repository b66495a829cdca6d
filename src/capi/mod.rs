//! The C ABI: `include/mustafar.h` is generated from this module, `docs/c-api.md` explains its conventions.
//!
//! Everything here is pointer code and conversions. A function body is one `error::boundary` call that turns raw
//! arguments into the views of `crate::mem`, calls the Rust function of the same name and maps the error to a
//! status; what makes arguments valid is decided in `crate::ops`.
//!
//! # Safety
//! All `extern "C"` functions share one contract, stated in `docs/c-api.md` and in the comments of the header:
//! a non-null pointer points to memory of the size its description gives, in the address space of the context, that
//! nobody else writes during the call (and nobody else reads, for outputs); a handle comes from the matching
//! `_create` and has not been destroyed. Null, misaligned and overflowing arguments are refused, not trusted.
#![allow(unsafe_code)]
// The C spelling is the name of these types; Rust callers have the types they wrap.
#![allow(non_camel_case_types)]
// The contract is the same for all functions and stands above; repeating it would only lengthen the header.
#![allow(clippy::missing_safety_doc)]
// The comments become the header's, where [batch, tokens] is a shape and not a link.
#![allow(rustdoc::broken_intra_doc_links)]

pub mod cache;
pub mod context;
pub mod error;
pub mod format;
mod handle;
pub mod ops;
pub mod pool;
pub mod status;
pub mod strategy;
pub mod structs;
pub mod tensor;
pub mod version;
mod views;

/// What the header promises about threads: contexts are shared freely, caches are handed from thread to thread and read
/// by several.
const _: () = {
    const fn shared<T: Send + Sync>() {}
    shared::<context::mustafar_context>();
    shared::<cache::mustafar_cache>();
};
