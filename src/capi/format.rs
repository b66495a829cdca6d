//! Page format: description, sizes, checks. Pure host functions that need no context.

use crate::capi::error::boundary;
use crate::capi::handle::put;
use crate::capi::status::mustafar_status;
use crate::capi::structs::{extensible, read, write};
use crate::capi::views::Pointers;
use crate::dtype::ValueType;
use crate::error::{Error, Result};
use crate::format::{PAGE_ALIGN, PageFormat};
use crate::mem::Place;
use crate::sparsity;
use std::ffi::c_void;

/// How the rows of a page share its values.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u32)]
pub enum mustafar_rows {
    /// Every row keeps `keep` values: the size of a page follows from the format alone, and tokens can be appended
    /// one at a time.
    Uniform = 0,
    /// Counts differ; a page has room for `capacity` values.
    Ragged = 1,
}

/// Page size used where `page_tokens` is 0.
const DEFAULT_PAGE_TOKENS: u32 = 64;

/// The format of a page: `page_tokens` consecutive tokens of one KV head, K or V. Formats with equal fields have
/// byte-compatible pages. `docs/format.md` describes the bytes.
#[derive(Debug, Clone, Copy)]
#[repr(C)]
pub struct mustafar_format {
    /// sizeof(mustafar_format).
    pub struct_size: usize,
    /// A mustafar_rows.
    pub rows: u32,
    /// A mustafar_value_type. Required.
    pub value_type: u32,
    /// Channels per row: 64, 96, 128 or 256. Required.
    pub head_dim: u32,
    /// Tokens per page: 16, 32, 64 or 128; 0 is 64.
    pub page_tokens: u32,
    /// Uniform pages: values kept per row, 1 to head_dim. Ragged pages: 0.
    pub keep: u32,
    /// Ragged pages: values a page has room for, 0 to page_tokens * head_dim. Uniform pages: 0.
    pub capacity: u32,
}

/// Where the sections of a page lie. All in bytes from its start.
#[derive(Debug, Clone, Copy)]
#[repr(C)]
pub struct mustafar_page_layout {
    /// sizeof(mustafar_page_layout).
    pub struct_size: usize,
    /// Size of a page, a multiple of 16.
    pub page_bytes: usize,
    /// Size of the same tokens stored dense in 16 bits.
    pub dense_bytes: usize,
    /// Size of the bitmap, which starts the page.
    pub bitmap_bytes: usize,
    /// Start of the row offsets; 0 in uniform pages, which have none.
    pub offsets_offset: usize,
    /// Start of the scales; 0 in pages of 16-bit values, which have none.
    pub scales_offset: usize,
    /// Start of the values.
    pub values_offset: usize,
    /// Values a page holds at most.
    pub capacity: usize,
    /// Alignment that a page needs.
    pub alignment: usize,
}

extensible!(mustafar_format, first_release_ends_with capacity, {
    struct_size, rows, value_type, head_dim, page_tokens, keep, capacity,
});
extensible!(mustafar_page_layout, first_release_ends_with alignment, {
    struct_size, page_bytes, dense_bytes, bitmap_bytes, offsets_offset, scales_offset, values_offset,
    capacity, alignment,
});

/// The format a C structure describes.
///
/// # Safety
/// `format` is as [`read`] wants it.
pub(super) unsafe fn format(argument: &'static str, format: *const mustafar_format) -> Result<PageFormat> {
    // SAFETY: the caller's promise.
    let f = unsafe { read(argument, format)? };
    let value_type = ValueType::from_code("format.value_type", f.value_type)?;
    let page_tokens = if f.page_tokens == 0 { DEFAULT_PAGE_TOKENS } else { f.page_tokens };
    let (head_dim, page_tokens) = (f.head_dim as usize, page_tokens as usize);
    let unused = |field, value: u32, rows| match value {
        0 => Ok(()),
        _ => Err(Error::invalid(field, value, format!("0 for {rows} pages"))),
    };
    if f.rows == mustafar_rows::Uniform as u32 {
        unused("format.capacity", f.capacity, "uniform")?;
        PageFormat::uniform(value_type, head_dim, page_tokens, f.keep as usize)
    } else if f.rows == mustafar_rows::Ragged as u32 {
        unused("format.keep", f.keep, "ragged")?;
        PageFormat::ragged(value_type, head_dim, page_tokens, f.capacity as usize)
    } else {
        Err(Error::invalid("format.rows", f.rows, "0 (uniform), 1 (ragged)"))
    }
}

