//! `compress` on the CPU: count what each page holds, then write whole pages.

use super::parallel;
use super::simd_rows::{self as simd, Mask};
use crate::backend::Cpu;
use crate::format::PageFormat;
use crate::pool::PagesMut;
use crate::tensor::Rows;
use std::ops::Range;
use std::sync::{Mutex, PoisonError};

/// What is read.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Source<'a> {
    /// `[1, tokens, kv_heads, head_dim]`, bits of the pages' dtype.
    pub(crate) x: Rows<'a, u16>,
    /// `[tokens, kv_heads, head_dim / 8]`.
    pub(crate) mask: Option<&'a [u8]>,
    /// Rows of a page.
    pub(crate) page_tokens: usize,
}

impl Source<'_> {
    fn mask(&self, cpu: Cpu, token: usize, head: usize) -> Mask {
        let shape = self.x.shape;
        match self.mask {
            Some(bytes) => {
                let row_bytes = shape.dim / 8;
                Mask::from_bytes(&bytes[(token * shape.heads + head) * row_bytes..][..row_bytes])
            }
            None => simd::nonzero(cpu.level, self.x.row(0, token, head)),
        }
    }

    /// Tokens of the i-th page of the call.
    fn tokens(&self, i: usize) -> Range<usize> {
        let first = i * self.page_tokens;
        first..self.x.shape.tokens.min(first + self.page_tokens)
    }

    fn threads(&self, cpu: Cpu) -> usize {
        let shape = self.x.shape;
        parallel::useful_threads(cpu.threads, shape.tokens * shape.heads * shape.dim * 2)
    }
}

/// Counts the values of each page into `needed`, `[pages, heads]`, if it is given. Returns the first page and head
/// that hold more than `capacity`, and how many.
pub(crate) fn count(
    cpu: Cpu,
    source: Source<'_>,
    needed: Option<&mut [u32]>,
    capacity: usize,
) -> Option<(usize, usize, usize)> {
    let shape = source.x.shape;
    let overflow = Mutex::new(None);
    let mut needed = needed;
    let pages = (0..shape.tokens.div_ceil(source.page_tokens)).map(move |i| {
        let of_page = needed.take().map(|all| {
            let (of_page, rest) = all.split_at_mut(shape.heads);
            needed = Some(rest);
            of_page
        });
        (i, of_page)
    });
    parallel::for_each(source.threads(cpu), pages, |(i, mut needed)| {
        for head in 0..shape.heads {
            let count = source.tokens(i).map(|token| source.mask(cpu, token, head).count()).sum::<u32>();
            if let Some(needed) = &mut needed {
                needed[head] = count;
            }
            if count as usize > capacity {
                let mut first = overflow.lock().unwrap_or_else(PoisonError::into_inner);
                let this = (i, head, count as usize);
                *first = Some(first.map_or(this, |first: (usize, usize, usize)| first.min(this)));
            }
        }
    });
    overflow.into_inner().unwrap_or_else(PoisonError::into_inner)
}

/// Writes the pages, whose rows have been found to fit. Threads take ranges of heads.
pub(crate) fn compress(cpu: Cpu, source: Source<'_>, pages: &[i32], pool: PagesMut<'_>) {
    let threads = source.threads(cpu);
    let share = pool.layout.kv_heads.div_ceil(threads);
    parallel::for_each(threads, pool.head_ranges(share), |(first_head, mut part)| {
        let format = part.layout.format;
        for (i, &page) in pages.iter().enumerate() {
            for head in 0..part.layout.kv_heads {
                let bytes = part.page_mut(page as usize, head);
                write_page(cpu, source, &format, source.tokens(i), first_head + head, bytes);
            }
        }
    });
}

/// Every byte of the page is written: rows past the last token are empty, what no row uses is zero.
fn write_page(
    cpu: Cpu,
    source: Source<'_>,
    format: &PageFormat,
    tokens: Range<usize>,
    head: usize,
    page: &mut [u8],
) {
    let (bitmap, rest) = page.split_at_mut(format.bitmap_bytes());
    let (offsets, values) = rest.split_at_mut(format.values_offset() - format.bitmap_bytes());
    // The first offset is 0, and the padding after the last.
    offsets.fill(0);
    let ends = offsets[2..].chunks_exact_mut(2);
    let rows = bitmap.chunks_exact_mut(format.bitmap_row_bytes()).zip(ends);
    let mut end = 0;
    for (token, (bitmap, row_end)) in (tokens.start..).zip(rows) {
        if token < tokens.end {
            let mask = source.mask(cpu, token, head);
            mask.write(bitmap);
            let row = &mut values[2 * end..][..2 * mask.count() as usize];
            simd::pack(cpu.level, source.x.row(0, token, head), &mask, row);
            end += mask.count() as usize;
        } else {
            bitmap.fill(0);
        }
        row_end.copy_from_slice(&(end as u16).to_le_bytes());
    }
    values[2 * end..].fill(0);
}
