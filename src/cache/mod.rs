//! `Cache`: pages, dense window and sinks of many layers and sequences, over the ops.
//!
//! The tokens of a sequence are, in order, its sinks (the first few, always dense), its compressed tokens (in pages)
//! and its window (the newest, dense). When the window holds `window + group` tokens, its oldest `group` are
//! compressed; of a long prompt all whole groups are, straight from the caller's tensors. So with T tokens
//! `floor((T - sinks - window) / group) * group` are compressed, or none, however the tokens were split over calls.
//!
//! Memory, each one allocation for all layers:
//! - pages `[layers][pages][kv_heads][K page | V page]`; heads whose formats differ have their own `[pages][heads]`. A sequence has one list of page numbers for all its layers,
//!   and forks share pages until one of them writes into a page the other holds: then it gets a copy.
//! - window `[layers][max_sequences][window + group][kv_heads][head_dim]`, K and V; sinks likewise.
//! - centres `[layers][max_sequences][kv_heads][head_dim]`, f32, if keys are centred.
//! - the last 32 queries `[layers][max_sequences][32][q_heads][head_dim]`, f32, if a strategy judges by them.
//! - one workspace for the attention of every layer.
//!
//! On CUDA all of it is device memory, and so is what callers pass. `append` and `attend` are submitted to the stream and do
//! not wait for it (but for a workspace that has to grow); their small arrays go through a ring of page-locked memory, which
//! waits only for calls long ago; what the layers of a step have in common is sent once. Calls of one cache must be ordered: one stream, or streams that wait for each other.
//! `fork`, `save` and `restore` wait for the whole device. No call may be captured in a graph: what an engine wants to
//! capture are the ops.
//!
//! ```
//! use half::f16;
//! use mustafar::{Cache, CacheAttend, CacheConfig, Context, DType, Mem, MemMut, Shape, Stream, Tensor, TensorMut};
//!
//! // One layer, 4 query heads over 2 KV heads of 64 channels. A row of K keeps 32 values, a row of V 25.
//! let config = CacheConfig::new(1, 4, 2, 64, 32, 25, 4096)?;
//! let mut cache = Cache::new(&Context::cpu(1)?, config)?;
//! let sequence = cache.create()?;
//!
//! // A prompt after prefill, or one token in a decode step.
//! let prompt = vec![f16::ONE; 600 * 2 * 64];
//! let prompt = Tensor::new("prompt", Mem::host(&prompt), DType::F16, Shape::contiguous(1, 600, 2, 64)?)?;
//! cache.append(Stream::NONE, 0, sequence, prompt, prompt)?;
//! // 4 sinks, 512 tokens in pages, 84 in the window.
//! assert_eq!(cache.len(0, sequence)?, (600, 512));
//!
//! let (q, mut out) = (vec![0.1f32; 4 * 64], vec![0.0f32; 4 * 64]);
//! let shape = Shape::contiguous(1, 1, 4, 64)?;
//! cache.attend(
//!     Stream::NONE,
//!     CacheAttend {
//!         layer: 0,
//!         sequences: &[sequence],
//!         q: Tensor::new("q", Mem::host(&q), DType::F32, shape)?,
//!         scale: None,
//!         softcap: None,
//!         sliding_window: None,
//!         out: TensorMut::new("out", MemMut::host(&mut out), DType::F32, shape)?,
//!         lse: None,
//!     },
//! )?;
//! // Equal magnitudes: the lower channels were kept, so channel 0 is 1 in every token.
//! assert!((out[0] - 1.0).abs() < 1e-5);
//! # Ok::<(), mustafar::Error>(())
//! ```

mod append;
mod attend;
mod buffer;
mod compress;
mod config;
mod copy;
mod dense;
mod geometry;
mod pages;
mod rows;
mod scores;
mod sequences;
mod snapshot;

pub use config::{CacheConfig, CenterMode, HeadFormats};
pub(crate) use copy::Place;

