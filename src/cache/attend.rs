//! Attention over a batch of sequences of one layer.

use super::buffer::Buffer;
use super::config::{CacheConfig, CenterMode, Geometry};
use super::dense::DenseTokens;
use super::{Cache, CacheAttend, SequenceId};
use crate::backend::Stream;
use crate::dtype::DType;
use crate::error::{Error, Result};
use crate::mem::{Mem, MemMut};
use crate::ops::{self, Attend, Center, Compressed, Dense};
use crate::pool::{PagePool, Sequences};
use crate::tensor::{Shape, Tensor, TensorMut};

/// Query tokens per sequence that the workspace is planned for.
const PLANNED_QUERIES: usize = 16;

/// Arrays that the ops read during one call, kept for the next.
#[derive(Debug, Default)]
pub(super) struct Scratch {
    /// Slots of an append.
    pub(super) slots: Vec<i64>,
    /// Page numbers `[batch, table_stride]`.
    table: Vec<i32>,
    table_stride: usize,
    /// Row of each sequence in the dense tensors.
    rows: Vec<i32>,
    /// Sinks, compressed tokens and window of each sequence.
    sinks: Vec<i32>,
    compressed: Vec<i32>,
    window: Vec<i32>,
    /// Centres `[batch, kv_heads, head_dim]`, if the cache has any.
    centers: Vec<f32>,
}

/// The buffers an attention reads.
struct Memory<'a> {
    config: &'a CacheConfig,
    geometry: &'a Geometry,
    pool: &'a Buffer,
    windows: &'a DenseTokens,
    sinks: &'a DenseTokens,
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

impl Cache {
    pub(super) fn attend_batch(&mut self, stream: Stream, args: CacheAttend<'_>) -> Result<()> {
        let CacheAttend { layer, sequences, q, scale, softcap, sliding_window, out, lse } = args;
        stream.check(&self.context)?;
        self.check_layer(layer)?;
        self.sequences.check(sequences)?;
        if !q.shape.tokens.is_multiple_of(sequences.len()) {
            let allowed = format!("a multiple of the {} sequences", sequences.len());
            return Err(Error::invalid("q.tokens", q.shape.tokens, allowed));
        }
        self.gather(layer, sequences)?;
        let Self { context, config, geometry, pool, windows, sinks, scratch, workspace, .. } = self;
        let memory = Memory { config, geometry, pool, windows, sinks };
        let query = Query { q, scale, softcap, sliding_window, out, lse };
        let max_len = scratch.compressed.iter().max().map_or(0, |&n| n as usize);
        let args = memory.attend(layer, sequences.len(), max_len, scratch, query)?;
        let needed = ops::attend_workspace(context, &args)?;
        if needed > workspace.len() {
            *workspace = Buffer::zeroed(context, needed)?;
        }
        ops::attend(context, stream, args, workspace.mem_mut())
    }

    /// Workspace for 16 query tokens per sequence, in a batch of `max_sequences` that share `max_tokens` evenly or of
    /// one sequence that has them all.
    pub(super) fn planned_workspace(&self) -> Result<usize> {
        let Self { context, config, geometry, pool, windows, sinks, .. } = self;
        let memory = Memory { config, geometry, pool, windows, sinks };
        let scratch = Scratch { table_stride: geometry.num_pages, ..Scratch::default() };
        let tokens = geometry.num_pages * config.k.page_tokens();
        let needed = |batch: usize| {
            let shape = |dim| Shape::contiguous(1, batch * PLANNED_QUERIES, config.q_heads, dim);
            // Sizes only: a workspace does not depend on contents.
            let q =
                Tensor { mem: Mem::host::<f32>(&[]), dtype: DType::F32, shape: shape(config.k.head_dim())? };
            let out = shape(config.v.head_dim())?;
            let out = TensorMut { mem: MemMut::host::<f32>(&mut []), dtype: DType::F32, shape: out };
            let query = Query { q, scale: None, softcap: None, sliding_window: None, out, lse: None };
            let args = memory.attend(0, batch, tokens.div_ceil(batch), &scratch, query)?;
            ops::attend_workspace(context, &args)
        };
        Ok(needed(1)?.max(needed(config.max_sequences)?))
    }

    /// Fills the scratch arrays for a batch.
    fn gather(&mut self, layer: usize, sequences: &[SequenceId]) -> Result<()> {
        let Self { config, geometry, scratch, sequences: table, centers, .. } = self;
        let page_tokens = config.k.page_tokens();
        let live = sequences.iter().map(|&id| table.get("sequences", id)).collect::<Result<Vec<_>>>()?;
        let pages = |s: &super::sequences::Sequence| s.layers[layer].compressed.div_ceil(page_tokens);
        scratch.table_stride = live.iter().map(|s| pages(s)).max().unwrap_or(0);
        scratch.table.clear();
        for list in [&mut scratch.rows, &mut scratch.sinks, &mut scratch.compressed, &mut scratch.window] {
            list.clear();
        }
        scratch.centers.clear();
        for (b, sequence) in live.into_iter().enumerate() {
            let progress = sequence.layers[layer];
            scratch.table.extend(sequence.pages[..pages(sequence)].iter().map(|&page| page as i32));
            // The rest of a row is never read.
            scratch.table.resize((b + 1) * scratch.table_stride, -1);
            scratch.rows.push(sequence.row as i32);
            scratch.sinks.push(progress.sinks(config) as i32);
            scratch.compressed.push(progress.compressed as i32);
            scratch.window.push(progress.window(config) as i32);
            if config.center == CenterMode::Median {
                let at = geometry.center_at(config, layer, sequence.row);
                let count = geometry.center / size_of::<f32>();
                let center = centers.mem().skip("center", at)?.slice::<f32>("center", count)?;
                scratch.centers.extend_from_slice(center);
            }
        }
        Ok(())
    }
}

impl<'a> Memory<'a> {
    fn attend(
        &self,
        layer: usize,
        batch: usize,
        max_len: usize,
        scratch: &'a Scratch,
        query: Query<'a>,
    ) -> Result<Attend<'a>> {
        let rows = Mem::host(&scratch.rows[..]);
        let dense = |tokens: &'a DenseTokens, lens: &'a Vec<i32>| -> Result<_> {
            let (k, v) = (tokens.k.tensor(layer)?, tokens.v.tensor(layer)?);
            Ok(Dense { k, v, lens: Mem::host(&lens[..]), rows: Some(rows) })
        };
        let mem = self.pool.mem().skip("pages", layer * self.geometry.layer_pages)?;
        let (k, v) = PagePool::pair("pages", mem, self.geometry.layouts)?;
        let sequences = Sequences {
            batch,
            table: Some(Mem::host(&scratch.table[..])),
            table_stride: scratch.table_stride,
            lens: Mem::host(&scratch.compressed[..]),
            lens_per_head: false,
            max_len,
        };
        let k_center = match self.config.center {
            CenterMode::None => None,
            CenterMode::Median => Some(Center { values: Mem::host(&scratch.centers[..]), batch }),
        };
        let Query { q, scale, softcap, sliding_window, out, lse } = query;
        Ok(Attend {
            q,
            batch,
            q_indptr: None,
            max_q_len: q.shape.tokens / batch,
            sinks: if self.config.sinks > 0 { Some(dense(self.sinks, &scratch.sinks)?) } else { None },
            compressed: Some(Compressed { k, v, sequences, k_center }),
            window: Some(dense(self.windows, &scratch.window)?),
            first: None,
            scale,
            softcap,
            sliding_window,
            split_tokens: None,
            out,
            lse,
        })
    }
}
