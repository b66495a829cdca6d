//! `append` on the CPU: one row at a time, from the dense token straight into its place in the page.

use super::parallel;
use super::select::{select, subtract_center};
use super::simd_rows::{self as simd, MAX_DIM};
use crate::backend::Context;
use crate::format::PageFormat;
use crate::ops::check::HostCenter;
use crate::pool::PagesMut;
use crate::tensor::Rows;
use std::ops::Range;

/// K or V: what is read.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Source<'a> {
    /// `[1, tokens, kv_heads, head_dim]`, bits of the pages' dtype.
    pub(crate) x: Rows<'a, u16>,
    /// Values per row of the pages.
    pub(crate) keep: usize,
    /// `[kv_heads, head_dim]`.
    pub(crate) weights: Option<&'a [f32]>,
    pub(crate) center: Option<HostCenter<'a>>,
}

/// Where the tokens go: slots in range or -1, and the centre of each token (empty if there is at most one).
#[derive(Debug, Clone, Copy)]
pub(crate) struct Targets<'a> {
    pub(crate) slots: &'a [i64],
    pub(crate) sequence: &'a [i32],
}

/// Threads take ranges of heads: tokens of one head may share a slot, and the later one must win.
pub(crate) fn append(context: &Context, sides: Vec<(Source<'_>, PagesMut<'_>)>, targets: Targets<'_>) {
    let bytes = sides.iter().map(|(source, _)| {
        let shape = source.x.shape;
        targets.slots.len().saturating_mul(shape.heads * shape.dim * 2)
    });
    let threads = parallel::useful_threads(context.threads(), bytes.sum());
    let mut parts = Vec::new();
    for (source, mut pages) in sides {
        let heads = pages.layout.kv_heads;
        let share = heads.div_ceil(threads).max(1);
        for first in (0..heads).step_by(share) {
            let (part, rest) = pages.split_heads(share.min(heads - first));
            parts.push((source, first..first + part.layout.kv_heads, part));
            pages = rest;
        }
    }
    parallel::for_each(threads, parts, |(source, heads, pages)| {
        append_heads(context, &source, heads, pages, targets);
    });
}

fn append_heads(
    context: &Context,
    source: &Source<'_>,
    heads: Range<usize>,
    mut pages: PagesMut<'_>,
    targets: Targets<'_>,
) {
    let (level, format) = (context.level(), pages.layout.format);
    let (dtype, dim) = (format.dtype(), format.head_dim());
    let mut shifted = [0u16; MAX_DIM];
    for (token, &slot) in targets.slots.iter().enumerate() {
        let Ok(slot) = usize::try_from(slot) else { continue };
        let (page, offset) = (slot / format.page_tokens(), slot % format.page_tokens());
        let sequence = targets.sequence.get(token).map_or(0, |&b| b as usize);
        for head in heads.clone() {
            let mut row = source.x.row(0, token, head);
            if let Some(center) = &source.center {
                subtract_center(level, dtype, row, center.row(sequence, head), &mut shifted[..dim]);
                row = &shifted[..dim];
            }
            let weights = source.weights.map(|w| &w[head * dim..][..dim]);
            let mask = select(level, dtype, row, weights, source.keep);
            let page = pages.page_mut(page, head - heads.start);
            let (bitmap, values) = uniform_row(&format, page, offset, source.keep);
            mask.write(bitmap);
            simd::pack(level, row, &mask, values);
        }
    }
}

/// Bitmap and values of one row of a uniform page.
fn uniform_row<'a>(
    format: &PageFormat,
    page: &'a mut [u8],
    row: usize,
    keep: usize,
) -> (&'a mut [u8], &'a mut [u8]) {
    let (bitmap, values) = page.split_at_mut(format.values_offset());
    let row_bytes = format.bitmap_row_bytes();
    (&mut bitmap[row * row_bytes..][..row_bytes], &mut values[row * keep * 2..][..keep * 2])
}
