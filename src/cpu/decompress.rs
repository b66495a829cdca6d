//! `decompress` on the CPU: one row at a time.

use super::packed::scale;
use super::parallel;
use super::simd_rows::{self as simd, MAX_DIM};
use crate::backend::Cpu;
use crate::dtype::{DType, ValueType};
use crate::format::Rows;
use crate::mem::Element;
use crate::ops::check::{HostCenter, HostSequences};
use crate::pool::Pages;
use crate::tensor::RowsMut;

/// Tokens that a thread takes at once; a multiple of every page size.
const CHUNK: usize = 1024;

/// What is read. Row offsets of ragged pages have been checked.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Source<'a> {
    pub(crate) pages: Pages<'a>,
    pub(crate) sequences: HostSequences<'a>,
    pub(crate) center: Option<HostCenter<'a>>,
}

/// To f16 or bf16 rows, as `dtype` says.
pub(crate) fn decompress16(cpu: Cpu, source: Source<'_>, dtype: DType, out: RowsMut<'_, u16>) {
    let (level, pages) = (cpu.level, source.pages.layout.format.value_type());
    rows(cpu, source, out, |row, center, out| {
        if center.is_none() && pages.dtype() == Some(dtype) {
            simd::expand(level, row.bitmap, row.values, out);
        } else {
            let mut x = [0f32; MAX_DIM];
            let x = &mut x[..out.len()];
            row.floats(cpu, pages, center, x);
            simd::narrow(level, dtype, x, out);
        }
    });
}

/// To f32 rows.
pub(crate) fn decompress32(cpu: Cpu, source: Source<'_>, out: RowsMut<'_, f32>) {
    let pages = source.pages.layout.format.value_type();
    rows(cpu, source, out, |row, center, out| row.floats(cpu, pages, center, out));
}

/// A row as its page stores it. `values` goes on to the end of the page.
#[derive(Debug, Clone, Copy)]
struct PackedRow<'a> {
    bitmap: &'a [u8],
    /// 1 for 16-bit values.
    scale: f32,
    values: &'a [u8],
}

impl<'a> PackedRow<'a> {
    fn of(pages: &Pages<'a>, page: usize, head: usize, row: usize) -> Self {
        let (format, page) = (pages.layout.format, pages.page(page, head));
        let row_bytes = format.bitmap_row_bytes();
        let first = match format.rows() {
            Rows::Uniform { keep } => row * keep,
            Rows::Ragged { .. } => {
                let at = format.bitmap_bytes() + 2 * row;
                usize::from(u16::from_le_bytes([page[at], page[at + 1]]))
            }
        };
        Self {
            bitmap: &page[row * row_bytes..][..row_bytes],
            scale: format.scales_offset().map_or(1.0, |at| scale(&page[at + 2 * row..])),
            values: &page[format.values_offset()..][format.value_type().bytes() * first..],
        }
    }

    fn floats(&self, cpu: Cpu, values: ValueType, center: Option<&[f32]>, out: &mut [f32]) {
        match values.dtype() {
            Some(dtype) => {
                let mut bits = [0u16; MAX_DIM];
                let bits = &mut bits[..out.len()];
                simd::expand(cpu.level, self.bitmap, self.values, bits);
                simd::widen(cpu.level, dtype, bits, out);
            }
            None => {
                let mut codes = [0u8; MAX_DIM];
                let codes = &mut codes[..out.len()];
                simd::expand_codes(cpu.level, self.bitmap, self.values, codes);
                simd::dequantize(cpu.level, values, self.scale, codes, out);
            }
        }
        if let Some(center) = center {
            out.iter_mut().zip(center).for_each(|(x, c)| *x += c);
        }
    }
}

/// Calls `write` with every row below its sequence's length, its centre and its place in `out`.
fn rows<T: Element>(
    cpu: Cpu,
    source: Source<'_>,
    out: RowsMut<'_, T>,
    write: impl Fn(PackedRow<'_>, Option<&[f32]>, &mut [T]) + Sync,
) {
    let Source { pages, sequences, center } = source;
    let page_tokens = sequences.page_tokens;
    let lens = |b| (0..sequences.kv_heads).map(move |head| sequences.len(b, head));
    let tokens: usize = (0..sequences.batch).flat_map(lens).sum();
    let threads = parallel::useful_threads(cpu.threads, tokens * out.shape.dim * size_of::<T>());
    let chunk = if threads == 1 { usize::MAX } else { CHUNK };
    parallel::for_each(threads, parts(out, sequences, chunk), |mut part| {
        let center = center.map(|c| c.row(part.sequence, part.head));
        for i in 0..part.out.shape.tokens {
            let token = part.first + i;
            let page = sequences.page(part.sequence, token / page_tokens);
            let row = PackedRow::of(&pages, page, part.head, token % page_tokens);
            write(row, center, part.out.row_mut(0, i, 0));
        }
    });
}

/// Consecutive tokens of one head of one sequence.
struct Part<'a, T> {
    sequence: usize,
    head: usize,
    first: usize,
    out: RowsMut<'a, T>,
}

fn parts<'a, T: Element>(
    out: RowsMut<'a, T>,
    sequences: HostSequences<'a>,
    chunk: usize,
) -> impl Iterator<Item = Part<'a, T>> + Send {
    out.sequences().enumerate().flat_map(move |(sequence, rows)| {
        rows.heads().enumerate().flat_map(move |(head, rows)| {
            let (used, _) = rows.split_tokens(sequences.len(sequence, head));
            let chunks = used.chunks(chunk).enumerate();
            chunks.map(move |(i, out)| Part { sequence, head, first: i * chunk, out })
        })
    })
}
