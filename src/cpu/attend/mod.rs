//! `attend` on the CPU: work items of one KV head and one split of a sequence write partial results into the
//! workspace; a second pass merges the splits of each query in order.
//!
//! Splits have a fixed size in positions and items do not share state, so a result depends neither on the batch
//! nor on threads.

mod finish;
mod item;

use crate::backend::Cpu;
use crate::cpu::packed::TAIL_BYTES;
use crate::cpu::parallel;
use crate::cpu::simd_attend::{BLOCK, Simd};
use crate::error::{Error, Result};
use crate::mem::MemMut;
use crate::ops::attend::Attend;
use crate::ops::attend::checks::{Host, Shapes, WORKSPACE_ALIGN};
use item::{Item, Scratch};
use std::ops::Range;

/// Query rows (query token x head of the group) of an item at most. More rows per item share the expansion of a
/// block; 16 keep their accumulators (16 KB at head_dim 256) in the L1 cache.
const MAX_TILE_ROWS: usize = 16;

/// Query rows up to which blocks are expanded in registers for each pass; above, a block is expanded once to float32
/// unless [`Simd::is_direct`].
const DIRECT_ROWS: usize = 4;

/// The workspace: partial results `[batch][tile][kv_head][split]`, then scratch of each thread.
///
/// The rows of a sequence (query token x head of the group, tokens outermost) are cut into tiles.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Layout {
    shapes: Shapes,
    /// Rows of a tile.
    tile_rows: usize,
    /// Tiles of a sequence at most.
    tiles: usize,
    /// Splits of a sequence at most.
    splits: usize,
    /// float32 values of all partial results.
    partials: usize,
    /// Threads that get scratch.
    threads: usize,
    bytes: usize,
}

impl Layout {
    /// Sizes for `shapes`, with checked arithmetic.
    pub(crate) fn new(shapes: &Shapes, threads: usize) -> Result<Self> {
        let overflow = || Error::Overflow { argument: "workspace" };
        let rows = shapes.max_q_len.checked_mul(shapes.group()).ok_or_else(overflow)?;
        let tile_rows = rows.clamp(1, MAX_TILE_ROWS);
        let tiles = rows.div_ceil(tile_rows);
        let splits = shapes.max_positions.div_ceil(shapes.split_tokens);
        let items = [shapes.batch, tiles, shapes.kv_heads, splits]
            .iter()
            .try_fold(1usize, |product, n| product.checked_mul(*n))
            .ok_or_else(overflow)?;
        let mut layout = Self {
            shapes: *shapes,
            tile_rows,
            tiles,
            splits,
            partials: 0,
            threads: threads.min(items),
            bytes: 0,
        };
        layout.partials = items.checked_mul(layout.partial()).ok_or_else(overflow)?;
        layout.bytes = (layout.threads * layout.scratch())
            .checked_add(layout.partials)
            .and_then(|n| n.checked_mul(size_of::<f32>()))
            .and_then(|n| n.checked_add(layout.threads * TAIL_BYTES))
            .ok_or_else(overflow)?;
        Ok(layout)
    }

    /// Size of the workspace in bytes.
    pub(crate) fn bytes(&self) -> usize {
        self.bytes
    }

    /// float32 values of one partial result: weighted sums `[tile_rows, v_dim]`, running maxima and totals
    /// `[tile_rows]` each.
    fn partial(&self) -> usize {
        self.tile_rows * (self.shapes.v_dim + 2)
    }

    /// float32 values of one thread's scratch: queries, scores, q . c, and a block in float32 if rows need it.
    fn scratch(&self) -> usize {
        let wide =
            if self.tile_rows > DIRECT_ROWS { BLOCK * self.shapes.k_dim.max(self.shapes.v_dim) } else { 0 };
        self.tile_rows * (self.shapes.k_dim + BLOCK + 1) + wide
    }

    /// Which partial result belongs to tile, head and split of sequence `b`.
    fn index(&self, b: usize, tile: usize, head: usize, split: usize) -> usize {
        ((b * self.tiles + tile) * self.shapes.kv_heads + head) * self.splits + split
    }

