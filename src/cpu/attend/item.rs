//! One work item: the query rows of one tile and KV head over one split of a sequence.

use super::{DIRECT_ROWS, Layout, intersect};
use crate::cpu::dense::AnyRows;
use crate::cpu::math;
use crate::cpu::packed::{look_ahead, push_rows};
use crate::cpu::simd_attend::{Ahead, BLOCK, Block, Encoding, Simd, Softmax};
use crate::dtype::DType;
use crate::ops::attend::checks::{Host, HostCompressed, HostDense};
use std::ops::Range;

/// What an item covers.
#[derive(Debug, Clone)]
pub(super) struct Item {
    pub(super) b: usize,
    pub(super) head: usize,
    /// Rows of the sequence: query token x head of the group.
    pub(super) rows: Range<usize>,
    /// Positions that at least one row sees.
    pub(super) positions: Range<usize>,
}

/// One thread's part of the workspace.
#[derive(Debug)]
pub(super) struct Scratch<'a> {
    tile_rows: usize,
    /// Queries `[tile_rows, k_dim]`.
    q: &'a mut [f32],
    /// Scores, then weights, `[tile_rows, BLOCK]`.
    scores: &'a mut [f32],
    /// q . c `[tile_rows]`.
    bias: &'a mut [f32],
    /// A block in float32 `[BLOCK, dim]`; empty if tiles are small.
    wide: &'a mut [f32],
    tail: &'a mut [u8],
}

impl<'a> Scratch<'a> {
    /// Cuts up the thread's share of the workspace, which holds anything.
    pub(super) fn new(layout: &Layout, floats: &'a mut [f32], tail: &'a mut [u8]) -> Self {
        let tile_rows = layout.tile_rows;
        let (q, floats) = floats.split_at_mut(tile_rows * layout.shapes.k_dim);
        let (scores, floats) = floats.split_at_mut(tile_rows * BLOCK);
        let (bias, wide) = floats.split_at_mut(tile_rows);
        Self { tile_rows, q, scores, bias, wide, tail }
    }
}

/// Where the keys and values of some positions lie.
#[derive(Clone, Copy)]
enum Section<'a> {
    Dense(&'a HostDense<'a>),
    Packed(&'a HostCompressed<'a>),
}

/// Running softmax of the rows of an item; the partial result when the item is done.
struct Running<'a> {
    sums: &'a mut [f32],
    max: &'a mut [f32],
    total: &'a mut [f32],
}

impl Item {
    /// Computes the partial result of the item.
    pub(super) fn run(&self, simd: Simd, host: &Host<'_>, scratch: &mut Scratch<'_>, partial: &mut [f32]) {
        let n = self.rows.len();
        let (sums, rest) = partial.split_at_mut(scratch.tile_rows * host.shapes.v_dim);
        let (max, total) = rest.split_at_mut(scratch.tile_rows);
        let running = &mut Running {
            sums: &mut sums[..n * host.shapes.v_dim],
            max: &mut max[..n],
            total: &mut total[..n],
        };
        running.sums.fill(0.0);
        running.max.fill(f32::NEG_INFINITY);
        running.total.fill(0.0);
        self.load_queries(host, scratch);

        let lens = host.lens(self.b, self.head);
        let sections = [
            host.sinks.as_ref().map(Section::Dense),
            host.compressed.as_ref().map(Section::Packed),
            host.window.as_ref().map(Section::Dense),
        ];
        let mut start = 0;
        for (section, len) in sections.iter().zip(lens) {
            let positions = intersect(&self.positions, &(start..start + len));
            if let Some(section) = section
                && !positions.is_empty()
            {
                self.load_bias(host, section, scratch);
                let block = |at: usize| at.min(positions.end)..positions.end.min(at + BLOCK);
                let tokens = |block: Range<usize>| block.start - start..block.end - start;
                for side in [Side::K, Side::V] {
                    self.look_ahead(*section, side, tokens(block(positions.start))).all();
                }
                for at in positions.clone().step_by(BLOCK) {
                    let next = tokens(block(at + BLOCK));
                    self.block(simd, host, *section, start, block(at), next, scratch, running);
                }
            }
            start += len;
        }
    }

    fn load_queries(&self, host: &Host<'_>, scratch: &mut Scratch<'_>) {
        let group = host.shapes.group();
        let first = host.queries(self.b).start;
        for (row, q) in self.rows.clone().zip(scratch.q.chunks_exact_mut(host.shapes.k_dim)) {
            host.q.load(0, first + row / group, self.head * group + row % group, q);
        }
    }

    /// q . c of each row for centred keys, else 0.
    fn load_bias(&self, host: &Host<'_>, section: &Section<'_>, scratch: &mut Scratch<'_>) {
        let center = match section {
            Section::Packed(HostCompressed { k_center: Some(center), .. }) => center.row(self.b, self.head),
            _ => return scratch.bias.fill(0.0),
        };
        for (bias, q) in scratch.bias.iter_mut().zip(scratch.q.chunks_exact(host.shapes.k_dim)) {
            *bias = math::dot(q, center);
        }
    }

