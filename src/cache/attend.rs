//! Attention over a batch of sequences of one layer.

use super::buffer::{Buffer, Kept, Staging};
use super::config::{CacheConfig, CenterMode};
use super::copy::{Place, copy_tokens};
use super::dense::DenseTokens;
use super::geometry::{Geometry, Segment};
use super::sequences::{Scoring, Sequence};
use super::{Cache, CacheAttend, SequenceId};
use crate::backend::{Context, Run, Stream};
use crate::cuda;
use crate::dtype::DType;
use crate::error::{Error, Result};
use crate::mem::{Mem, MemMut};
use crate::ops::{self, Attend, Center, Compressed, Dense, check};
use crate::pool::{PagePool, Sequences};
use crate::tensor::{Shape, Tensor, TensorMut};
use std::ops::Range;

/// Query tokens per sequence that the workspace is planned for.
const PLANNED_QUERIES: usize = 16;

/// Tokens of a work item on CUDA at most; longer ones are no faster.
const LONGEST_SPLIT: usize = 1024;

/// Tokens of a work item: on CUDA what is fastest when the cache is full. Fixed when it is made, since a sequence must
/// give the same bits alone and in any batch.
pub(super) fn split_tokens(
    context: &Context,
    config: &CacheConfig,
    geometry: &Geometry,
) -> Result<Option<usize>> {
    match context.run() {
        // The CPU's default is fixed already.
        Run::Cpu(_) => Ok(None),
        Run::Cuda(device) => {
            let tokens = geometry.num_pages * config.k.page_tokens();
            let each = tokens.div_ceil(config.max_sequences);
            Ok(Some(cuda::attend_split(device, config, each)?.min(LONGEST_SPLIT)))
        }
    }
}

/// Arrays that the ops read during one call, kept for the next.
#[derive(Debug, Default)]
pub(super) struct Scratch {
    /// Slots of an append.
    pub(super) slots: Vec<i64>,
    batch: Batch,
}

/// What attention reads of a batch. In a decode step it is the same for every layer.
#[derive(Debug, Default)]
struct Batch {
    /// Four numbers of each sequence in turn, `[4][batch]`: row in the dense tensors; sinks, compressed tokens and window.
    /// Then page numbers `[batch, table_stride]`.
    arrays: Vec<i32>,
    sequences: usize,
    table_stride: usize,
}

/// The arrays of [`Batch`] where the ops read them.
struct Arrays<'a> {
    table: Mem<'a>,
    table_stride: usize,
    rows: Mem<'a>,
    sinks: Mem<'a>,
    compressed: Mem<'a>,
    window: Mem<'a>,
}

impl Batch {
    fn part(&self, i: usize) -> &[i32] {
        &self.arrays[i * self.sequences..][..self.sequences]
    }

    fn rows(&self) -> &[i32] {
        self.part(0)
    }

    fn longest(&self) -> usize {
        self.part(2).iter().max().map_or(0, |&n| n as usize)
    }

    fn send(&self, staging: &mut Staging, stream: Stream) -> Result<Arrays<'_>> {
        let all = staging.send_kept(stream, Kept::Batch, &self.arrays)?;
        let part = |i: usize| all.skip("sequences", i * self.sequences * size_of::<i32>());
        Ok(Arrays {
            rows: part(0)?,
            sinks: part(1)?,
            compressed: part(2)?,
            window: part(3)?,
            table: part(4)?,
            table_stride: self.table_stride,
        })
    }
}

impl Arrays<'_> {
    /// Without contents, for what depends on sizes only.
    fn absent(table_stride: usize) -> Self {
        let none = Mem::host::<i32>(&[]);
        Self { table: none, table_stride, rows: none, sinks: none, compressed: none, window: none }
    }
}

/// The buffers an attention reads.
struct Memory<'a> {
    config: &'a CacheConfig,
    pool: &'a Buffer,
    windows: &'a DenseTokens,
    sinks: &'a DenseTokens,
    centers: &'a Buffer,
    split_tokens: Option<usize>,
}

/// What a caller chooses.
struct Query<'a> {
    q: Tensor<'a>,
    scale: Option<f32>,
    softcap: Option<f32>,
    sliding_window: Option<usize>,
    out: TensorMut<'a>,
    lse: Option<TensorMut<'a>>,
}

impl Query<'_> {
    /// What concerns some query heads.
    fn heads(&mut self, heads: &Range<usize>) -> Result<Query<'_>> {
        Ok(Query {
            q: self.q.heads("q", heads)?,
            out: self.out.heads("out", heads)?,
            lse: self.lse.as_mut().map(|lse| lse.heads("lse", heads)).transpose()?,
            ..*self
        })
    }
}

impl Cache {
    pub(super) fn attend_batch(&mut self, stream: Stream, args: CacheAttend<'_>) -> Result<()> {
        let attended = self.attend_checked(stream, args);
        let sent = self.staging.finish(stream);
        attended.and(sent)
    }

