//! Pools of pages, and which pages belong to which sequence.
#![allow(unsafe_code)]

use crate::error::{Error, Result};
use crate::format::{PAGE_ALIGN, PageFormat};
use crate::mem::{self, Mem, MemMut};
use std::marker::PhantomData;

/// Where the pages of one side (K or V) lie: page `p` of KV head `h` starts at
/// `p * page_stride + h * head_stride` bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PoolLayout {
    /// Format of every page.
    pub format: PageFormat,
    /// Pages per head.
    pub num_pages: usize,
    /// KV heads.
    pub kv_heads: usize,
    /// Bytes from one page to the next of the same head; a multiple of 16.
    pub page_stride: usize,
    /// Bytes from one head to the next of the same page; a multiple of 16.
    pub head_stride: usize,
}

impl PoolLayout {
    /// `[num_pages][kv_heads]` pages back to back.
    pub fn contiguous(format: PageFormat, num_pages: usize, kv_heads: usize) -> Result<Self> {
        let head_stride = format.page_bytes();
        let page_stride =
            kv_heads.checked_mul(head_stride).ok_or(Error::Overflow { argument: "page_stride" })?;
        Ok(Self { format, num_pages, kv_heads, page_stride, head_stride })
    }

    /// Bytes from the first page to the end of the last; 0 for an empty pool.
    pub fn extent(&self, argument: &'static str) -> Result<usize> {
        if self.num_pages == 0 || self.kv_heads == 0 {
            return Ok(0);
        }
        (self.num_pages - 1)
            .checked_mul(self.page_stride)
            .and_then(|a| a.checked_add((self.kv_heads - 1).checked_mul(self.head_stride)?))
            .and_then(|a| a.checked_add(self.format.page_bytes()))
            .ok_or(Error::Overflow { argument })
    }

    /// Byte offset of page `page` of head `head`.
    #[must_use]
    pub fn offset(&self, page: usize, head: usize) -> usize {
        page * self.page_stride + head * self.head_stride
    }

    /// Tokens a head of the pool has room for.
    #[must_use]
    pub fn slots(&self) -> usize {
        self.num_pages.saturating_mul(self.format.page_tokens())
    }

    fn check(&self, argument: &'static str, address: u64, bytes: usize) -> Result<()> {
        let needed = self.extent(argument)?;
        if needed > 0 && address == 0 {
            return Err(Error::NullPointer { argument });
        }
        if needed > bytes {
            return Err(Error::BufferTooSmall { argument, bytes, needed });
        }
        for value in [address, self.page_stride as u64, self.head_stride as u64] {
            if needed > 0 && !value.is_multiple_of(PAGE_ALIGN as u64) {
                return Err(Error::Misaligned { argument, value, required: PAGE_ALIGN });
            }
        }
        let page_bytes = self.format.page_bytes();
        let mut dims = [(self.page_stride, self.num_pages), (self.head_stride, self.kv_heads)];
        dims.sort_unstable();
        let mut reach = page_bytes;
        for (stride, n) in dims {
            if n > 1 && stride < reach {
                return Err(Error::invalid(
                    argument,
                    format!("page_stride {}, head_stride {}", self.page_stride, self.head_stride),
                    format!("strides under which pages of {page_bytes} bytes do not overlap"),
                ));
            }
            if n > 1 {
                reach += (n - 1) * stride;
            }
        }
        Ok(())
    }
}

/// Read-only pool of pages.
#[derive(Debug, Clone, Copy)]
pub struct PagePool<'a> {
    pub(crate) mem: Mem<'a>,
    /// Format and strides.
    pub layout: PoolLayout,
}

/// Writable pool of pages.
#[derive(Debug)]
pub struct PagePoolMut<'a> {
    pub(crate) mem: MemMut<'a>,
    /// Format and strides.
    pub layout: PoolLayout,
}

impl<'a> PagePool<'a> {
    /// A pool over `mem`. Errors (naming `argument`) for null, short or misaligned memory and overlapping strides.
    pub fn new(argument: &'static str, mem: Mem<'a>, layout: PoolLayout) -> Result<Self> {
        layout.check(argument, mem.address(), mem.bytes())?;
        Ok(Self { mem, layout })
    }
}