use crate::backend::{Context, Run, Stream};
use crate::error::{Error, Result};
use crate::tensor::{Tensor, TensorMut};
use attend::Scratch;
use buffer::{Buffer, Staging};
use compress::ChannelScratch;
use dense::DenseTokens;
use geometry::Geometry;
use pages::Pages;
use rows::Rows;
use scores::Scores;
use sequences::{Progress, Scoring, Sequence, SequenceTable};

/// A sequence of a [`Cache`]. Never reused by the same cache: a freed one is refused from then on.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct SequenceId(pub(crate) u64);

impl SequenceId {
    /// The id as a number, for handing through C.
    #[must_use]
    pub fn to_raw(self) -> u64 {
        self.0
    }

    /// The id from [`SequenceId::to_raw`]; a cache checks it at every use.
    #[must_use]
    pub fn from_raw(raw: u64) -> Self {
        Self(raw)
    }
}

/// What a cache holds, in bytes. Shared pages count once in `pages`, once per sequence in `dense_equivalent`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct CacheBytes {
    /// All tokens of all live sequences and layers stored dense in the value types.
    pub dense_equivalent: usize,
    /// Pages in use, every layer, K and V; the last one of a sequence counts in full.
    pub pages: usize,
    /// Dense tokens in use: window and sinks.
    pub window: usize,
    /// Memory the cache has allocated, used or not: pages, windows, sinks, centres and workspace. 0 for one sequence.
    pub allocated: usize,
}

/// Pages, dense window and sinks of many layers and sequences; see the [module documentation](self).
///
/// All calls take `&self` or `&mut self`: there are no locks, and calls that change nothing may run concurrently.
#[derive(Debug)]
pub struct Cache {
    context: Context,
    config: CacheConfig,
    geometry: Geometry,
    pages: Pages,
    sequences: SequenceTable,
    pool: Buffer,
    windows: DenseTokens,
    sinks: DenseTokens,
    centers: Rows,
    scores: Scores,
    channel: ChannelScratch,
    /// Those of the batch that attends, `[max_sequences]`.
    batch_centers: Buffer,
    /// Log-sum-exps of a batch, for strategies whose callers did not ask for them.
    batch_lse: Buffer,
    workspace: Buffer,
    split_tokens: Option<usize>,
    scratch: Scratch,
    staging: Staging,
}

/// Arguments of [`Cache::attend`]: `sequences.len()` sequences with `total_q / sequences.len()` queries each.
#[derive(Debug)]
pub struct CacheAttend<'a> {
    /// Layer, 0 to layers - 1.
    pub layer: usize,
    /// Sequences, in the order of the queries; no sequence twice.
    pub sequences: &'a [SequenceId],
    /// Queries `[1, total_q, q_heads, head_dim_k]`.
    pub q: Tensor<'a>,
    /// Factor of q.k; `None`: `1 / sqrt(head_dim_k)`.
    pub scale: Option<f32>,
    /// As [`crate::ops::Attend::softcap`].
    pub softcap: Option<f32>,
    /// As [`crate::ops::Attend::sliding_window`].
    pub sliding_window: Option<usize>,
    /// Receives `[1, total_q, q_heads, head_dim_v]`.
    pub out: TensorMut<'a>,
    /// Receives the log-sum-exp, f32 `[1, total_q, q_heads, 1]`.
    pub lse: Option<TensorMut<'a>>,
}

/// Queries of the newest tokens of each sequence, for [`Cache::append_with_queries`].
#[derive(Debug)]
pub struct CacheQueries<'a> {
    /// Queries after RoPE, f16, bf16 or f32 `[sequences, n, q_heads, head_dim_k]`: those of the last n tokens appended,
    /// 1 to all of them. More than 32 are not needed.
    pub q: Tensor<'a>,
    /// Their natural-log log-sum-exps, f32 `[sequences, n, q_heads, 1]`, over all tokens that each query saw. Needed for
    /// [`crate::Strategy::VcOpa`].
    pub lse: Option<Tensor<'a>>,
    /// As [`CacheAttend::scale`]; likewise the next two.
    pub scale: Option<f32>,
    /// As [`CacheAttend::softcap`].
    pub softcap: Option<f32>,
    /// As [`CacheAttend::sliding_window`].
    pub sliding_window: Option<usize>,
}

