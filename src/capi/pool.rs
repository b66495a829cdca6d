//! Pools of pages, and which pages belong to which sequence.

use crate::capi::format::{format, mustafar_format};
use crate::capi::structs::{extensible, read, read_optional};
use crate::capi::views::{Pointers, product, reserved, size, switch};
use crate::error::{Error, Result};
use crate::format::PageFormat;
use crate::ops::Center;
use crate::pool::{PagePool, PagePoolMut, PoolLayout, Sequences};
use std::ffi::c_void;

/// Pages of one side (K or V) that are written: page p of KV head h starts at `data + p * page_stride + h *
/// head_stride` bytes. K and V pages may share slots ([K page | V page]): two pools with the same strides and different
/// `data`.
#[derive(Debug, Clone, Copy)]
#[repr(C)]
pub struct mustafar_pool_mut {
    /// sizeof(mustafar_pool_mut).
    pub struct_size: usize,
    /// Page 0 of head 0, aligned to 16 bytes, in the memory of the context. May be NULL in an empty pool.
    pub data: *mut c_void,
    /// Format of every page. Required.
    pub format: *const mustafar_format,
    /// Pages per head.
    pub num_pages: i64,
    /// KV heads.
    pub kv_heads: i64,
    /// Bytes from one page to the next of the same head, a multiple of 16. Both strides 0: [num_pages][kv_heads] pages
    /// back to back.
    pub page_stride: i64,
    /// Bytes from one head to the next of the same page, a multiple of 16.
    pub head_stride: i64,
}

/// As mustafar_pool_mut, for pages that are read.
#[derive(Debug, Clone, Copy)]
#[repr(C)]
pub struct mustafar_pool {
    /// sizeof(mustafar_pool).
    pub struct_size: usize,
    /// As in mustafar_pool_mut; never written.
    pub data: *const c_void,
    /// Format of every page. Required.
    pub format: *const mustafar_format,
    /// Pages per head.
    pub num_pages: i64,
    /// KV heads.
    pub kv_heads: i64,
    /// Bytes from one page to the next of the same head, a multiple of 16; both strides 0 as in mustafar_pool_mut.
    pub page_stride: i64,
    /// Bytes from one head to the next of the same page, a multiple of 16.
    pub head_stride: i64,
}

/// Which pages hold the compressed tokens of each sequence of a batch, and how many tokens that is. Arrays are in the
/// memory of the context.
#[derive(Debug, Clone, Copy)]
#[repr(C)]
pub struct mustafar_sequences {
    /// sizeof(mustafar_sequences).
    pub struct_size: usize,
    /// Sequences.
    pub batch: i64,
    /// Upper bound of every length, in tokens. Sizes and launch plans depend on it, never on `lens`, so a captured
    /// graph may be replayed with other lengths and tables.
    pub max_len: i64,
    /// Page numbers, int32 [batch, >= ceil(max_len / page_tokens)]; entries past a sequence's last page are never
    /// used. NULL: sequence b lies in pages b * ceil(max_len / page_tokens) and following.
    pub table: *const i32,
    /// Elements from one row of `table` to the next; 0 is ceil(max_len / page_tokens).
    pub table_stride: i64,
    /// Compressed tokens, int32 [batch], or [batch, kv_heads] if lens_per_head; 0 to max_len.
    pub lens: *const i32,
    /// 1 if `lens` has a length per KV head (token-eviction methods), else 0.
    pub lens_per_head: u32,
    /// Must be 0.
    pub reserved: u32,
}

/// Key centre: compressed keys are stored as round16(k - c), and attention adds scale * (q . c) to the score of every
/// compressed token. Pages must be read with the centre they were written with.
#[derive(Debug, Clone, Copy)]
#[repr(C)]
pub struct mustafar_center {
    /// sizeof(mustafar_center).
    pub struct_size: usize,
    /// float [batch, kv_heads, head_dim], contiguous, in the memory of the context.
    pub values: *const f32,
    /// 1 (one centre for all sequences) or one per sequence.
    pub batch: i64,
}

extensible!(mustafar_pool, first_release_ends_with head_stride, {
    struct_size, data, format, num_pages, kv_heads, page_stride, head_stride,
});
extensible!(mustafar_pool_mut, first_release_ends_with head_stride, {
    struct_size, data, format, num_pages, kv_heads, page_stride, head_stride,
});
extensible!(mustafar_sequences, first_release_ends_with reserved, {
    struct_size, batch, max_len, table, table_stride, lens, lens_per_head, reserved,
});
extensible!(mustafar_center, first_release_ends_with batch, { struct_size, values, batch });

