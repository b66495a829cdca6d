//! Where the keys and values of one sequence live: dense f16, or a [`mustafar::Cache`].

use super::attention::{self, Heads};
use super::config::Config;
use super::error::{Error, Result};
use half::{bf16, f16};
use mustafar::ops::RECENT_QUERIES;
use mustafar::{
    Cache, CacheAttend, CacheConfig, CacheQueries, CenterMode, Context, DType, Mem, MemMut, SequenceId,
    Shape, Strategy, Stream, Tensor, TensorMut, ValueType,
};

/// How a [`mustafar::Cache`] prunes.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Policy {
    /// How keys are chosen.
    pub k_strategy: Strategy,
    /// How values are chosen.
    pub v_strategy: Strategy,
    /// Fraction of the keys that is dropped.
    pub k_sparsity: f64,
    /// Fraction of the values that is dropped.
    pub v_sparsity: f64,
    /// Type of the values in pages of K and V; tokens are f16, and bf16 for bf16 values.
    pub values: ValueType,
    /// Newest tokens that are never pruned.
    pub window: usize,
    /// Tokens compressed together.
    pub group: usize,
    /// First tokens that stay dense.
    pub sinks: usize,
    pub center: CenterMode,
}

impl Policy {
    /// The library's defaults at one sparsity for keys and values.
    pub fn at(sparsity: f64) -> Self {
        Self {
            k_strategy: Strategy::KtMag,
            v_strategy: Strategy::VtMag,
            k_sparsity: sparsity,
            v_sparsity: sparsity,
            values: ValueType::F16,
            window: 32,
            group: 256,
            sinks: 4,
            center: CenterMode::None,
        }
    }

    /// A cache for a model, of up to so many sequences with so many compressed tokens together.
    pub fn cache_config(
        &self,
        config: &Config,
        max_tokens: usize,
        max_sequences: usize,
    ) -> Result<CacheConfig> {
        let dim = config.head_dim;
        // A group is whole pages: take the largest common page size that divides it. If none does, the cache says
        // what it needs.
        let page_tokens = [64, 32, 16].into_iter().find(|n| self.group.is_multiple_of(*n)).unwrap_or(16);
        let format =
            |strategy: Strategy, sparsity| strategy.page_format(self.values, dim, page_tokens, sparsity);
        Ok(CacheConfig {
            k_strategy: self.k_strategy,
            v_strategy: self.v_strategy,
            k: format(self.k_strategy, self.k_sparsity)?,
            v: format(self.v_strategy, self.v_sparsity)?,
            window: self.window,
            group: self.group,
            sinks: self.sinks,
            center: self.center,
            max_sequences,
            ..CacheConfig::new(config.layers, config.heads, config.kv_heads, dim, dim, dim, max_tokens)?
        })
    }
}

/// Bytes that a store holds, and that the same tokens take dense in f16.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct KvBytes {
    pub held: usize,
    pub dense: usize,
}

/// The last queries of a prompt in one layer, which some strategies judge by.
#[derive(Debug, Clone, Copy)]
pub struct LastQueries<'a> {
    /// `[tokens, q heads, dim]`, after RoPE.
    q: &'a [f32],
    /// Their log-sum-exps, `[tokens, q heads]`.
    lse: &'a [f32],
}

impl<'a> LastQueries<'a> {
    /// From the queries of a whole prompt.
    pub fn of(heads: Heads, q: &'a [f32], lse: &'a [f32]) -> Self {
        let dropped = (lse.len() / heads.q).saturating_sub(RECENT_QUERIES);
        Self { q: &q[dropped * heads.q * heads.dim..], lse: &lse[dropped * heads.q..] }
    }
}

/// One layer of a dense store.
#[derive(Debug, Clone, Default)]
struct DenseLayer {
    /// `[tokens, kv heads, dim]`.
    k: Vec<f16>,
    v: Vec<f16>,
    /// The prompt's [`LastQueries`].
    q: Vec<f32>,
    lse: Vec<f32>,
}

/// Keys and values of one sequence, every layer.
#[derive(Debug)]
pub struct KvStore {
    heads: Heads,
    /// Tokens of each layer; layers differ only while a forward pass is under way.
    lens: Vec<usize>,
    kind: Kind,
}

#[derive(Debug)]
enum Kind {
    Dense(Vec<DenseLayer>),
    Pruned { cache: Box<Cache>, sequence: SequenceId, dtype: DType },
}

/// Bits of values in the type they are stored in.
fn stored(dtype: DType, x: &[f16]) -> Vec<u16> {
    match dtype {
        DType::Bf16 => x.iter().map(|x| bf16::from_f32(x.to_f32()).to_bits()).collect(),
        _ => x.iter().map(|x| x.to_bits()).collect(),
    }
}

fn heads(config: &Config) -> Heads {
    Heads { q: config.heads, kv: config.kv_heads, dim: config.head_dim }
}

impl KvStore {
    /// Dense f16.
    pub fn dense(config: &Config) -> Self {
        Self {
            heads: heads(config),
            lens: vec![0; config.layers],
            kind: Kind::Dense(vec![DenseLayer::default(); config.layers]),
        }
    }

    /// A [`mustafar::Cache`] of one sequence of up to `max_tokens`, attending with the context's threads.
    pub fn pruned(config: &Config, policy: &Policy, max_tokens: usize, context: &Context) -> Result<Self> {
        let shape = policy.cache_config(config, max_tokens, 1)?;
        let dtype = shape.dtype(shape.k);
        let mut cache = Box::new(Cache::new(context, shape)?);
        let sequence = cache.create()?;
        Ok(Self {
            heads: heads(config),
            lens: vec![0; config.layers],
            kind: Kind::Pruned { cache, sequence, dtype },
        })
    }

