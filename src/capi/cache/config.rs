//! Configuration of a cache.

use crate::cache::{CacheConfig, CenterMode, HeadFormats};
use crate::capi::format::{format, mustafar_format};
use crate::capi::strategy::strategy;
use crate::capi::structs::{extensible, read};
use crate::capi::views::{Pointers, reserved, size};
use crate::dtype::DType;
use crate::error::{Error, Result};
use crate::mem::Place;
use crate::strategy::Strategy;
use std::ops::Range;

/// `sinks` of a cache that keeps no first tokens dense. 0 asks for the default.
pub const MUSTAFAR_SINKS_NONE: u32 = 0xFFFF_FFFF;

/// Whether a cache centres keys before it prunes them.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u32)]
pub enum mustafar_center_mode {
    /// Keys are stored as they are.
    None = 0,
    /// Each layer of a sequence subtracts the per-channel median of the first tokens it compresses.
    Median = 1,
}

/// Formats of the pages of some heads of some layers, in place of those of the whole cache. Heads are left dense by formats
/// that keep everything: dense, not exact, since the value types are the cache's own. In a cache of 8-bit values such heads
/// have 8-bit values too, and in one of 16-bit values they are slower than dense tokens (mustafar_attend_advice).
#[derive(Debug, Clone, Copy)]
#[repr(C)]
pub struct mustafar_cache_head_formats {
    /// sizeof(mustafar_cache_head_formats).
    pub struct_size: usize,
    /// Format of key pages; of the cache's own only the number kept may differ. Required.
    pub k: *const mustafar_format,
    /// Format of value pages; likewise. Required.
    pub v: *const mustafar_format,
    /// First layer.
    pub first_layer: u32,
    /// How many layers, at least 1.
    pub num_layers: u32,
    /// First KV head.
    pub first_head: u32,
    /// How many KV heads, at least 1.
    pub num_heads: u32,
}

/// Shape and policy of a cache.
#[derive(Debug, Clone, Copy)]
#[repr(C)]
pub struct mustafar_cache_config {
    /// sizeof(mustafar_cache_config).
    pub struct_size: usize,
    /// Format of key pages, which says how many are kept: as mustafar_strategy_format gives it, uniform in token direction,
    /// ragged in channel direction. Required.
    pub k: *const mustafar_format,
    /// Format of value pages; likewise, page_tokens as in `k`. Required.
    pub v: *const mustafar_format,
    /// Tokens that all live sequences together may have compressed; rounded up to whole pages.
    pub max_tokens: i64,
    /// Layers, at least 1.
    pub layers: u32,
    /// Query heads, a multiple of kv_heads.
    pub q_heads: u32,
    /// KV heads, at least 1.
    pub kv_heads: u32,
    /// Live sequences at most; 0 is 1.
    pub max_sequences: u32,
    /// R: the newest tokens that are never compressed; 0 is 32.
    pub window: u32,
    /// Tokens compressed together once the window holds window + group, a multiple of page_tokens; 0 is 256.
    pub group: u32,
    /// First tokens that stay dense; 0 is 4, MUSTAFAR_SINKS_NONE is none.
    pub sinks: u32,
    /// A mustafar_center_mode.
    pub center: u32,
    /// Type of the tokens that pages of 8-bit values are made from: MUSTAFAR_DTYPE_F16 or MUSTAFAR_DTYPE_BF16; 0 is f16.
    /// For pages of 16-bit values tokens have the type of these.
    pub scaled_from: u32,
    /// Must be 0.
    pub reserved: u32,
    /// How keys are chosen: a mustafar_strategy.
    pub k_strategy: u32,
    /// How values are chosen: a mustafar_strategy.
    pub v_strategy: u32,
    /// Formats of some heads, [num_overrides] pointers; of several that name a head the last counts. May be NULL.
    pub overrides: *const *const mustafar_cache_head_formats,
    /// How many.
    pub num_overrides: i64,
}