impl CacheQueries<'_> {
    fn scoring(&self) -> Scoring {
        let Self { scale, softcap, sliding_window, .. } = *self;
        Scoring { scale, softcap, sliding_window }
    }
}

impl Cache {
    /// An empty cache. Memory for `max_tokens` and `max_sequences` is reserved here and committed by the system as it
    /// is first used.
    ///
    /// Nothing is allocated for tokens later. The workspace fits attention with up to 16 query tokens per sequence,
    /// over one sequence of `max_tokens` tokens or `max_sequences` of an even share each; a call that needs more
    /// grows it once.
    ///
    /// # Errors
    /// Invalid configuration by field name, on CUDA also one that [`crate::ops::attend()`] does not serve there;
    /// [`crate::Error::OutOfMemory`].
    pub fn new(context: &Context, config: CacheConfig) -> Result<Self> {
        let geometry = Geometry::checked(&config)?;
        let dense = |names, capacity| DenseTokens::new(context, &config, names, capacity);
        let mut cache = Self {
            pages: Pages::new(geometry.num_pages),
            sequences: SequenceTable::new(config.max_sequences),
            pool: Buffer::zeroed(context, geometry.pages)?,
            windows: dense(["window.k", "window.v"], config.window + config.group)?,
            sinks: dense(["sinks.k", "sinks.v"], config.sinks)?,
            centers: Rows::new(context, &config, "centers", geometry.center)?,
            scores: Scores::new(context, &config, &geometry)?,
            channel: ChannelScratch::new(context, &config)?,
            batch_lse: Buffer::zeroed(context, 0)?,
            batch_centers: Buffer::zeroed(context, config.max_sequences * geometry.center)?,
            workspace: Buffer::zeroed(context, 0)?,
            split_tokens: attend::split_tokens(context, &config, &geometry)?,
            scratch: Scratch::default(),
            staging: Staging::new(context),
            context: context.clone(),
            geometry,
            config,
        };
        cache.workspace = Buffer::zeroed(context, cache.planned_workspace()?)?;
        Ok(cache)
    }

    /// The configuration.
    #[must_use]
    pub fn config(&self) -> &CacheConfig {
        &self.config
    }

    /// A new, empty sequence.
    ///
    /// # Errors
    /// [`crate::Error::CacheFull`] when `max_sequences` are live.
    pub fn create(&mut self) -> Result<SequenceId> {
        self.sequences.insert(Vec::new(), vec![Progress::default(); self.config.layers])
    }

    /// Appends tokens to one layer of one sequence: a whole prompt after prefill, or what a decode step produced.
    ///
    /// `k` and `v` are `[1, tokens, kv_heads, head_dim]` in the value types. After the call the newest R to
    /// R + group - 1 tokens are dense, however the tokens were split over calls. Every layer must receive the same
    /// tokens; between layers of one step lengths may differ. The result does not depend on the split either, to
    /// the bit, except through [`CenterMode::Median`], which looks at what the first compression takes.
    ///
    /// Of more than R tokens appended at once the oldest may already be compressed when [`Cache::attend`] runs:
    /// prefill attends to its own dense tokens.
    ///
    /// # Errors
    /// Unknown sequence or layer, shapes, dtypes; [`crate::Error::CacheFull`] when pages run out. Nothing is appended
    /// then.
    pub fn append(
        &mut self,
        stream: Stream,
        layer: usize,
        sequence: SequenceId,
        k: Tensor<'_>,
        v: Tensor<'_>,
    ) -> Result<()> {
        self.append_tokens(stream, layer, &[sequence], [k, v], None)
    }

    /// Appends the same number of tokens to one layer of several sequences: `k` and `v` are
    /// `[sequences.len(), tokens, kv_heads, head_dim]`.
    ///
    /// # Errors
    /// As [`Cache::append`]; no sequence may be named twice. On error no sequence has changed.
    pub fn append_batch(
        &mut self,
        stream: Stream,
        layer: usize,
        sequences: &[SequenceId],
        k: Tensor<'_>,
        v: Tensor<'_>,
    ) -> Result<()> {
        self.append_tokens(stream, layer, sequences, [k, v], None)
    }

