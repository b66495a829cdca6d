//! Pools of pages, and which pages belong to which sequence.
#![allow(unsafe_code)]

use crate::error::{Error, Result};
use crate::format::{PAGE_ALIGN, PageFormat};
use crate::mem::{self, Mem, MemMut, Place};
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

    /// Pages of both sides alternating, `[num_pages][kv_heads][K page | V page]`: the layouts of K and of V. V pages
    /// start `k.page_bytes()` after K pages.
    pub fn pair(
        k: PageFormat,
        v: PageFormat,
        num_pages: usize,
        kv_heads: usize,
    ) -> Result<(PoolLayout, PoolLayout)> {
        let head_stride = k.page_bytes() + v.page_bytes();
        let page_stride =
            kv_heads.checked_mul(head_stride).ok_or(Error::Overflow { argument: "page_stride" })?;
        let side = |format| Self { format, num_pages, kv_heads, page_stride, head_stride };
        Ok((side(k), side(v)))
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

    pub(crate) fn check(&self, argument: &'static str, address: u64, bytes: usize) -> Result<()> {
        let needed = self.extent(argument)?;
        if needed == 0 {
            return Ok(());
        }
        if address == 0 {
            return Err(Error::NullPointer { argument });
        }
        if needed > bytes {
            return Err(Error::BufferTooSmall { argument, bytes, needed });
        }
        for value in [address, self.page_stride as u64, self.head_stride as u64] {
            if !value.is_multiple_of(PAGE_ALIGN as u64) {
                return Err(Error::Misaligned { argument, value, required: PAGE_ALIGN });
            }
        }
        self.check_disjoint(argument, self.format.page_bytes())
    }

    /// Refuses strides under which pages of `page_bytes` bytes overlap.
    fn check_disjoint(&self, argument: &'static str, page_bytes: usize) -> Result<()> {
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

    /// The memory it lies in.
    #[must_use]
    pub fn mem(&self) -> Mem<'a> {
        self.mem
    }
}

impl<'a> PagePoolMut<'a> {
    /// As [`PagePool::new`].
    pub fn new(argument: &'static str, mem: MemMut<'a>, layout: PoolLayout) -> Result<Self> {
        layout.check(argument, mem.address(), mem.bytes())?;
        Ok(Self { mem, layout })
    }

    /// The memory it lies in.
    #[must_use]
    pub fn mem_mut(&mut self) -> MemMut<'_> {
        self.mem.reborrow()
    }
}

impl<'a> PagePool<'a> {
    /// The pools of K and of V over `mem`, laid out as [`PoolLayout::pair`] says. Errors as [`PagePool::new`].
    pub fn pair(
        argument: &'static str,
        mem: Mem<'a>,
        (k, v): (PoolLayout, PoolLayout),
    ) -> Result<(Self, Self)> {
        let v_mem = mem.skip(argument, k.format.page_bytes())?;
        Ok((Self::new(argument, mem, k)?, Self::new(argument, v_mem, v)?))
    }
}

