//! `spmv_key` and `spmv_value` on the CPU: one KV head of one sequence at a time, in tiles of query rows.

use crate::backend::Cpu;
use crate::cpu::dense::{AnyRows, AnyRowsMut, by_head};
use crate::cpu::math;
use crate::cpu::packed::{TAIL_BYTES, look_ahead, push_rows};
use crate::cpu::parallel;
use crate::cpu::simd_attend::{Ahead, BLOCK, Block, Encoding, MAX_DIM, Simd};
use crate::ops::check::{HostCenter, HostSequences};
use crate::pool::Pages;
use crate::tensor::{Rows, RowsMut};
use std::ops::Range;

/// Query rows (query token x head of the group) that share the expansion of a block.
const TILE_ROWS: usize = 4;

/// Tokens summed up on their own before they join the total, which keeps float32 errors of long sequences small.
const SUM_TOKENS: usize = 512;

/// The compressed tokens of a batch.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Source<'a> {
    pub(crate) pages: Pages<'a>,
    pub(crate) sequences: HostSequences<'a>,
}

impl Source<'_> {
    fn dim(&self) -> usize {
        self.pages.layout.format.head_dim()
    }

    /// Calls `work` with the first token of each block of a head, the block, and what comes after it.
    fn blocks(
        &self,
        at: (usize, usize),
        tail: &mut [u8],
        mut work: impl FnMut(usize, &Block<'_>, &mut Ahead<'_>),
    ) {
        let len = self.sequences.len(at.0, at.1);
        for first in (0..len).step_by(BLOCK) {
            let mut block = Block::new(Encoding::Packed(self.pages.layout.format.value_type()), self.dim());
            let tokens = first..len.min(first + BLOCK);
            push_rows(&self.pages, &self.sequences, at, tokens, tail, &mut block);
            let mut ahead = Ahead::new();
            let next = len.min(first + BLOCK)..len.min(first + 2 * BLOCK);
            look_ahead(&self.pages, &self.sequences, at, next, &mut ahead);
            work(first, &block, &mut ahead);
        }
    }

    /// Threads worth using.
    fn threads(&self, cpu: Cpu) -> usize {
        let format = self.pages.layout.format;
        let lens = |b| (0..self.sequences.kv_heads).map(move |head| self.sequences.len(b, head));
        let tokens: usize = (0..self.sequences.batch).flat_map(lens).sum();
        parallel::useful_threads(cpu.threads, tokens / format.page_tokens() * format.page_bytes())
    }
}

/// Scores of every token: `scale * (q . k + q . c)`.
pub(crate) fn key(
    cpu: Cpu,
    source: Source<'_>,
    q: AnyRows<'_>,
    center: Option<HostCenter<'_>>,
    scale: f32,
    scores: RowsMut<'_, f32>,
) {
    let (simd, dim, shape) = (Simd::of(cpu), source.dim(), scores.shape);
    let kv_heads = source.sequences.kv_heads;
    let group = shape.heads / kv_heads;
    let tails = std::iter::repeat_with(|| [0u8; TAIL_BYTES]).take(source.threads(cpu));
    parallel::drain(tails, by_head(scores, shape.batch, kv_heads, group), |tail, ((b, head), mut scores)| {
        let (mut queries, mut biases) = ([0f32; TILE_ROWS * MAX_DIM], [0f32; TILE_ROWS]);
        let mut buffer = [0f32; TILE_ROWS * BLOCK];
        for tile in tiles(shape.tokens * group) {
            let queries = &mut queries[..tile.len() * dim];
            for ((row, q_row), bias) in tile.clone().zip(queries.chunks_exact_mut(dim)).zip(&mut biases) {
                q.load(b, row / group, head * group + row % group, q_row);
                *bias = center.map_or(0.0, |c| math::dot(q_row, c.row(b, head)));
            }
            source.blocks((b, head), tail, |first, block, ahead| {
                let buffer = &mut buffer[..tile.len() * BLOCK];
                simd.dot(block, queries, buffer, ahead);
                for ((row, buffer), bias) in tile.clone().zip(buffer.chunks_exact(BLOCK)).zip(&biases) {
                    let out = &mut scores.row_mut(0, row / group, row % group)[first..][..block.len()];
                    out.iter_mut().zip(buffer).for_each(|(out, s)| *out = scale * (s + bias));
                }
            });
        }
    });
}

/// Sums of the values of every token, weighted.
pub(crate) fn value(cpu: Cpu, source: Source<'_>, weights: Rows<'_, f32>, out: AnyRowsMut<'_>) {
    let (simd, dim, shape) = (Simd::of(cpu), source.dim(), weights.shape);
    let kv_heads = source.sequences.kv_heads;
    let group = shape.heads / kv_heads;
    let tails = std::iter::repeat_with(|| [0u8; TAIL_BYTES]).take(source.threads(cpu));
    parallel::drain(tails, by_head(out, shape.batch, kv_heads, group), |tail, ((b, head), mut out)| {
        let (mut totals, mut sums) = ([0f32; TILE_ROWS * MAX_DIM], [0f32; TILE_ROWS * MAX_DIM]);
        let mut buffer = [0f32; TILE_ROWS * BLOCK];
        for tile in tiles(shape.tokens * group) {
            let (totals, sums) = (&mut totals[..tile.len() * dim], &mut sums[..tile.len() * dim]);
            let buffer = &mut buffer[..tile.len() * BLOCK];
            let join = |totals: &mut [f32], sums: &mut [f32]| {
                totals.iter_mut().zip(sums.iter()).for_each(|(total, sum)| *total += sum);
                sums.fill(0.0);
            };
            totals.fill(0.0);
            sums.fill(0.0);
            source.blocks((b, head), tail, |first, block, ahead| {
                if first.is_multiple_of(SUM_TOKENS) {
                    join(totals, sums);
                }
                for (row, buffer) in tile.clone().zip(buffer.chunks_exact_mut(BLOCK)) {
                    let weights = weights.row(b, row / group, head * group + row % group);
                    buffer[..block.len()].copy_from_slice(&weights[first..][..block.len()]);
                }
                simd.weighted_sum(block, buffer, sums, ahead);
            });
            join(totals, sums);
            for (row, total) in tile.zip(totals.chunks_exact(dim)) {
                out.store(0, row / group, row % group, total);
            }
        }
    });
}

/// Rows `0..rows` in tiles.
fn tiles(rows: usize) -> impl Iterator<Item = Range<usize>> {
    (0..rows).step_by(TILE_ROWS).map(move |first| first..rows.min(first + TILE_ROWS))
}