    /// As [`Cache::append_batch`], with the queries of the newest of these tokens: what a caller that has computed their
    /// attention itself, as for a prompt, owes strategies that judge by queries. [`Cache::attend`] remembers its own.
    /// Of consecutive positions the last 32 queries count. Other strategies do not need them, and they are ignored.
    ///
    /// # Errors
    /// As [`Cache::append_batch`]; shapes and dtypes of the queries; no log-sum-exps for a strategy that needs them.
    pub fn append_with_queries(
        &mut self,
        stream: Stream,
        layer: usize,
        sequences: &[SequenceId],
        k: Tensor<'_>,
        v: Tensor<'_>,
        queries: CacheQueries<'_>,
    ) -> Result<()> {
        self.append_tokens(stream, layer, sequences, [k, v], Some(queries))
    }

    /// Attention of the newest query tokens of each sequence over everything appended to the layer. A query that
    /// would stand before the first token sees nothing: 0, and -inf as log-sum-exp. A sequence gives the same bits
    /// alone and in any batch.
    ///
    /// # Errors
    /// Unknown or repeated sequence, layer, shapes, dtypes.
    pub fn attend(&mut self, stream: Stream, args: CacheAttend<'_>) -> Result<()> {
        self.attend_batch(stream, args)
    }

    /// Tokens of a layer of a sequence: (all, compressed).
    ///
    /// # Errors
    /// Unknown sequence or layer.
    pub fn len(&self, layer: usize, sequence: SequenceId) -> Result<(usize, usize)> {
        self.check_layer(layer)?;
        let progress = self.sequences.get("sequence", sequence)?.layers[layer];
        Ok((progress.tokens, progress.compressed))
    }

    /// A new sequence with the same tokens. Pages are shared, dense tokens and centres copied.
    ///
    /// # Errors
    /// Unknown sequence; [`crate::Error::CacheFull`].
    pub fn fork(&mut self, sequence: SequenceId) -> Result<SequenceId> {
        let Sequence { row: from, pages, layers } = self.sequences.get("sequence", sequence)?.clone();
        let id = self.sequences.insert(pages.clone(), layers.clone())?;
        for page in pages {
            self.pages.retain(page);
        }
        self.synchronize()?;
        let to = self.sequences.get("sequence", id)?.row;
        for (layer, progress) in layers.into_iter().enumerate() {
            self.sinks.copy_row(Stream::NONE, layer, from, to, progress.sinks(&self.config))?;
            self.windows.copy_row(Stream::NONE, layer, from, to, progress.window(&self.config))?;
            let scores = self.scores.rows_mut();
            for rows in scores.into_iter().chain([&mut self.centers]) {
                rows.copy_row(Stream::NONE, layer, from, to)?;
            }
        }
        self.synchronize()?;
        Ok(id)
    }

    /// Drops all tokens from position `len` on, in every layer. Tokens that were compressed stay compressed, so the
    /// window may hold fewer than R tokens, or none, until more are appended. A layer left without compressed tokens
    /// forgets its centre.
    ///
    /// # Errors
    /// Unknown sequence; `len` above the length of some layer.
    pub fn truncate(&mut self, sequence: SequenceId, len: usize) -> Result<()> {
        let sequence = self.sequences.get_mut("sequence", sequence)?;
        let shortest = sequence.layers.iter().map(|l| l.tokens).min().unwrap_or(0);
        if len > shortest {
            let value = i64::try_from(len).unwrap_or(i64::MAX);
            return Err(Error::OutOfRange {
                argument: "len",
                index: 0,
                value,
                allowed: (0, shortest as i64),
            });
        }
        let page_tokens = self.config.k.page_tokens();
        let compressed = |layer: &Progress| layer.compressed.min(len.saturating_sub(self.config.sinks));
        let torn = |layer: &Progress| !compressed(layer).is_multiple_of(page_tokens);
        if self.config.is_channel() && sequence.layers.iter().any(torn) {
            let allowed = format!("one that leaves whole pages of {page_tokens} compressed tokens");
            return Err(Error::invalid("len", len, allowed));
        }
        for layer in &mut sequence.layers {
            layer.recent.truncate(len);
            layer.tokens = len;
            layer.compressed = layer.compressed.min(len - layer.sinks(&self.config));
        }
        sequence.trim(&mut self.pages, self.config.k.page_tokens());
        Ok(())
    }

