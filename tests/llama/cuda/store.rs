//! Where the keys and values of a batch of sequences live on the device: dense, or in a [`mustafar::Cache`].

use super::gpu::Buffer;
use super::kernels::DenseTarget;
use super::model::GpuModel;
use super::prompt::PromptMemory;
use super::step::Step;
use crate::llama::config::Config;
use crate::llama::error::{Error, Result};
use crate::llama::store::{KvBytes, Policy};
use mustafar::ops::{self, Attend, Dense, RECENT_QUERIES};
use mustafar::{Cache, CacheAttend, CacheQueries, DType, SequenceId, Shape, Tensor, TensorMut};

/// Keys and values of sequences of equal length, every layer, with what a decode step needs.
#[derive(Debug)]
pub struct GpuStore {
    pub(super) batch: usize,
    capacity: usize,
    len: usize,
    pub(super) kind: Kind,
    pub(super) step: Step,
}

#[derive(Debug)]
pub(super) enum Kind {
    Dense(DenseStore),
    Pruned { cache: Box<Cache>, sequences: Vec<SequenceId> },
}

/// Dense tensors `[sequences, capacity, kv heads, dim]`: K and V of each layer.
#[derive(Debug)]
pub(super) struct DenseStore {
    layers: Vec<[Buffer; 2]>,
    shape: Shape,
    workspace: Buffer,
}

/// Queries, keys and values of rows as the projections leave them.
#[derive(Clone, Copy)]
struct Projected<'a> {
    qkv: &'a Buffer,
    dtype: DType,
    config: &'a Config,
}

impl<'a> Projected<'a> {
    /// Heads from `first_head` of the row on, from the row `first_row` on. `batch` sequences of `tokens` rows each, or the
    /// same rows for every sequence.
    fn heads(
        &self,
        (first_row, first_head): (usize, usize),
        (batch, tokens, heads): (usize, usize, usize),
        batch_stride: usize,
    ) -> Result<Tensor<'a>> {
        let Config { head_dim: dim, .. } = *self.config;
        let width = self.config.q_width() + 2 * self.config.kv_width();
        let shape = Shape { batch, tokens, heads, dim, batch_stride, token_stride: width, head_stride: dim };
        let first = first_row * width + first_head * dim;
        Ok(Tensor::new("qkv", self.qkv.mem(first * self.dtype.bytes()), self.dtype, shape)?)
    }

    /// Keys and values of `batch` sequences.
    fn kv(&self, batch: usize, tokens: usize, batch_stride: usize) -> Result<[Tensor<'a>; 2]> {
        let &Config { heads, kv_heads, .. } = self.config;
        let sizes = (batch, tokens, kv_heads);
        Ok([
            self.heads((0, heads), sizes, batch_stride)?,
            self.heads((0, heads + kv_heads), sizes, batch_stride)?,
        ])
    }
}

impl GpuModel {
    /// An empty store of `batch` sequences of up to `capacity` tokens: dense, or pruned by a policy whose values are
    /// of the model's type or have 8 bits.
    ///
    /// # Errors
    /// [`Error::DeviceMemory`] says how many sequences would fit.
    pub fn store(&self, batch: usize, capacity: usize, policy: Option<&Policy>) -> Result<GpuStore> {
        if batch == 0 || capacity == 0 || capacity > self.config.context {
            return Err(Error::Invalid(format!(
                "{batch} sequences of {capacity} tokens; allowed: at least 1 of 1 to {} tokens, the model's context",
                self.config.context
            )));
        }
        let (free, total) = self.gpu.memory()?;
        self.try_store(batch, capacity, policy).map_err(|error| {
            let asked = match &error {
                Error::DeviceMemory { asked, .. } => *asked,
                Error::Mustafar(mustafar::Error::OutOfMemory { bytes }) => *bytes,
                _ => return error,
            };
            let Ok(each) = self.sequence_bytes(capacity, policy) else { return error };
            let fits = format!("about {} sequences of {capacity} tokens fit, not {batch}", free / each);
            Error::DeviceMemory { asked, free, total, fits: Some(fits) }
        })
    }