impl<'a> PagePoolMut<'a> {
    /// As [`PagePool::pair`]. Errors also if the pages of K and V overlap.
    pub fn pair(
        argument: &'static str,
        mem: MemMut<'a>,
        (k, v): (PoolLayout, PoolLayout),
    ) -> Result<(Self, Self)> {
        let place = |l: PoolLayout| (l.num_pages, l.kv_heads, l.page_stride, l.head_stride);
        if place(k) != place(v) {
            return Err(Error::invalid(
                argument,
                "laid out differently for K and V",
                "layouts of PoolLayout::pair",
            ));
        }
        k.check_disjoint(argument, k.format.page_bytes() + v.format.page_bytes())?;
        let v_mem = mem.as_ref().skip(argument, k.format.page_bytes())?;
        // SAFETY: `mem` is a writable borrow for 'a that is given up below. A K page and the V page behind it are
        // disjoint from all others, which was just checked, so the two pools have no byte in common.
        let v_mem = unsafe { MemMut::from_raw(v_mem.address(), v_mem.bytes(), v_mem.place()) };
        Ok((Self::new(argument, mem, k)?, Self::new(argument, v_mem, v)?))
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
        mem::check::<u8>(address, bytes, place, Place::Host, argument, self.layout.extent(argument)?)?;
        // Again, since `layout` is a public field.
        self.layout.check(argument, address, bytes)?;
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

impl<'a> PagesMut<'a> {
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

    /// Ranges of `n` heads, each with its first head.
    pub(crate) fn head_ranges(self, n: usize) -> impl Iterator<Item = (usize, Self)> + Send {
        let heads = self.layout.kv_heads;
        let mut rest = Some(self);
        (0..heads).step_by(n.max(1)).filter_map(move |first| {
            let (range, after) = rest.take()?.split_heads(n.min(heads - first));
            rest = Some(after);
            Some((first, range))
        })
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

    /// Pages from one sequence to the next: of the table's rows, or of contiguous sequences.
    pub(crate) fn page_stride(&self, page_tokens: usize) -> usize {
        if self.table.is_some() { self.table_stride } else { self.max_pages(page_tokens) }
    }

    /// Entries of `table` that may be read.
    pub(crate) fn table_len(&self, page_tokens: usize) -> Result<usize> {
        let Some(before) = self.batch.checked_sub(1) else { return Ok(0) };
        before
            .checked_mul(self.page_stride(page_tokens))
            .and_then(|n| n.checked_add(self.max_pages(page_tokens)))
            .ok_or(Error::Overflow { argument: "sequences.table" })
    }

    /// Entries of `lens`.
    pub(crate) fn lens_len(&self, kv_heads: usize) -> Result<usize> {
        let per_sequence = if self.lens_per_head { kv_heads } else { 1 };
        self.batch.checked_mul(per_sequence).ok_or(Error::Overflow { argument: "sequences.lens" })
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use crate::dtype::ValueType;
    use crate::mem::HostBuffer;

    fn layout(num_pages: usize, kv_heads: usize) -> PoolLayout {
        // 16 rows of 8 bitmap bytes and two 2-byte values: 192 bytes.
        PoolLayout::contiguous(PageFormat::uniform(ValueType::F16, 64, 16, 2).unwrap(), num_pages, kv_heads)
            .unwrap()
    }

    /// The check of a pool at an address that is never read.
    fn check(layout: PoolLayout, address: u64, bytes: usize) -> Result<()> {
        layout.check("k", address, bytes)
    }

    fn message(result: Result<()>) -> String {
        result.unwrap_err().to_string()
    }

    #[test]
    fn contiguous_pools_are_page_major() {
        let layout = layout(5, 3);
        assert_eq!((layout.head_stride, layout.page_stride), (192, 576));
        assert_eq!((layout.extent("k"), layout.offset(4, 2), layout.slots()), (Ok(2880), 2688, 80));
        assert_eq!(check(layout, 0x1000, 2880), Ok(()));
    }

    #[test]
    fn short_null_and_misaligned_memory_is_refused() {
        let layout = layout(5, 3);
        assert_eq!(message(check(layout, 0x1000, 2879)), "k has 2879 bytes; needed: 2880");
        assert_eq!(check(layout, 0, 2880), Err(Error::NullPointer { argument: "k" }));
        assert_eq!(message(check(layout, 0x1008, 2880)), "k is 0x1008; it must be a multiple of 16 bytes");
        let odd = PoolLayout { page_stride: 584, ..layout };
        assert_eq!(message(check(odd, 0x1000, 4096)), "k is 0x248; it must be a multiple of 16 bytes");
        let odd = PoolLayout { head_stride: 200, ..layout };
        assert_eq!(message(check(odd, 0x1000, 4096)), "k is 0xc8; it must be a multiple of 16 bytes");
    }

    #[test]
    fn overlapping_pages_are_refused() {
        let good = layout(5, 3);
        for (page_stride, head_stride, ok) in [
            (576, 192, true),
            (560, 192, false), // page p + 1 starts in the last head of page p
            (192, 960, true),  // heads outermost
            (192, 944, false),
            (176, 960, false), // pages of one head overlap
            (0, 960, false),
            (576, 0, false),
            (1152, 208, true), // gaps
        ] {
            let result = check(PoolLayout { page_stride, head_stride, ..good }, 0x1000, 1 << 20);
            assert_eq!(result.is_ok(), ok, "{page_stride} / {head_stride}: {result:?}");
            assert!(ok || message(result).contains("strides under which pages of 192 bytes do not overlap"));
        }
        // The stride of a dimension of one does not matter.
        assert_eq!(check(PoolLayout { page_stride: 0, ..layout(1, 3) }, 0x1000, 576), Ok(()));
        assert_eq!(check(PoolLayout { head_stride: 0, ..layout(5, 1) }, 0x1000, 960), Ok(()));
    }

    #[test]
    fn sizes_that_overflow_are_refused() {
        let good = layout(2, 2);
        let overflow = Err(Error::Overflow { argument: "k" });
        assert_eq!(check(PoolLayout { page_stride: usize::MAX & !15, ..good }, 0x1000, usize::MAX), overflow);
        assert_eq!(check(PoolLayout { num_pages: usize::MAX, ..good }, 0x1000, usize::MAX), overflow);
        assert_eq!(check(PoolLayout { kv_heads: usize::MAX, ..good }, 0x1000, usize::MAX), overflow);
        let format = good.format;
        assert!(PoolLayout::contiguous(format, 1, usize::MAX).is_err());
        // Nothing is multiplied for a pool without pages.
        let empty = PoolLayout { num_pages: 0, kv_heads: usize::MAX, head_stride: usize::MAX, ..good };
        assert_eq!((empty.extent("k"), check(empty, 0, 0)), (Ok(0), Ok(())));
    }

    #[test]
    fn pages_are_read_and_written_where_the_layout_says() {
        let layout = PoolLayout { page_stride: 192 + 16, head_stride: 3 * 208 + 32, ..layout(3, 2) };
        let extent = layout.extent("k").unwrap();
        let mut raw = vec![0u8; extent + PAGE_ALIGN];
        let start = raw.as_ptr().align_offset(PAGE_ALIGN);
        let bytes = &mut raw[start..start + extent];
        let mut pool = PagePoolMut::new("k", MemMut::host(bytes), layout).unwrap();
        let (mut low, mut high) = pool.pages_mut("k").unwrap().split_heads(1);
        low.page_mut(2, 0).fill(7);
        high.page_mut(1, 0).fill(9);
        let set = |value| raw.iter().filter(|&&b| b == value).count();
        assert_eq!((set(7), set(9)), (192, 192));
        let pool = PagePool::new("k", Mem::host(&raw[start..start + extent]), layout).unwrap();
        let pages = pool.pages("k").unwrap();
        assert!(pages.page(2, 0).iter().all(|&b| b == 7) && pages.page(1, 1).iter().all(|&b| b == 9));
    }

    #[test]
    fn pairs_alternate_and_share_no_byte() {
        let k = PageFormat::uniform(ValueType::F16, 64, 16, 2).unwrap();
        let v = PageFormat::uniform(ValueType::F16, 96, 16, 5).unwrap();
        let both = k.page_bytes() + v.page_bytes();
        let layouts = PoolLayout::pair(k, v, 3, 2).unwrap();
        let mut bytes = HostBuffer::zeroed(6 * both).unwrap();
        let mem = MemMut::host(bytes.bytes_mut());
        let (mut k_pool, mut v_pool) = PagePoolMut::pair("pages", mem, layouts).unwrap();
        let (mut k_pages, mut v_pages) = (k_pool.pages_mut("k").unwrap(), v_pool.pages_mut("v").unwrap());
        for (page, head) in (0..3).flat_map(|page| [(page, 0), (page, 1)]) {
            k_pages.page_mut(page, head).fill((2 * page + head) as u8 + 1);
            v_pages.page_mut(page, head).fill((2 * page + head) as u8 + 101);
        }
        for (i, slot) in bytes.bytes().chunks(both).enumerate() {
            let (of_k, of_v) = slot.split_at(k.page_bytes());
            assert!(of_k.iter().all(|&b| b == i as u8 + 1) && of_v.iter().all(|&b| b == i as u8 + 101));
        }
        let pools = PagePool::pair("pages", Mem::host(bytes.bytes()), layouts).unwrap();
        assert_eq!(pools.1.pages("v").unwrap().page(2, 1)[0], 106);

        // K pages alone do not overlap here, slots of both do.
        let mut pair = |page_stride, head_stride| {
            let with = |l| PoolLayout { page_stride, head_stride, num_pages: 2, ..l };
            let mem = MemMut::host(bytes.bytes_mut());
            PagePoolMut::pair("pages", mem, (with(layouts.0), with(layouts.1))).map(|_| ())
        };
        assert_eq!(pair(2 * both, both), Ok(()));
        assert_eq!(pair(both, 2 * both), Ok(()));
        assert!(pair(2 * both - 16, both).unwrap_err().to_string().contains("do not overlap"));
        assert!(pair(2 * both, both - 16).unwrap_err().to_string().contains("do not overlap"));
        let other = PoolLayout { num_pages: 2, ..layouts.1 };
        let error = PagePoolMut::pair("pages", MemMut::host(bytes.bytes_mut()), (layouts.0, other));
        assert!(error.unwrap_err().to_string().contains("laid out differently"));
        assert!(PagePool::pair("pages", Mem::host(&bytes.bytes()[..64]), layouts).is_err());
    }

    #[test]
    #[should_panic(expected = "page out of range")]
    fn pages_outside_the_pool_do_not_exist() {
        let layout = layout(1, 1);
        // SAFETY: the address is checked and never dereferenced.
        let mem = unsafe { MemMut::from_raw(0x1000, 192, Place::Host) };
        let mut pool = PagePoolMut::new("k", mem, layout).unwrap();
        pool.pages_mut("k").unwrap().page_mut(0, 1);
    }

    #[test]
    fn device_memory_has_no_host_pages() {
        // SAFETY: device views are never dereferenced on the host, which is what this test is about.
        let mem = unsafe { Mem::from_raw(0x1000, 1 << 20, Place::Device) };
        let pool = PagePool::new("k", mem, layout(2, 2)).unwrap();
        let error = pool.pages("k").map(|_| ()).unwrap_err();
        assert_eq!(error.to_string(), "k is device memory; allowed: host memory on the CPU backend");
    }
}