extensible!(mustafar_cache_config, first_release_ends_with reserved, {
    struct_size, k, v, max_tokens, layers, q_heads, kv_heads, max_sequences, window, group, sinks, center,
    scaled_from, reserved, k_strategy, v_strategy, overrides, num_overrides,
});
extensible!(mustafar_cache_head_formats, first_release_ends_with num_heads, {
    struct_size, k, v, first_layer, num_layers, first_head, num_heads,
});

/// The configuration a C structure describes; `Cache::new` checks it.
///
/// # Safety
/// `config` and its formats are as [`read`] wants them.
pub(super) unsafe fn config(config: *const mustafar_cache_config) -> Result<CacheConfig> {
    // SAFETY: the caller's promise.
    let c = unsafe { read("config", config)? };
    // SAFETY: the caller's promise.
    let k = unsafe { format("config.k", c.k)? };
    // SAFETY: the caller's promise.
    let v = unsafe { format("config.v", c.v)? };
    let center = match c.center {
        code if code == mustafar_center_mode::None as u32 => CenterMode::None,
        code if code == mustafar_center_mode::Median as u32 => CenterMode::Median,
        code => return Err(Error::invalid("config.center", code, "0 (none), 1 (median)")),
    };
    let scaled_from = match c.scaled_from {
        0 => DType::F16,
        code => DType::from_code("config.scaled_from", code)?,
    };
    reserved("config.reserved", c.reserved)?;
    // The defaults are those of the Rust constructor, whatever the shape.
    let (layers, q_heads, kv_heads) = (c.layers as usize, c.q_heads as usize, c.kv_heads as usize);
    let max_tokens = size("config.max_tokens", c.max_tokens)?;
    let default = CacheConfig::new(layers, q_heads, kv_heads, k.head_dim(), 1, 1, max_tokens)?;
    let or = |value: u32, default: usize| if value == 0 { default } else { value as usize };
    Ok(CacheConfig {
        k_strategy: strategy("config.k_strategy", c.k_strategy, Strategy::KtMag)?,
        v_strategy: strategy("config.v_strategy", c.v_strategy, Strategy::VtMag)?,
        // SAFETY: the caller's promise.
        overrides: unsafe { overrides(c.overrides, c.num_overrides)? },
        k,
        v,
        scaled_from,
        window: or(c.window, default.window),
        group: or(c.group, default.group),
        sinks: if c.sinks == MUSTAFAR_SINKS_NONE { 0 } else { or(c.sinks, default.sinks) },
        center,
        max_sequences: or(c.max_sequences, default.max_sequences),
        ..default
    })
}

/// # Safety
/// `overrides` points to `count` pointers, and each of them is as [`read`] wants it, with its formats.
unsafe fn overrides(
    overrides: *const *const mustafar_cache_head_formats,
    count: i64,
) -> Result<Vec<HeadFormats>> {
    let count = size("config.num_overrides", count)?;
    // Structures are host memory on every backend. This only checks the array.
    // SAFETY: the caller's promise.
    unsafe { Pointers::Into(Place::Host).mem("config.overrides", overrides, count)? };
    let range = |argument, first: u32, n: u32| -> Result<Range<usize>> {
        let end = first.checked_add(n).ok_or(Error::Overflow { argument })?;
        Ok(first as usize..end as usize)
    };
    (0..count)
        .map(|i| {
            // SAFETY: inside the array, which was just checked to be readable.
            let one = unsafe { read("config.overrides", *overrides.add(i))? };
            Ok(HeadFormats {
                layers: range("config.overrides.num_layers", one.first_layer, one.num_layers)?,
                heads: range("config.overrides.num_heads", one.first_head, one.num_heads)?,
                // SAFETY: the caller's promise.
                k: unsafe { format("config.overrides.k", one.k)? },
                // SAFETY: the caller's promise.
                v: unsafe { format("config.overrides.v", one.v)? },
            })
        })
        .collect()
}