    fn try_store(&self, batch: usize, capacity: usize, policy: Option<&Policy>) -> Result<GpuStore> {
        let step = Step::new(self, batch)?;
        let kind = match policy {
            None => Kind::Dense(DenseStore::new(self, &step, batch, capacity)?),
            Some(policy) => {
                let tokens = compressed(policy, capacity).max(1);
                let mut shape = policy.cache_config(&self.config, batch * tokens, batch)?;
                shape.scaled_from = self.dtype;
                if shape.dtype(shape.k) != self.dtype {
                    let model = self.dtype;
                    let message = format!(
                        "values are {} and the model {model}; allowed: {model} or 8 bits",
                        policy.values
                    );
                    return Err(Error::Invalid(message));
                }
                let mut cache = Box::new(Cache::new(self.gpu.context(), shape)?);
                let sequences = (0..batch).map(|_| cache.create()).collect::<mustafar::Result<_>>()?;
                Kind::Pruned { cache, sequences }
            }
        };
        let mut store = GpuStore { batch, capacity, len: 0, kind, step };
        self.record(&mut store)?;
        store.place(0)?;
        Ok(store)
    }

    /// Bytes of device memory that one sequence of so many tokens takes, but for small change.
    pub fn sequence_bytes(&self, capacity: usize, policy: Option<&Policy>) -> Result<usize> {
        let c = &self.config;
        let token = 2 * c.kv_width() * self.dtype.bytes();
        let Some(policy) = policy else { return Ok(c.layers * capacity * token) };
        let tokens = compressed(policy, capacity);
        let shape = policy.cache_config(c, tokens.max(1), 1)?;
        let pages = tokens.div_ceil(shape.k.page_tokens()) * c.kv_heads;
        let dense = (policy.sinks + policy.window + policy.group) * token;
        Ok(c.layers * (pages * (shape.k.page_bytes() + shape.v.page_bytes()) + dense))
    }
}

/// Tokens that are compressed of a sequence of so many.
fn compressed(policy: &Policy, tokens: usize) -> usize {
    tokens.saturating_sub(policy.sinks + policy.window) / policy.group.max(1) * policy.group
}

impl GpuStore {
    /// Tokens that each sequence holds.
    pub fn len(&self) -> usize {
        self.len
    }

    pub fn batch(&self) -> usize {
        self.batch
    }

    /// Forgets all tokens.
    pub fn clear(&mut self) -> Result<()> {
        if let Kind::Pruned { cache, sequences } = &mut self.kind {
            for sequence in sequences {
                cache.free(*sequence)?;
                *sequence = cache.create()?;
            }
        }
        self.place(0)
    }

    /// Bytes of the tokens that the store holds, and what they take dense.
    pub fn bytes(&self) -> KvBytes {
        match &self.kind {
            Kind::Dense(dense) => {
                let bytes = self.batch * self.len * dense.token_bytes();
                KvBytes { held: bytes, dense: bytes }
            }
            Kind::Pruned { cache, .. } => {
                let bytes = cache.bytes();
                KvBytes { held: bytes.pages + bytes.window, dense: bytes.dense_equivalent }
            }
        }
    }

    /// Tokens of each sequence that are compressed.
    pub fn compressed(&self) -> Result<usize> {
        match &self.kind {
            Kind::Dense(_) => Ok(0),
            Kind::Pruned { cache, sequences } => Ok(cache.len(0, sequences[0])?.1),
        }
    }

    pub(super) fn check_room(&self, tokens: usize) -> Result<()> {
        if self.len + tokens > self.capacity {
            return Err(Error::Invalid(format!(
                "{} tokens and {tokens} more do not fit a store of {}",
                self.len, self.capacity
            )));
        }
        Ok(())
    }

    /// Where RoPE puts the dense keys and values of a layer.
    pub(super) fn target(&self, layer: usize, copies: usize) -> Option<DenseTarget> {
        let Kind::Dense(dense) = &self.kind else { return None };
        let [k, v] = &dense.layers[layer];
        Some(DenseTarget { k: k.address(), v: v.address(), capacity: self.capacity, copies })
    }

    /// As [`GpuStore::target`], every row for every sequence.
    pub(super) fn prompt_target(&self, layer: usize) -> Option<DenseTarget> {
        self.target(layer, self.batch)
    }

    /// Appends a prompt's keys and values to every sequence of a pruned store. Dense ones RoPE has stored.
    pub(super) fn append_prompt(
        &mut self,
        model: &GpuModel,
        layer: usize,
        memory: &PromptMemory,
        tokens: usize,
    ) -> Result<()> {
        let Kind::Pruned { cache, sequences } = &mut self.kind else { return Ok(()) };
        let projected = Projected { qkv: &memory.qkv, dtype: model.dtype, config: &model.config };
        let [k, v] = projected.kv(self.batch, tokens, 0)?;
        let (last, heads) = (tokens.min(RECENT_QUERIES), model.config.heads);
        let shape = Shape { batch_stride: 0, ..Shape::contiguous(self.batch, last, heads, 1)? };
        let first = (tokens - last) * heads * size_of::<f32>();
        let queries = CacheQueries {
            q: projected.heads((tokens - last, 0), (self.batch, last, heads), 0)?,
            lse: Some(Tensor::new("lse", memory.lse.mem(first), DType::F32, shape)?),
            scale: None,
            softcap: None,
            sliding_window: None,
        };
        cache.append_with_queries(model.gpu.stream(), layer, sequences, k, v, queries)?;
        Ok(())
    }