    fn attend_checked(&mut self, stream: Stream, args: CacheAttend<'_>) -> Result<()> {
        let CacheAttend { layer, sequences, q, scale, softcap, sliding_window, out, lse } = args;
        stream.check(&self.context)?;
        self.check_layer(layer)?;
        self.sequences.check(sequences)?;
        if !q.shape.tokens.is_multiple_of(sequences.len()) {
            let allowed = format!("a multiple of the {} sequences", sequences.len());
            return Err(Error::invalid("q.tokens", q.shape.tokens, allowed));
        }
        let each = q.shape.tokens / sequences.len();
        check::same("q.heads", q.shape.heads, self.config.q_heads, "q_heads of the cache")?;
        check::same("out.heads", out.shape.heads, self.config.q_heads, "q_heads of the cache")?;
        self.gather(layer, sequences)?;
        self.gather_centers(stream, layer)?;
        let scoring = Scoring { scale, softcap, sliding_window };
        let needs_lse = self.geometry.lse > 0;
        if needs_lse && self.batch_lse.len() < q.shape.tokens * self.geometry.lse {
            self.batch_lse = Buffer::zeroed(&self.context, q.shape.tokens * self.geometry.lse)?;
        }
        let Self { context, config, geometry, pool, windows, sinks, scratch, workspace, .. } = self;
        let (centers, split_tokens) = (&self.batch_centers, self.split_tokens);
        let memory = Memory { config, pool, windows, sinks, centers, split_tokens };
        let lse = match lse {
            Some(lse) => {
                check::same("lse.heads", lse.shape.heads, config.q_heads, "q_heads of the cache")?;
                Some(lse)
            }
            None if needs_lse => {
                let shape = Shape::contiguous(1, q.shape.tokens, config.q_heads, 1)?;
                Some(TensorMut::new("lse", self.batch_lse.mem_mut(), DType::F32, shape)?)
            }
            None => None,
        };
        let mut query = Query { q, scale, softcap, sliding_window, out, lse };
        let max_len = scratch.batch.longest();
        let arrays = scratch.batch.send(&mut self.staging, stream)?;
        for segment in geometry.segments(layer) {
            let of_heads = query.heads(&segment.q_heads(config.q_heads / config.kv_heads))?;
            let args = memory.attend(layer, &segment, sequences.len(), max_len, &arrays, of_heads)?;
            let needed = ops::attend_workspace(context, &args)?;
            if needed > workspace.len() {
                *workspace = Buffer::zeroed(context, needed)?;
            }
            ops::attend(context, stream, args, workspace.mem_mut())?;
        }
        if !config.needs_queries() || each == 0 {
            return Ok(());
        }
        let lse = query.lse.as_ref().filter(|_| needs_lse);
        let lse = lse.map(|lse| Tensor { mem: lse.mem.as_ref(), dtype: lse.dtype, shape: lse.shape });
        let queries =
            (by_sequence(query.q, sequences.len()), lse.map(|lse| by_sequence(lse, sequences.len())));
        let newest = |&id| {
            let sequence = self.sequences.get("sequences", id)?;
            Ok((sequence.row, sequence.layers[layer].tokens))
        };
        let newest = sequences.iter().map(newest).collect::<Result<Vec<_>>>()?;
        self.scores.observe(context, &mut self.staging, stream, layer, queries, &newest)?;
        for &id in sequences {
            let progress = &mut self.sequences.get_mut("sequences", id)?.layers[layer];
            progress.recent.add(progress.tokens, each, scoring);
        }
        Ok(())
    }

    /// Workspace for 16 query tokens per sequence, in a batch of `max_sequences` that share `max_tokens` evenly or of
    /// one sequence that has them all.
    pub(super) fn planned_workspace(&self) -> Result<usize> {
        let Self { context, config, geometry, pool, windows, sinks, .. } = self;
        let (centers, split_tokens) = (&self.batch_centers, self.split_tokens);
        let memory = Memory { config, pool, windows, sinks, centers, split_tokens };
        let arrays = Arrays::absent(geometry.num_pages);
        let tokens = geometry.num_pages * config.k.page_tokens();
        let needed = |batch: usize, layer: usize, segment: &Segment| {
            let q_heads = segment.q_heads(config.q_heads / config.kv_heads).len();
            let shape = |dim| Shape::contiguous(1, batch * PLANNED_QUERIES, q_heads, dim);
            // Sizes only: a workspace does not depend on contents.
            let q =
                Tensor { mem: Mem::host::<f32>(&[]), dtype: DType::F32, shape: shape(config.k.head_dim())? };
            let out = shape(config.v.head_dim())?;
            let out = TensorMut { mem: MemMut::host::<f32>(&mut []), dtype: DType::F32, shape: out };
            let query = Query { q, scale: None, softcap: None, sliding_window: None, out, lse: None };
            let args = memory.attend(layer, segment, batch, tokens.div_ceil(batch), &arrays, query)?;
            ops::attend_workspace(context, &args)
        };
        let mut most = 0;
        for layer in geometry.distinct_layers() {
            for segment in geometry.segments(layer) {
                for batch in [1, config.max_sequences] {
                    most = most.max(needed(batch, layer, &segment)?);
                }
            }
        }
        Ok(most)
    }