    /// Ends a sequence; its unshared pages become free.
    ///
    /// # Errors
    /// Unknown sequence.
    pub fn free(&mut self, sequence: SequenceId) -> Result<()> {
        for page in self.sequences.remove("sequence", sequence)?.pages {
            self.pages.release(page);
        }
        Ok(())
    }

    /// What the whole cache holds.
    #[must_use]
    pub fn bytes(&self) -> CacheBytes {
        let all = self.sequences.iter().fold(CacheBytes::default(), |sum, sequence| {
            let bytes = self.bytes_of(sequence);
            CacheBytes {
                dense_equivalent: sum.dense_equivalent + bytes.dense_equivalent,
                window: sum.window + bytes.window,
                ..sum
            }
        });
        let pages = self.pages.in_use() * self.geometry.page;
        CacheBytes { pages, allocated: self.geometry.total + self.scratch_bytes(), ..all }
    }

    /// What one sequence holds; shared pages count in full.
    ///
    /// # Errors
    /// Unknown sequence.
    pub fn sequence_bytes(&self, sequence: SequenceId) -> Result<CacheBytes> {
        Ok(self.bytes_of(self.sequences.get("sequence", sequence)?))
    }

    /// The sequence as bytes that [`Cache::restore`] reads in another process, on either backend.
    ///
    /// # Errors
    /// Unknown sequence; layers of different length.
    pub fn save(&self, sequence: SequenceId) -> Result<Vec<u8>> {
        self.save_sequence(sequence)
    }

    /// How many bytes [`Cache::save`] gives for the sequence as it is now.
    ///
    /// # Errors
    /// As [`Cache::save`].
    pub fn save_bytes(&self, sequence: SequenceId) -> Result<usize> {
        self.snapshot_bytes(sequence)
    }

    /// A new sequence from [`Cache::save`]'s bytes.
    ///
    /// # Errors
    /// [`crate::Error::VersionMismatch`] for another version or configuration (the field is named),
    /// [`crate::Error::CorruptData`] for damaged bytes, [`crate::Error::CacheFull`].
    pub fn restore(&mut self, snapshot: &[u8]) -> Result<SequenceId> {
        self.restore_sequence(snapshot)
    }

    /// Waits for the device, where calls without a stream touch what earlier ones with a stream have written.
    fn synchronize(&self) -> Result<()> {
        match self.context.run() {
            Run::Cpu(_) => Ok(()),
            Run::Cuda(device) => device.synchronize(),
        }
    }

    fn check_layer(&self, layer: usize) -> Result<()> {
        if layer >= self.config.layers {
            let value = i64::try_from(layer).unwrap_or(i64::MAX);
            let allowed = (0, self.config.layers as i64 - 1);
            return Err(Error::OutOfRange { argument: "layer", index: 0, value, allowed });
        }
        Ok(())
    }

    fn scratch_bytes(&self) -> usize {
        let buffers = [&self.batch_centers, &self.batch_lse, &self.workspace];
        let buffers: usize = buffers.into_iter().map(Buffer::len).sum();
        buffers + self.scores.scratch_bytes() + self.channel.bytes()
    }

    fn bytes_of(&self, sequence: &Sequence) -> CacheBytes {
        let token = self.geometry.token;
        let tokens: usize = sequence.layers.iter().map(|l| l.tokens).sum();
        let compressed: usize = sequence.layers.iter().map(|l| l.compressed).sum();
        CacheBytes {
            dense_equivalent: tokens * token,
            pages: sequence.pages.len() * self.geometry.page,
            window: (tokens - compressed) * token,
            allocated: 0,
        }
    }
}