/// The size of a page of this format.
///
/// @param format  The format.
/// @param bytes   Receives the size in bytes, a multiple of 16.
/// @return SUCCESS; UNSUPPORTED for a head_dim or page_tokens without kernels; INVALID_ARGUMENT,
///         NULL_POINTER, MISALIGNED or VERSION_MISMATCH for the structure.
///
/// Async: no, and needs no context. Graph capture: yes. Workspace: none. Deterministic: yes. Thread-safe: yes.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn mustafar_format_page_bytes(
    format: *const mustafar_format,
    bytes: *mut usize,
) -> mustafar_status {
    boundary(|| {
        // SAFETY: the contract of this module.
        let format = unsafe { self::format("format", format)? };
        // SAFETY: the contract of this module.
        unsafe { put("bytes", bytes, format.page_bytes()) }
    })
}

/// Where the sections of a page of this format lie.
///
/// @param format  The format.
/// @param layout  Receives the layout; its struct_size must be set.
/// @return As mustafar_format_page_bytes.
///
/// Async: no, and needs no context. Graph capture: yes. Workspace: none. Deterministic: yes. Thread-safe: yes.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn mustafar_format_layout(
    format: *const mustafar_format,
    layout: *mut mustafar_page_layout,
) -> mustafar_status {
    boundary(|| {
        // SAFETY: the contract of this module.
        let format = unsafe { self::format("format", format)? };
        let value = mustafar_page_layout {
            struct_size: size_of::<mustafar_page_layout>(),
            page_bytes: format.page_bytes(),
            dense_bytes: format.dense_bytes(),
            bitmap_bytes: format.bitmap_bytes(),
            offsets_offset: format.offsets_offset().unwrap_or(0),
            scales_offset: format.scales_offset().unwrap_or(0),
            values_offset: format.values_offset(),
            capacity: format.capacity(),
            alignment: PAGE_ALIGN,
        };
        // SAFETY: the contract of this module.
        unsafe { write("layout", layout, &value) }
    })
}

/// Checks the bytes of one page from an untrusted source (disk, network). mustafar_validate checks pages of a pool.
///
/// @param format      The format.
/// @param page        Host memory, any alignment.
/// @param page_bytes  Bytes at `page`, at least the size of a page.
/// @param rows        Rows that must be right, 0 to page_tokens; those after may hold anything.
/// @return SUCCESS; CORRUPT_DATA with the first row that violates the format; BUFFER_TOO_SMALL; INVALID_ARGUMENT for
///         rows; as mustafar_format_page_bytes for the format.
///
/// Async: no, and needs no context. Graph capture: yes. Workspace: none. Deterministic: yes. Thread-safe: yes.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn mustafar_format_validate_page(
    format: *const mustafar_format,
    page: *const c_void,
    page_bytes: usize,
    rows: u32,
) -> mustafar_status {
    boundary(|| {
        // SAFETY: the contract of this module.
        let format = unsafe { self::format("format", format)? };
        // SAFETY: the contract of this module.
        let page = unsafe { Pointers::Into(Place::Host).mem("page", page.cast::<u8>(), page_bytes)? };
        format.validate(page.slice("page", page_bytes)?, rows as usize)
    })
}

/// `n - floor(sparsity * n)`: values kept of n, such as 64 of 128 at 0.5 and 39 at 0.7. The floor is exact for the
/// decimal that was written: 0.7 of 10 drops 7.
///
/// @param n         Values per row (head_dim), or tokens per group for channel-direction pruning.
/// @param sparsity  Share to drop, 0 <= sparsity < 1.
/// @param keep      Receives the count.
/// @return SUCCESS; INVALID_ARGUMENT for sparsity; NULL_POINTER or MISALIGNED for keep.
///
/// Async: no, and needs no context. Graph capture: yes. Workspace: none. Deterministic: yes. Thread-safe: yes.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn mustafar_keep_for_sparsity(
    n: u32,
    sparsity: f64,
    keep: *mut u32,
) -> mustafar_status {
    // SAFETY: the contract of this module.
    boundary(|| unsafe { put_count(keep, sparsity::keep_for_sparsity(n as usize, sparsity)?) })
}

/// `n - max(1, floor(sparsity * n)) + 1`: what the original Mustafar keeps at this sparsity, 65 of 128 at 0.5 and 40
/// at 0.7.
///
/// @param n         Values per row.
/// @param sparsity  Share to drop, 0 <= sparsity < 1.
/// @param keep      Receives the count.
/// @return As mustafar_keep_for_sparsity.
///
/// Async: no, and needs no context. Graph capture: yes. Workspace: none. Deterministic: yes. Thread-safe: yes.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn mustafar_reference_keep(n: u32, sparsity: f64, keep: *mut u32) -> mustafar_status {
    // SAFETY: the contract of this module.
    boundary(|| unsafe { put_count(keep, sparsity::reference_keep(n as usize, sparsity)?) })
}

/// # Safety
/// A non-null `out` may be written to.
unsafe fn put_count(out: *mut u32, count: usize) -> Result<()> {
    let count = u32::try_from(count).map_err(|_| Error::Overflow { argument: "keep" })?;
    // SAFETY: the caller's promise.
    unsafe { put("keep", out, count) }
}
