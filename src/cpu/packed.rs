//! Rows of pages as the inner loops read them.

use crate::cpu::simd_attend::{BLOCK, Block, MAX_DIM, PAD};
use crate::format::Rows;
use crate::ops::check::HostSequences;
use crate::pool::Pages;
use std::ops::Range;

/// Bytes that [`push_rows`] needs for the rows it has to copy.
pub(crate) const TAIL_BYTES: usize = BLOCK * (MAX_DIM + PAD) * 2;

/// Adds the rows of tokens `tokens` (at most [`BLOCK`]) of sequence `b` to `block`.
///
/// The inner loops read up to `dim + PAD` values from where a row starts. Rows near the end of a page have fewer
/// behind them and are copied to `tail` first, so that no damage of a page can lead outside it.
pub(crate) fn push_rows<'a>(
    pages: &Pages<'a>,
    sequences: &HostSequences<'_>,
    (b, head): (usize, usize),
    tokens: Range<usize>,
    mut tail: &'a mut [u8],
    block: &mut Block<'a>,
) {
    let format = pages.layout.format;
    let (page_tokens, bits_bytes) = (format.page_tokens(), format.bitmap_row_bytes());
    let reach = (format.head_dim() + PAD) * 2;
    let mut token = tokens.start;
    while token < tokens.end {
        let page = pages.page(sequences.page(b, token / page_tokens), head);
        let (bitmap, values) = (&page[..format.bitmap_bytes()], &page[format.values_offset()..]);
        let first = token % page_tokens;
        let rows = first..page_tokens.min(first + tokens.end - token);
        token += rows.len();
        for row in rows {
            let (start, len) = match format.rows() {
                Rows::Uniform { keep } => (row * keep, keep),
                Rows::Ragged { capacity } => ragged_row(&page[format.bitmap_bytes()..], row, capacity),
            };
            let bits = &bitmap[row * bits_bytes..][..bits_bytes];
            if let Some(values) = values.get(start * 2..start * 2 + reach) {
                block.push_packed(bits, values);
            } else {
                let (copy, rest) = tail.split_at_mut(reach);
                let bytes = len.min(format.head_dim()) * 2;
                copy[..bytes].copy_from_slice(&values[start * 2..][..bytes]);
                block.push_packed(bits, copy);
                tail = rest;
            }
        }
    }
}

/// Start and length of a row of a ragged page, both inside the page whatever the offsets say.
fn ragged_row(offsets: &[u8], row: usize, capacity: usize) -> (usize, usize) {
    let offset =
        |i: usize| usize::from(u16::from_le_bytes([offsets[2 * i], offsets[2 * i + 1]])).min(capacity);
    let start = offset(row);
    (start, offset(row + 1).saturating_sub(start))
}
