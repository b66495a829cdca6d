//! The cache: pages, dense window and sinks of many layers and sequences.

pub mod attend;
pub mod config;
pub mod sequence;
pub mod snapshot;

use crate::cache::{Cache, CacheBytes};
use crate::capi::cache::config::mustafar_cache_config;
use crate::capi::context::mustafar_context;
use crate::capi::error::boundary;
use crate::capi::handle::{borrow, borrow_mut, destroy, store};
use crate::capi::status::mustafar_status;
use crate::capi::structs::{extensible, write};
use crate::capi::views::Pointers;
use crate::error::Result;

/// A cache: it owns pages, dense window and sinks. One call at a time: calls on the same cache must not overlap, unless
/// all of them take it const.
#[derive(Debug)]
pub struct mustafar_cache {
    pub(super) cache: Cache,
    /// Where the caller's tensors lie: the memory of the context it was made with.
    pub(super) pointers: Pointers,
}

/// What a cache or a sequence holds, in bytes.
#[derive(Debug, Clone, Copy)]
#[repr(C)]
pub struct mustafar_cache_bytes_info {
    /// sizeof(mustafar_cache_bytes_info).
    pub struct_size: usize,
    /// All tokens of all layers stored dense in the value types; shared ones once per sequence.
    pub dense_equivalent: usize,
    /// Pages in use, every layer, K and V. Shared pages count once for a cache, in full for a sequence.
    pub pages: usize,
    /// Dense tokens in use: window and sinks.
    pub window: usize,
    /// Memory the cache has allocated, used or not.
    pub allocated: usize,
}

extensible!(mustafar_cache_bytes_info, first_release_ends_with allocated, {
    struct_size, dense_equivalent, pages, window, allocated,
});

/// Runs a body that changes the cache.
///
/// # Safety
/// `cache` is as [`borrow_mut`] wants it.
unsafe fn change(
    cache: *mut mustafar_cache,
    body: impl FnOnce(&mut Cache, Pointers) -> Result<()>,
) -> mustafar_status {
    boundary(|| {
        // SAFETY: the caller's promise.
        let cache = unsafe { borrow_mut("cache", cache)? };
        body(&mut cache.cache, cache.pointers)
    })
}

/// Runs a body that only reads the cache.
///
/// # Safety
/// `cache` is as [`borrow`] wants it.
unsafe fn look(cache: *const mustafar_cache, body: impl FnOnce(&Cache) -> Result<()>) -> mustafar_status {
    boundary(|| {
        // SAFETY: the caller's promise.
        let cache = unsafe { borrow("cache", cache)? };
        body(&cache.cache)
    })
}

/// # Safety
/// `out` is as [`write`] wants it.
unsafe fn write_bytes(out: *mut mustafar_cache_bytes_info, bytes: CacheBytes) -> Result<()> {
    let CacheBytes { dense_equivalent, pages, window, allocated } = bytes;
    let struct_size = size_of::<mustafar_cache_bytes_info>();
    let info = mustafar_cache_bytes_info { struct_size, dense_equivalent, pages, window, allocated };
    // SAFETY: the caller's promise.
    unsafe { write("bytes", out, &info) }
}

/// Makes an empty cache. Memory for max_tokens and max_sequences is allocated here, on the CPU backend to be committed
/// by the system as it is first used; nothing is allocated for tokens later. On CUDA all calls of a cache that take a
/// stream go to one stream, or to streams that the caller makes wait for each other.
///
/// @param context  Where the cache works; may be destroyed before the cache.
/// @param config   Shape and policy.
/// @param cache    Receives the handle; mustafar_cache_destroy ends it.
/// @return SUCCESS; INVALID_ARGUMENT or UNSUPPORTED for a field of the configuration (on CUDA also for formats that
///         mustafar_attend does not serve there); OUT_OF_MEMORY; NULL_POINTER, MISALIGNED, OVERFLOW, VERSION_MISMATCH
///         as docs/c-api.md describes.
///
/// Async: no. Graph capture: no. Workspace: none, allocates. Deterministic: yes. Thread-safe: yes.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn mustafar_cache_create(
    context: *const mustafar_context,
    config: *const mustafar_cache_config,
    cache: *mut *mut mustafar_cache,
) -> mustafar_status {
    boundary(|| {
        // SAFETY: the contract of this module.
        let context = unsafe { &borrow("context", context)?.context };
        // SAFETY: the contract of this module.
        let config = unsafe { self::config::config(config)? };
        let made = mustafar_cache { cache: Cache::new(context, config)?, pointers: Pointers::of(context) };
        // SAFETY: the contract of this module.
        unsafe { store("cache", cache, made) }
    })
}

/// Ends a cache and frees its memory, with all sequences.
///
/// @param cache  The cache; NULL is nothing to do. No call may be using it.
/// @return SUCCESS; MISALIGNED for a pointer that cannot be a handle.
///
/// Async: no. Graph capture: no. Workspace: none. Deterministic: yes. Thread-safe: yes, but for this cache.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn mustafar_cache_destroy(cache: *mut mustafar_cache) -> mustafar_status {
    // SAFETY: the contract of this module.
    boundary(|| unsafe { destroy("cache", cache) })
}

/// What the whole cache holds.
///
/// @param cache  The cache.
/// @param bytes  Receives the sizes; its struct_size must be set.
/// @return SUCCESS; NULL_POINTER, MISALIGNED or INVALID_ARGUMENT for the pointers.
///
/// Async: no. Graph capture: yes. Workspace: none. Deterministic: yes. Thread-safe: with other calls that take the
/// cache const.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn mustafar_cache_bytes(
    cache: *const mustafar_cache,
    bytes: *mut mustafar_cache_bytes_info,
) -> mustafar_status {
    // SAFETY: the contract of this module.
    unsafe { look(cache, |cache| write_bytes(bytes, cache.bytes())) }
}