    /// Adds the positions `block` of a section that starts at position `start`; its tokens `next` come after.
    #[allow(clippy::too_many_arguments)]
    fn block(
        &self,
        simd: Simd,
        host: &Host<'_>,
        section: Section<'_>,
        start: usize,
        block: Range<usize>,
        next: Range<usize>,
        scratch: &mut Scratch<'_>,
        running: &mut Running<'_>,
    ) {
        let group = host.shapes.group();
        let count = host.queries(self.b).len();
        let visible = |row: usize| host.visible(self.b, self.head, row / group, count);
        let tokens = |positions: &Range<usize>| positions.start - start..positions.end - start;
        let everyone = visible(self.rows.end - 1).start..visible(self.rows.start).end;
        if everyone.start <= block.start && block.end <= everyone.end {
            return self.rows(
                simd,
                host,
                section,
                tokens(&block),
                next,
                0..self.rows.len(),
                scratch,
                running,
            );
        }
        // Some query tokens see only a part: each goes on its own over just that, so that what it must not see,
        // NaN included, never meets its sums.
        let mut row = self.rows.start;
        while row < self.rows.end {
            let end = ((row / group + 1) * group).min(self.rows.end);
            let seen = intersect(&block, &visible(row));
            if !seen.is_empty() {
                let rows = row - self.rows.start..end - self.rows.start;
                self.rows(simd, host, section, tokens(&seen), next.clone(), rows, scratch, running);
            }
            row = end;
        }
    }

    /// Adds `tokens` of a section to some rows of the tile, all of which see all of them.
    #[allow(clippy::too_many_arguments)]
    fn rows(
        &self,
        simd: Simd,
        host: &Host<'_>,
        section: Section<'_>,
        tokens: Range<usize>,
        next: Range<usize>,
        rows: Range<usize>,
        scratch: &mut Scratch<'_>,
        running: &mut Running<'_>,
    ) {
        let (k_dim, v_dim) = (host.shapes.k_dim, host.shapes.v_dim);
        let n = tokens.len();
        let many = rows.len() > DIRECT_ROWS;

        let q = &scratch.q[rows.start * k_dim..rows.end * k_dim];
        let scores = &mut scratch.scores[rows.start * BLOCK..rows.end * BLOCK];
        let mut ahead = self.look_ahead(section, Side::K, next.clone());
        let keys = self.load(section, Side::K, tokens.clone(), k_dim, scratch.tail);
        if many && !simd.is_direct(keys.encoding()) {
            let keys = wide(simd, keys, scratch.wide, &mut ahead);
            simd.dot(&keys, q, scores, &mut ahead);
        } else {
            simd.dot(&keys, q, scores, &mut ahead);
        }

        for (row, scores) in rows.clone().zip(scores.chunks_exact_mut(BLOCK)) {
            let step = Softmax {
                scale: host.scale,
                bias: scratch.bias[row],
                softcap: host.softcap,
                max: running.max[row],
            };
            let (max, total) = simd.softmax(&mut scores[..n], &step);
            if max > step.max {
                let shrink = (step.max - max).exp();
                running.total[row] *= shrink;
                running.sums[row * v_dim..][..v_dim].iter_mut().for_each(|sum| *sum *= shrink);
                running.max[row] = max;
            }
            running.total[row] += total;
        }

        let sums = &mut running.sums[rows.start * v_dim..rows.end * v_dim];
        let mut ahead = self.look_ahead(section, Side::V, next);
        let values = self.load(section, Side::V, tokens, v_dim, scratch.tail);
        if many && !simd.is_direct(values.encoding()) {
            let values = wide(simd, values, scratch.wide, &mut ahead);
            simd.weighted_sum(&values, scores, sums, &mut ahead);
        } else {
            simd.weighted_sum(&values, scores, sums, &mut ahead);
        }
    }

    /// The memory of `tokens`, which may be none.
    fn look_ahead<'a>(&self, section: Section<'a>, side: Side, tokens: Range<usize>) -> Ahead<'a> {
        let mut ahead = Ahead::new();
        match (section, side) {
            (Section::Packed(compressed), side) => {
                let pages = if let Side::K = side { &compressed.k } else { &compressed.v };
                let at = (self.b, self.head);
                look_ahead(pages, &compressed.sequences, at, tokens, &mut ahead);
            }
            (Section::Dense(dense), side) => {
                let rows = if let Side::K = side { &dense.k } else { &dense.v };
                rows.look_ahead(dense.row(self.b), tokens, self.head, &mut ahead);
            }
        }
        ahead
    }

    fn load<'a>(
        &self,
        section: Section<'a>,
        side: Side,
        tokens: Range<usize>,
        dim: usize,
        tail: &'a mut [u8],
    ) -> Block<'a> {
        match section {
            Section::Packed(compressed) => {
                let pages = match side {
                    Side::K => &compressed.k,
                    Side::V => &compressed.v,
                };
                let mut block = Block::new(Encoding::Packed(pages.layout.format.value_type()), dim);
                push_rows(pages, &compressed.sequences, (self.b, self.head), tokens, tail, &mut block);
                block
            }
            Section::Dense(dense) => {
                let rows: &AnyRows<'a> = match side {
                    Side::K => &dense.k,
                    Side::V => &dense.v,
                };
                let mut block = Block::new(Encoding::Dense(rows.dtype()), dim);
                let b = dense.row(self.b);
                rows.push(b, tokens, self.head, &mut block);
                block
            }
        }
    }
}

#[derive(Clone, Copy)]
enum Side {
    K,
    V,
}

/// The same rows in float32, expanded into `buffer` unless they are so already.
fn wide<'a>(simd: Simd, block: Block<'a>, buffer: &'a mut [f32], ahead: &mut Ahead<'_>) -> Block<'a> {
    if block.encoding() == Encoding::Dense(DType::F32) {
        return block;
    }
    simd.expand(&block, buffer, ahead);
    let mut wide = Block::new(Encoding::Dense(DType::F32), block.dim());
    wide.push_dense_run(buffer, block.dim(), block.len());
    wide
}