    /// The item of a partial result; `None` if its rows see nothing of its split.
    fn item(&self, host: &Host<'_>, index: usize) -> Option<Item> {
        let (index, split) = (index / self.splits, index % self.splits);
        let (index, head) = (index / self.shapes.kv_heads, index % self.shapes.kv_heads);
        let (b, tile) = (index / self.tiles, index % self.tiles);
        let group = self.shapes.group();
        let first = tile * self.tile_rows;
        let rows = first..(first + self.tile_rows).min(host.queries(b).len() * group);
        if rows.is_empty() {
            return None;
        }
        let positions =
            split * self.shapes.split_tokens..(split + 1).saturating_mul(self.shapes.split_tokens);
        let count = host.queries(b).len();
        let start = host.visible(b, head, rows.start / group, count).start;
        let end = host.visible(b, head, (rows.end - 1) / group, count).end;
        let positions = intersect(&positions, &(start..end));
        (!positions.is_empty()).then_some(Item { b, head, rows, positions })
    }
}

/// Positions in both ranges.
fn intersect(a: &Range<usize>, b: &Range<usize>) -> Range<usize> {
    a.start.max(b.start)..a.end.min(b.end)
}

/// Runs `attend` on checked arguments.
pub(crate) fn run(cpu: Cpu, host: &Host<'_>, mut args: Attend<'_>, workspace: MemMut<'_>) -> Result<()> {
    let layout = Layout::new(&host.shapes, cpu.threads)?;
    let argument = "workspace";
    if workspace.bytes() < layout.bytes {
        let (bytes, needed) = (workspace.bytes(), layout.bytes);
        return Err(Error::BufferTooSmall { argument, bytes, needed });
    }
    let address = workspace.address();
    if layout.bytes > 0 && !address.is_multiple_of(WORKSPACE_ALIGN as u64) {
        return Err(Error::Misaligned { argument, value: address, required: WORKSPACE_ALIGN });
    }
    let floats = layout.partials + layout.threads * layout.scratch();
    let (mut floats_mem, mut tails) = workspace.split_at(argument, floats * size_of::<f32>())?;
    let floats = floats_mem.slice_mut::<f32>(argument, floats)?;
    let tails = tails.slice_mut::<u8>(argument, layout.threads * TAIL_BYTES)?;
    let outputs = finish::Outputs::new(&mut args)?;

    let (partials, scratch) = floats.split_at_mut(layout.partials);
    let threads = parallel::useful_threads(layout.threads.max(1), traffic(host));
    let simd = Simd::of(cpu);
    if !partials.is_empty() {
        let states = scratch
            .chunks_exact_mut(layout.scratch())
            .zip(tails.chunks_exact_mut(TAIL_BYTES))
            .map(|(floats, tail)| Scratch::new(&layout, floats, tail))
            .take(threads);
        let items = partials.chunks_exact_mut(layout.partial()).enumerate();
        let items = items.filter_map(|(i, partial)| Some((layout.item(host, i)?, partial)));
        parallel::drain(states, items, |scratch, (item, partial)| item.run(simd, host, scratch, partial));
    }
    finish::run(&layout, host, partials, outputs, threads);
    Ok(())
}

/// Bytes of K and V that a call reads, about, once for every few query rows: what those compute grows alike.
fn traffic(host: &Host<'_>) -> usize {
    let dense = |d: &Option<crate::ops::attend::checks::HostDense<'_>>| {
        d.as_ref()
            .map_or(0, |d| host.shapes.k_dim * d.k.dtype().bytes() + host.shapes.v_dim * d.v.dtype().bytes())
    };
    let packed = host.compressed.as_ref().map_or(0, |c| {
        let format = c.k.layout.format;
        (format.page_bytes() + c.v.layout.format.page_bytes()) / format.page_tokens()
    });
    let sizes = [dense(&host.sinks), packed, dense(&host.window)];
    let sequence = |b: usize| -> usize {
        (0..host.shapes.kv_heads)
            .map(|h| host.lens(b, h).iter().zip(sizes).map(|(n, s)| n * s).sum::<usize>())
            .sum()
    };
    let passes = (host.shapes.max_q_len * host.shapes.group()).div_ceil(DIRECT_ROWS);
    (0..host.shapes.batch).map(sequence).sum::<usize>().saturating_mul(passes)
}