/// What messages call a pool and its fields. Made by [`pool_names`].
#[derive(Debug, Clone, Copy)]
pub(super) struct Names {
    pub(super) pool: &'static str,
    pub(super) data: &'static str,
    pub(super) format: &'static str,
    /// num_pages, kv_heads, page_stride, head_stride.
    pub(super) sizes: [&'static str; 4],
}

/// [`Names`] of the pool argument with this name.
macro_rules! pool_names {
    ($name:expr) => {
        $crate::capi::pool::Names {
            pool: $name,
            data: concat!($name, ".data"),
            format: concat!($name, ".format"),
            sizes: [
                concat!($name, ".num_pages"),
                concat!($name, ".kv_heads"),
                concat!($name, ".page_stride"),
                concat!($name, ".head_stride"),
            ],
        }
    };
}
pub(super) use pool_names;

fn layout(
    names: &Names,
    format: PageFormat,
    [num_pages, kv_heads, page_stride, head_stride]: [i64; 4],
) -> Result<PoolLayout> {
    let sizes = &names.sizes;
    let (num_pages, kv_heads) = (size(sizes[0], num_pages)?, size(sizes[1], kv_heads)?);
    if page_stride == 0 && head_stride == 0 {
        return PoolLayout::contiguous(format, num_pages, kv_heads);
    }
    Ok(PoolLayout {
        format,
        num_pages,
        kv_heads,
        page_stride: size(sizes[2], page_stride)?,
        head_stride: size(sizes[3], head_stride)?,
    })
}

/// The pool a C structure describes.
///
/// # Safety
/// `pool` and its format are as [`read`] wants them, and its data as [`Pointers::mem`] does.
pub(super) unsafe fn pool<'a>(
    pointers: Pointers,
    names: &Names,
    pool: *const mustafar_pool,
) -> Result<PagePool<'a>> {
    // SAFETY: the caller's promise.
    let p = unsafe { read(names.pool, pool)? };
    // SAFETY: the caller's promise.
    let format = unsafe { format(names.format, p.format)? };
    let layout = layout(names, format, [p.num_pages, p.kv_heads, p.page_stride, p.head_stride])?;
    // SAFETY: the caller's promise; the extent is what the structure describes.
    let mem = unsafe { pointers.mem(names.data, p.data, layout.extent(names.pool)?)? };
    PagePool::new(names.pool, mem, layout)
}

/// As [`pool`], for pages that are written.
///
/// # Safety
/// As [`pool`], with [`Pointers::mem_mut`]; bytes between the pages may belong to another pool of the call.
pub(super) unsafe fn pool_mut<'a>(
    pointers: Pointers,
    names: &Names,
    pool: *const mustafar_pool_mut,
) -> Result<PagePoolMut<'a>> {
    // SAFETY: the caller's promise.
    let p = unsafe { read(names.pool, pool)? };
    // SAFETY: the caller's promise.
    let format = unsafe { format(names.format, p.format)? };
    let layout = layout(names, format, [p.num_pages, p.kv_heads, p.page_stride, p.head_stride])?;
    // SAFETY: the caller's promise; the extent is what the structure describes.
    let mem = unsafe { pointers.mem_mut(names.data, p.data, layout.extent(names.pool)?)? };
    PagePoolMut::new(names.pool, mem, layout)
}

/// The sequences a C structure describes, over pages of `layout`.
///
/// # Safety
/// `sequences` is as [`read`] wants it, and its arrays as [`Pointers::mem`] does.
pub(super) unsafe fn sequences<'a>(
    pointers: Pointers,
    sequences: *const mustafar_sequences,
    layout: &PoolLayout,
) -> Result<Sequences<'a>> {
    // SAFETY: the caller's promise.
    let s = unsafe { read("sequences", sequences)? };
    reserved("sequences.reserved", s.reserved)?;
    let (batch, max_len) = (size("sequences.batch", s.batch)?, size("sequences.max_len", s.max_len)?);
    let lens_per_head = switch("sequences.lens_per_head", s.lens_per_head)?;
    let max_pages = max_len.div_ceil(layout.format.page_tokens());
    let table_stride = match size("sequences.table_stride", s.table_stride)? {
        0 => max_pages,
        stride => stride,
    };
    // The last row need not be followed by the rest of its stride.
    let entries = match (batch, max_pages) {
        (0, _) | (_, 0) => 0,
        _ => (batch - 1)
            .checked_mul(table_stride)
            .and_then(|n| n.checked_add(max_pages))
            .ok_or(Error::Overflow { argument: "sequences.table" })?,
    };
    let lens = product("sequences.lens", &[batch, if lens_per_head { layout.kv_heads } else { 1 }])?;
    Ok(Sequences {
        batch,
        // SAFETY: the caller's promise.
        table: unsafe { pointers.mem_optional("sequences.table", s.table, entries)? },
        table_stride,
        // SAFETY: the caller's promise.
        lens: unsafe { pointers.mem("sequences.lens", s.lens, lens)? },
        lens_per_head,
        max_len,
    })
}

/// The centre a C structure describes, for `kv_heads` heads of `head_dim` channels; null is none.
///
/// # Safety
/// `center` is as [`read`] wants it, and its values as [`Pointers::mem`] does.
pub(super) unsafe fn center<'a>(
    pointers: Pointers,
    center: *const mustafar_center,
    kv_heads: usize,
    head_dim: usize,
) -> Result<Option<Center<'a>>> {
    // SAFETY: the caller's promise.
    let Some(c) = (unsafe { read_optional("center", center)? }) else {
        return Ok(None);
    };
    let batch = size("center.batch", c.batch)?;
    let count = product("center.values", &[batch, kv_heads, head_dim])?;
    // SAFETY: the caller's promise.
    Ok(Some(Center { values: unsafe { pointers.mem("center.values", c.values, count)? }, batch }))
}
