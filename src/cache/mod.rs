//! `Cache`: pages, dense window and sinks of many layers and sequences, over the ops.

mod config;

pub use config::{CacheConfig, CenterMode};

use crate::backend::{Context, Stream};
use crate::error::Result;
use crate::tensor::{Tensor, TensorMut};

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
    /// Pages in use, every layer, K and V.
    pub pages: usize,
    /// Dense tokens in use: window and sinks.
    pub window: usize,
    /// Memory the cache has allocated, used or not.
    pub allocated: usize,
}

/// See the module documentation. All calls take `&self` or `&mut self`; no locks.
#[derive(Debug)]
pub struct Cache {
    config: CacheConfig,
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

impl Cache {
    /// An empty cache. Memory for `max_tokens` and `max_sequences` is reserved here; nothing is reallocated later.
    ///
    /// # Errors
    /// Invalid configuration by field name; [`crate::Error::OutOfMemory`].
    pub fn new(context: &Context, config: CacheConfig) -> Result<Self> {
        let _ = context;
        Ok(Self { config })
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
        todo!()
    }

    /// Appends tokens to one layer of one sequence: a whole prompt after prefill, or what a decode step produced.
    ///
    /// `k` and `v` are `[1, tokens, kv_heads, head_dim]` in the value types. After the call the newest R to
    /// R + group - 1 tokens are dense, however the tokens were split over calls. Every layer must receive the same
    /// tokens; between layers of one step lengths may differ.
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
        let _ = (stream, layer, sequence, k, v);
        todo!()
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
        let _ = (stream, layer, sequences, k, v);
        todo!()
    }

    /// Attention of the newest query tokens of each sequence over everything appended to the layer.
    ///
    /// # Errors
    /// Unknown or repeated sequence, layer, shapes, dtypes.
    pub fn attend(&mut self, stream: Stream, args: CacheAttend<'_>) -> Result<()> {
        let _ = (stream, args);
        todo!()
    }

    /// Tokens of a layer of a sequence: (all, compressed).
    ///
    /// # Errors
    /// Unknown sequence or layer.
    pub fn len(&self, layer: usize, sequence: SequenceId) -> Result<(usize, usize)> {
        let _ = (layer, sequence);
        todo!()
    }

    /// A new sequence with the same tokens. Full pages are shared, dense tokens copied.
    ///
    /// # Errors
    /// Unknown sequence; [`crate::Error::CacheFull`].
    pub fn fork(&mut self, sequence: SequenceId) -> Result<SequenceId> {
        let _ = sequence;
        todo!()
    }

    /// Drops all tokens from position `len` on, in every layer. Tokens that were compressed stay compressed.
    ///
    /// # Errors
    /// Unknown sequence; `len` above the length of some layer.
    pub fn truncate(&mut self, sequence: SequenceId, len: usize) -> Result<()> {
        let _ = (sequence, len);
        todo!()
    }

    /// Ends a sequence; its unshared pages become free.
    ///
    /// # Errors
    /// Unknown sequence.
    pub fn free(&mut self, sequence: SequenceId) -> Result<()> {
        let _ = sequence;
        todo!()
    }

    /// What the whole cache holds.
    #[must_use]
    pub fn bytes(&self) -> CacheBytes {
        todo!()
    }

    /// What one sequence holds; shared pages count in full.
    ///
    /// # Errors
    /// Unknown sequence.
    pub fn sequence_bytes(&self, sequence: SequenceId) -> Result<CacheBytes> {
        let _ = sequence;
        todo!()
    }

    /// The sequence as bytes that [`Cache::restore`] reads in another process, on either backend.
    ///
    /// # Errors
    /// Unknown sequence; layers of different length.
    pub fn save(&self, sequence: SequenceId) -> Result<Vec<u8>> {
        let _ = sequence;
        todo!()
    }

    /// A new sequence from [`Cache::save`]'s bytes.
    ///
    /// # Errors
    /// [`crate::Error::VersionMismatch`] for another version or configuration (the field is named),
    /// [`crate::Error::CorruptData`] for damaged bytes, [`crate::Error::CacheFull`].
    pub fn restore(&mut self, snapshot: &[u8]) -> Result<SequenceId> {
        let _ = snapshot;
        todo!()
    }
}
