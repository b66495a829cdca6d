//! Rows of pages as the inner loops read them.

use crate::cpu::math::bf16_to_f32;
use crate::cpu::simd_attend::{Ahead, BLOCK, Block, MAX_DIM, PAD_BYTES};
use crate::format::Rows;
use crate::ops::check::HostSequences;
use crate::pool::Pages;
use std::ops::Range;

/// Bytes that [`push_rows`] needs for the rows it has to copy.
pub(crate) const TAIL_BYTES: usize = BLOCK * (2 * MAX_DIM + PAD_BYTES);

/// Adds the rows of tokens `tokens` (at most [`BLOCK`]) of sequence `b` to `block`.
///
/// The inner loops read a little past the values that a bitmap asks for, which damage can make `dim`. Rows that
/// might so lead outside their page, at its end, are copied to `tail` first.
pub(crate) fn push_rows<'a>(
    pages: &Pages<'a>,
    sequences: &HostSequences<'_>,
    (b, head): (usize, usize),
    tokens: Range<usize>,
    mut tail: &'a mut [u8],
    block: &mut Block<'a>,
) {
    let format = pages.layout.format;
    let (page_tokens, value_bytes) = (format.page_tokens(), format.value_type().bytes());
    let mut token = tokens.start;
    while token < tokens.end {
        let page = pages.page(sequences.page(b, token / page_tokens), head);
        let (bitmap, values) = (&page[..format.bitmap_bytes()], &page[format.values_offset()..]);
        let scales = format.scales_offset().map(|at| &page[at..]);
        let first = token % page_tokens;
        let mut rows = first..page_tokens.min(first + tokens.end - token);
        token += rows.len();
        if let Rows::Uniform { keep } = format.rows() {
            // Rows that stay inside whatever their bits go in one step.
            let (reach, stride) = (format.head_dim() * value_bytes + PAD_BYTES, keep * value_bytes);
            let inside = values.len().checked_sub(reach).map_or(0, |room| room / stride + 1);
            let run = rows.start..rows.end.min(inside);
            if !run.is_empty() {
                let bits = &bitmap[run.start * format.bitmap_row_bytes()..];
                let scales = scales.map(|scales| &scales[2 * run.start..]);
                block.push_packed_run(bits, scales, &values[run.start * stride..], stride, run.len());
                rows.start = run.end;
            }
        }
        for row in rows {
            let (start, len) = match format.rows() {
                Rows::Uniform { keep } => (row * keep, keep),
                Rows::Ragged { capacity } => ragged_row(&page[format.bitmap_bytes()..], row, capacity),
            };
            let bits = &bitmap[row * format.bitmap_row_bytes()..][..format.bitmap_row_bytes()];
            let scale = scales.map_or(1.0, |scales| scale(&scales[2 * row..]));
            let values = &values[start * value_bytes..];
            if let Err(needed) = block.push_packed(bits, scale, values) {
                let (copy, rest) = std::mem::take(&mut tail).split_at_mut(needed);
                let bytes = (len * value_bytes).min(needed - PAD_BYTES);
                copy[..bytes].copy_from_slice(&values[..bytes]);
                let copied = block.push_packed(bits, scale, copy);
                debug_assert!(copied.is_ok(), "a copy has as many bytes as the row needs");
                tail = rest;
            }
        }
    }
}

/// Adds what [`push_rows`] will make the inner loops read. Of ragged pages, whose rows are not looked up yet, it is
/// where the values would be if all rows kept the same number.
pub(crate) fn look_ahead<'a>(
    pages: &Pages<'a>,
    sequences: &HostSequences<'_>,
    (b, head): (usize, usize),
    tokens: Range<usize>,
    ahead: &mut Ahead<'a>,
) {
    let format = pages.layout.format;
    let page_tokens = format.page_tokens();
    let row_bytes = format.capacity() * format.value_type().bytes() / page_tokens;
    let mut token = tokens.start;
    while token < tokens.end {
        let page = pages.page(sequences.page(b, token / page_tokens), head);
        let first = token % page_tokens;
        let rows = first..page_tokens.min(first + tokens.end - token);
        token += rows.len();
        let bits = format.bitmap_row_bytes();
        ahead.push(&page[rows.start * bits..rows.end * bits]);
        if let Some(scales) = format.scales_offset() {
            ahead.push(&page[scales..][2 * rows.start..2 * rows.end]);
        }
        ahead.push(&page[format.values_offset()..][rows.start * row_bytes..rows.end * row_bytes]);
    }
}

/// The scale that the first two bytes are.
pub(crate) fn scale(bytes: &[u8]) -> f32 {
    bf16_to_f32(u16::from_le_bytes([bytes[0], bytes[1]]))
}

/// Start and length of a row of a ragged page, both inside the page whatever the offsets say.
fn ragged_row(offsets: &[u8], row: usize, capacity: usize) -> (usize, usize) {
    let offset =
        |i: usize| usize::from(u16::from_le_bytes([offsets[2 * i], offsets[2 * i + 1]])).min(capacity);
    let start = offset(row);
    (start, offset(row + 1).saturating_sub(start))
}
