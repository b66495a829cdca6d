//! `append` on the CPU: one row at a time, from the dense token straight into its place in the page.

use super::parallel;
use super::select::{select, subtract_center};
use super::simd_rows::MAX_DIM;
use super::store::{Types, store};
use crate::backend::Cpu;
use crate::dtype::DType;
use crate::format::PageFormat;
use crate::ops::check::HostCenter;
use crate::pool::PagesMut;
use crate::tensor::Rows;

/// K or V: what is read.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Source<'a> {
    /// `[1, tokens, kv_heads, head_dim]`, bits of `dtype`.
    pub(crate) x: Rows<'a, u16>,
    /// f16 or bf16.
    pub(crate) dtype: DType,
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

/// What one side reads, and the pages it writes.
pub(crate) type Side<'a> = (Source<'a>, PagesMut<'a>);

/// Threads take ranges of heads: tokens of one head may share a slot, and the later one must win.
pub(crate) fn append(cpu: Cpu, k: Option<Side<'_>>, v: Option<Side<'_>>, targets: Targets<'_>) {
    let bytes =
        |(source, _): &Side<'_>| source.x.shape.tokens * source.x.shape.heads * source.x.shape.dim * 2;
    let traffic = k.iter().chain(&v).map(bytes).sum();
    let threads = parallel::useful_threads(cpu.threads, traffic);
    let parts = k.into_iter().chain(v).flat_map(|(source, pages)| {
        let share = pages.layout.kv_heads.div_ceil(threads);
        pages.head_ranges(share).map(move |(first, pages)| (source, first, pages))
    });
    parallel::for_each(threads, parts, |(source, first_head, pages)| {
        append_heads(cpu, &source, first_head, pages, targets);
    });
}

fn append_heads(
    cpu: Cpu,
    source: &Source<'_>,
    first_head: usize,
    mut pages: PagesMut<'_>,
    targets: Targets<'_>,
) {
    let (level, format) = (cpu.level, pages.layout.format);
    let (dtype, dim) = (source.dtype, format.head_dim());
    let types = Types { dtype, values: format.value_type() };
    let mut shifted = [0u16; MAX_DIM];
    for (token, &slot) in targets.slots.iter().enumerate() {
        let Ok(slot) = usize::try_from(slot) else { continue };
        let (page, offset) = (slot / format.page_tokens(), slot % format.page_tokens());
        let sequence = targets.sequence.get(token).map_or(0, |&b| b as usize);
        for (i, head) in (first_head..).take(pages.layout.kv_heads).enumerate() {
            let mut row = source.x.row(0, token, head);
            if let Some(center) = &source.center {
                subtract_center(level, dtype, row, center.row(sequence, head), &mut shifted[..dim]);
                row = &shifted[..dim];
            }
            let weights = source.weights.map(|w| &w[head * dim..][..dim]);
            let mask = select(level, dtype, row, weights, source.keep);
            let page = pages.page_mut(page, i);
            let (bitmap, scale, values) = uniform_row(&format, page, offset, source.keep);
            mask.write(bitmap);
            store(level, types, row, &mask, scale, values);
        }
    }
}

/// Bitmap, scale and values of one row of a uniform page; the scale is empty if there is none.
fn uniform_row<'a>(
    format: &PageFormat,
    page: &'a mut [u8],
    row: usize,
    keep: usize,
) -> (&'a mut [u8], &'a mut [u8], &'a mut [u8]) {
    let (head, values) = page.split_at_mut(format.values_offset());
    let (bitmap, scales) = head.split_at_mut(format.bitmap_bytes());
    let part = |section: &'a mut [u8], bytes: usize| &mut section[row * bytes..][..bytes];
    (
        part(bitmap, format.bitmap_row_bytes()),
        part(scales, format.scale_bytes()),
        part(values, keep * format.value_type().bytes()),
    )
}