    /// Fills the scratch arrays for a batch.
    fn gather(&mut self, layer: usize, sequences: &[SequenceId]) -> Result<()> {
        let Self { config, scratch, sequences: table, .. } = self;
        let Batch { arrays, sequences: count, table_stride } = &mut scratch.batch;
        let page_tokens = config.k.page_tokens();
        let live = sequences.iter().map(|&id| table.get("sequences", id)).collect::<Result<Vec<_>>>()?;
        let pages = |s: &Sequence| s.layers[layer].compressed.div_ceil(page_tokens);
        *count = live.len();
        *table_stride = live.iter().map(|s| pages(s)).max().unwrap_or(0);
        arrays.clear();
        arrays.extend(live.iter().map(|s| s.row as i32));
        arrays.extend(live.iter().map(|s| s.layers[layer].sinks(config) as i32));
        arrays.extend(live.iter().map(|s| s.layers[layer].compressed as i32));
        arrays.extend(live.iter().map(|s| s.layers[layer].window(config) as i32));
        for sequence in live {
            let used = &sequence.pages[..pages(sequence)];
            arrays.extend(used.iter().map(|&page| page as i32));
            // The rest of a row is never read.
            arrays.resize(arrays.len() + *table_stride - used.len(), -1);
        }
        Ok(())
    }

    /// Brings the centres of the batch, whose rows are in the scratch arrays, together.
    fn gather_centers(&mut self, stream: Stream, layer: usize) -> Result<()> {
        if self.config.center == CenterMode::None {
            return Ok(());
        }
        let (config, rows) = (&self.config, self.scratch.batch.rows());
        // float32 centres, as the 16-bit halves that tokens are copied in.
        let shape = |rows, heads| Shape::contiguous(rows, 1, heads, 2 * config.k.head_dim());
        let from = shape(config.layers * config.max_sequences, config.kv_heads)?;
        let from = Tensor::new("centers", self.centers.mem(0, 0)?, DType::F16, from)?;
        let place = |(to_row, &row): (usize, &i32)| Place {
            from_row: layer * config.max_sequences + row as usize,
            from_token: 0,
            to_row,
            to_token: 0,
            tokens: 1,
        };
        let places: Vec<Place> = rows.iter().enumerate().map(place).collect();
        for segment in self.geometry.segments(layer) {
            let to = shape(config.max_sequences, segment.heads.len())?;
            let mem = self.batch_centers.mem_mut().skip("centers", batch_centers_at(config, &segment))?;
            let to = TensorMut::new("centers", mem, DType::F16, to)?;
            let from = from.heads("centers", &segment.heads)?;
            copy_tokens(&self.context, &mut self.staging, stream, &mut [(from, to)], &places)?;
        }
        Ok(())
    }
}

/// `batch` sequences that stand one behind the other.
fn by_sequence(x: Tensor<'_>, batch: usize) -> Tensor<'_> {
    let tokens = x.shape.tokens / batch;
    Tensor { shape: Shape { batch, tokens, batch_stride: tokens * x.shape.token_stride, ..x.shape }, ..x }
}

/// Where the centres of a segment's heads for a batch start, in bytes: each segment has `[max_sequences][heads][head_dim]`.
fn batch_centers_at(config: &CacheConfig, segment: &Segment) -> usize {
    config.max_sequences * segment.heads.start * config.k.head_dim() * size_of::<f32>()
}

impl<'a> Memory<'a> {
    fn attend(
        &self,
        layer: usize,
        segment: &Segment,
        batch: usize,
        max_len: usize,
        arrays: &Arrays<'a>,
        query: Query<'a>,
    ) -> Result<Attend<'a>> {
        let dense = |tokens: &'a DenseTokens, lens: Mem<'a>| -> Result<_> {
            let k = tokens.k.tensor(layer)?.heads("dense.k", &segment.heads)?;
            let v = tokens.v.tensor(layer)?.heads("dense.v", &segment.heads)?;
            Ok(Dense { k, v, lens, rows: Some(arrays.rows) })
        };
        let mem = self.pool.mem().skip("pages", segment.at(0))?;
        let (k, v) = PagePool::pair("pages", mem, segment.layouts)?;
        let sequences = Sequences {
            batch,
            table: Some(arrays.table),
            table_stride: arrays.table_stride,
            lens: arrays.compressed,
            lens_per_head: false,
            max_len,
        };
        let k_center = match self.config.center {
            CenterMode::None => None,
            CenterMode::Median => {
                let values = self.centers.mem().skip("centers", batch_centers_at(self.config, segment))?;
                Some(Center { values, batch })
            }
        };
        let Query { q, scale, softcap, sliding_window, out, lse } = query;
        Ok(Attend {
            q,
            batch,
            q_indptr: None,
            max_q_len: q.shape.tokens / batch,
            sinks: if self.config.sinks > 0 { Some(dense(self.sinks, arrays.sinks)?) } else { None },
            compressed: Some(Compressed { k, v, sequences, k_center }),
            window: Some(dense(self.windows, arrays.window)?),
            first: None,
            scale,
            softcap,
            sliding_window,
            split_tokens: self.split_tokens,
            out,
            lse,
        })
    }
}