    /// After a prompt of so many tokens: where its logits go.
    pub(super) fn begin(&mut self, tokens: usize) -> Result<&Buffer> {
        self.place(tokens)?;
        Ok(&self.step.logits)
    }

    /// Every sequence has so many tokens.
    fn place(&mut self, len: usize) -> Result<()> {
        self.len = len;
        self.step.positions.write(&vec![len as i32; self.batch])?;
        self.step.lens.write(&vec![len as i32 + 1; self.batch])?;
        self.step.tokens.write(&vec![0i32; self.batch])
    }

    /// One more token in every sequence.
    pub(super) fn advance(&mut self) {
        self.len += 1;
    }

    /// Appends what a decode step has projected, and attends.
    pub(super) fn append_and_attend(&mut self, model: &GpuModel, layer: usize) -> Result<()> {
        let Self { batch, kind, step, .. } = self;
        let (batch, stream) = (*batch, model.gpu.stream());
        let projected = Projected { qkv: &step.qkv, dtype: model.dtype, config: &model.config };
        let heads = model.config.heads;
        let q = projected.heads((0, 0), (1, batch, heads), 0)?;
        match kind {
            Kind::Dense(dense) => {
                let args = dense.attend(layer, q, step, batch)?;
                ops::attend(model.gpu.context(), stream, args, dense.workspace.mem_mut(0))?;
            }
            Kind::Pruned { cache, sequences } => {
                let [k, v] = projected.kv(batch, 1, model.qkv_width())?;
                cache.append_batch(stream, layer, sequences, k, v)?;
                let out = output(step, &q)?;
                let (scale, softcap, sliding_window) = (None, None, None);
                let args =
                    CacheAttend { layer, sequences, q, scale, softcap, sliding_window, out, lse: None };
                cache.attend(stream, args)?;
            }
        }
        Ok(())
    }
}

/// Attention's results, shaped as the queries but back to back.
fn output<'a>(step: &'a Step, q: &Tensor<'_>) -> Result<TensorMut<'a>> {
    let shape = Shape::contiguous(1, q.shape.tokens, q.shape.heads, q.shape.dim)?;
    Ok(TensorMut::new("out", step.attended.mem_mut(0), q.dtype, shape)?)
}

impl DenseStore {
    fn new(model: &GpuModel, step: &Step, batch: usize, capacity: usize) -> Result<Self> {
        let c = &model.config;
        let shape = Shape::contiguous(batch, capacity, c.kv_heads, c.head_dim)?;
        let side = || Buffer::elements::<u16>(&model.gpu, batch * capacity * c.kv_width());
        let layers = (0..c.layers).map(|_| Ok([side()?, side()?])).collect::<Result<_>>()?;
        let mut new = Self { layers, shape, workspace: Buffer::new(&model.gpu, 0)? };
        let projected = Projected { qkv: &step.qkv, dtype: model.dtype, config: c };
        let q = projected.heads((0, 0), (1, batch, c.heads), 0)?;
        let needed = ops::attend_workspace(model.gpu.context(), &new.attend(0, q, step, batch)?)?;
        new.workspace = Buffer::new(&model.gpu, needed)?;
        Ok(new)
    }

    fn token_bytes(&self) -> usize {
        2 * self.layers.len() * self.shape.token_stride * size_of::<u16>()
    }

    /// The library's attention with all tokens in the dense window.
    fn attend<'a>(&'a self, layer: usize, q: Tensor<'a>, step: &'a Step, batch: usize) -> Result<Attend<'a>> {
        let [k, v] = &self.layers[layer];
        let tensor = |x: &'a Buffer| Tensor::new("dense", x.mem(0), q.dtype, self.shape);
        Ok(Attend {
            q,
            batch,
            q_indptr: None,
            max_q_len: 1,
            sinks: None,
            compressed: None,
            window: Some(Dense { k: tensor(k)?, v: tensor(v)?, lens: step.lens.mem(0), rows: None }),
            first: None,
            scale: None,
            softcap: None,
            sliding_window: None,
            split_tokens: None,
            out: output(step, &q)?,
            lse: None,
        })
    }
}