impl<'a> PagePoolMut<'a> {
    /// As [`PagePool::new`].
    pub fn new(argument: &'static str, mem: MemMut<'a>, layout: PoolLayout) -> Result<Self> {
        layout.check(argument, mem.address(), mem.bytes())?;
        Ok(Self { mem, layout })
    }
}

impl<'a> PagePool<'a> {
    /// The pages for reading on the host.
    pub(crate) fn pages(&self, argument: &'static str) -> Result<Pages<'a>> {
        let bytes = self.mem.slice(argument, self.layout.extent(argument)?)?;
        Ok(Pages { bytes, layout: self.layout })
    }
}

impl PagePoolMut<'_> {
    /// The pages for writing on the host.
    pub(crate) fn pages_mut(&mut self, argument: &'static str) -> Result<PagesMut<'_>> {
        let (address, bytes, place) = (self.mem.address(), self.mem.bytes(), self.mem.place());
        mem::check::<u8>(address, bytes, place, argument, self.layout.extent(argument)?)?;
        Ok(PagesMut { first: address as *mut u8, layout: self.layout, _life: PhantomData })
    }
}

/// Pages of a host pool.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Pages<'a> {
    bytes: &'a [u8],
    pub(crate) layout: PoolLayout,
}

impl<'a> Pages<'a> {
    /// The bytes of one page.
    pub(crate) fn page(&self, page: usize, head: usize) -> &'a [u8] {
        &self.bytes[self.layout.offset(page, head)..][..self.layout.format.page_bytes()]
    }
}

/// Pages of a writable host pool, splittable by head so that threads can write different heads.
///
/// Invariant: the pages `layout` describes are disjoint, and this value alone may access them for `'a`. The bytes
/// between them may belong to someone else (the other side of a shared slot).
#[derive(Debug)]
pub(crate) struct PagesMut<'a> {
    first: *mut u8,
    pub(crate) layout: PoolLayout,
    _life: PhantomData<&'a mut [u8]>,
}

// SAFETY: a `PagesMut` is a `&mut` to the pages it describes.
unsafe impl Send for PagesMut<'_> {}

impl PagesMut<'_> {
    /// The bytes of one page. Panics outside the pool.
    pub(crate) fn page_mut(&mut self, page: usize, head: usize) -> &mut [u8] {
        assert!(page < self.layout.num_pages && head < self.layout.kv_heads, "page out of range");
        // SAFETY: the page is inside `layout`, which the invariant says is ours; `&mut self` makes this the only
        // live slice of it.
        unsafe {
            std::slice::from_raw_parts_mut(
                self.first.add(self.layout.offset(page, head)),
                self.layout.format.page_bytes(),
            )
        }
    }

    /// Heads before `h`, and those from `h` on.
    pub(crate) fn split_heads(self, h: usize) -> (Self, Self) {
        assert!(h <= self.layout.kv_heads, "split out of range");
        let second = self.first.wrapping_add(h * self.layout.head_stride);
        let (low, high) = (
            PoolLayout { kv_heads: h, ..self.layout },
            PoolLayout { kv_heads: self.layout.kv_heads - h, ..self.layout },
        );
        (
            Self { first: self.first, layout: low, _life: PhantomData },
            Self { first: second, layout: high, _life: PhantomData },
        )
    }
}

/// Which pages hold the compressed tokens of each sequence of a batch, and how many tokens that is.
#[derive(Debug, Clone, Copy)]
pub struct Sequences<'a> {
    /// Number of sequences.
    pub batch: usize,
    /// Page numbers, i32 `[batch, >= ceil(max_len / page_tokens)]`. `None`: sequence `b` lies in pages
    /// `b * ceil(max_len / page_tokens)` and following (contiguous sequences). Entries past a sequence's last
    /// page are never read.
    pub table: Option<Mem<'a>>,
    /// Elements from one sequence's row of `table` to the next.
    pub table_stride: usize,
    /// Compressed tokens, i32 `[batch]`, or `[batch, kv_heads]` if `lens_per_head`.
    pub lens: Mem<'a>,
    /// Whether `lens` has one length per KV head (token-eviction methods) instead of one per sequence.
    pub lens_per_head: bool,
    /// Upper bound of every length.
    pub max_len: usize,
}

impl Sequences<'_> {
    /// Pages of the longest sequence allowed by `max_len`.
    #[must_use]
    pub fn max_pages(&self, page_tokens: usize) -> usize {
        self.max_len.div_ceil(page_tokens)
    }
}