    /// Tokens that every layer holds.
    pub fn len(&self) -> usize {
        self.lens.last().copied().unwrap_or(0)
    }

    /// Appends tokens to a layer: `k` and `v` are `[tokens, kv heads, dim]`, keys after RoPE.
    pub fn append(&mut self, layer: usize, k: &[f16], v: &[f16]) -> Result<()> {
        self.append_tokens(layer, k, v, None)
    }

    /// As [`KvStore::append`], with the last queries of these tokens, whose attention has been computed elsewhere.
    pub fn append_prompt(
        &mut self,
        layer: usize,
        k: &[f16],
        v: &[f16],
        queries: LastQueries<'_>,
    ) -> Result<()> {
        self.append_tokens(layer, k, v, Some(queries))
    }

    fn append_tokens(
        &mut self,
        layer: usize,
        k: &[f16],
        v: &[f16],
        queries: Option<LastQueries<'_>>,
    ) -> Result<()> {
        let Heads { q, kv, dim } = self.heads;
        let tokens = k.len() / (kv * dim);
        match &mut self.kind {
            Kind::Dense(layers) => {
                let layer = &mut layers[layer];
                layer.k.extend_from_slice(k);
                layer.v.extend_from_slice(v);
                if let Some(queries) = queries {
                    layer.q = queries.q.to_vec();
                    layer.lse = queries.lse.to_vec();
                }
            }
            Kind::Pruned { cache, sequence, dtype } => {
                let (k, v) = (stored(*dtype, k), stored(*dtype, v));
                let shape = Shape::contiguous(1, tokens, kv, dim)?;
                let k = Tensor::new("k", Mem::host(&k), *dtype, shape)?;
                let v = Tensor::new("v", Mem::host(&v), *dtype, shape)?;
                match queries {
                    None => cache.append(Stream::NONE, layer, *sequence, k, v)?,
                    Some(LastQueries { q: rows, lse }) => {
                        let shape = |dim| Shape::contiguous(1, lse.len() / q, q, dim);
                        let queries = CacheQueries {
                            q: Tensor::new("q", Mem::host(rows), DType::F32, shape(dim)?)?,
                            lse: Some(Tensor::new("lse", Mem::host(lse), DType::F32, shape(1)?)?),
                            scale: None,
                            softcap: None,
                            sliding_window: None,
                        };
                        cache.append_with_queries(Stream::NONE, layer, &[*sequence], k, v, queries)?;
                    }
                }
            }
        }
        self.lens[layer] += tokens;
        Ok(())
    }

    /// Forgets all tokens.
    pub fn clear(&mut self) -> Result<()> {
        match &mut self.kind {
            Kind::Dense(layers) => layers.fill(DenseLayer::default()),
            Kind::Pruned { cache, sequence, .. } => {
                cache.free(*sequence)?;
                *sequence = cache.create()?;
            }
        }
        self.lens.fill(0);
        Ok(())
    }

    /// Appends everything that a dense store holds: what prefilling into this store would have appended.
    pub fn fill_from(&mut self, dense: &Self) -> Result<()> {
        let Kind::Dense(layers) = &dense.kind else {
            return Err(Error::Invalid("only a dense store can be copied into another".to_string()));
        };
        for (layer, DenseLayer { k, v, q, lse }) in layers.iter().enumerate() {
            // Without a prompt there are no queries.
            let queries = (!lse.is_empty()).then_some(LastQueries { q, lse });
            self.append_tokens(layer, k, v, queries)?;
        }
        Ok(())
    }

    /// Attention of the newest token's queries, `[q heads, dim]`, over everything in the layer.
    pub fn attend(&mut self, layer: usize, q: &[f32], out: &mut [f32]) -> Result<()> {
        match &mut self.kind {
            Kind::Dense(layers) => {
                let DenseLayer { k, v, .. } = &layers[layer];
                attention::decode(self.heads, q, k, v, out);
            }
            Kind::Pruned { cache, sequence, .. } => {
                let shape = Shape::contiguous(1, 1, self.heads.q, self.heads.dim)?;
                let args = CacheAttend {
                    layer,
                    sequences: &[*sequence],
                    q: Tensor::new("q", Mem::host(q), DType::F32, shape)?,
                    scale: None,
                    softcap: None,
                    sliding_window: None,
                    out: TensorMut::new("out", MemMut::host(out), DType::F32, shape)?,
                    lse: None,
                };
                cache.attend(Stream::NONE, args)?;
            }
        }
        Ok(())
    }

    /// Tokens of the first layer that are compressed.
    pub fn compressed(&self) -> Result<usize> {
        match &self.kind {
            Kind::Dense(_) => Ok(0),
            Kind::Pruned { cache, sequence, .. } => Ok(cache.len(0, *sequence)?.1),
        }
    }

    pub fn bytes(&self) -> Result<KvBytes> {
        match &self.kind {
            Kind::Dense(layers) => {
                let bytes =
                    layers.iter().map(|layer| size_of_val(&layer.k[..]) + size_of_val(&layer.v[..])).sum();
                Ok(KvBytes { held: bytes, dense: bytes })
            }
            Kind::Pruned { cache, sequence, .. } => {
                let bytes = cache.sequence_bytes(*sequence)?;
                Ok(KvBytes { held: bytes.pages + bytes.window, dense: bytes.dense_equivalent })
            }
        }
    }
}
