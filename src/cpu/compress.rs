//! `compress` on the CPU: count what each page holds, then write whole pages.

use super::parallel;
use super::simd_rows::{self as simd, Mask};
use super::store::{Types, store};
use crate::backend::Cpu;
use crate::dtype::DType;
use crate::format::PageFormat;
use crate::pool::PagesMut;
use crate::tensor::Rows;
use std::ops::Range;
use std::sync::{Mutex, PoisonError};

/// What is read.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Source<'a> {
    /// `[1, tokens, kv_heads, head_dim]`, bits of `dtype`.
    pub(crate) x: Rows<'a, u16>,
    /// f16 or bf16.
    pub(crate) dtype: DType,
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
    let types = Types { dtype: source.dtype, values: format.value_type() };
    let (value_bytes, scale_bytes) = (types.values.bytes(), format.scale_bytes());
    let (sections, values) = page.split_at_mut(format.values_offset());
    let (sections, scales) = sections.split_at_mut(format.scales_offset().unwrap_or(format.values_offset()));
    let (bitmap, offsets) = sections.split_at_mut(format.bitmap_bytes());
    // The first offset is 0, and the padding after the last.
    offsets.fill(0);
    scales.fill(0);
    let ends = offsets[2..].chunks_exact_mut(2);
    let rows = bitmap.chunks_exact_mut(format.bitmap_row_bytes()).zip(ends);
    let mut end = 0;
    for (i, (bitmap, row_end)) in rows.enumerate() {
        let token = tokens.start + i;
        if token < tokens.end {
            let mask = source.mask(cpu, token, head);
            mask.write(bitmap);
            let count = mask.count() as usize;
            let row = &mut values[value_bytes * end..][..value_bytes * count];
            let scale = &mut scales[i * scale_bytes..][..scale_bytes];
            store(cpu.level, types, source.x.row(0, token, head), &mask, scale, row);
            end += count;
        } else {
            bitmap.fill(0);
        }
        row_end.copy_from_slice(&(end as u16).to_le_bytes());
    }
    values[value_bytes * end..].fill(0);
}
