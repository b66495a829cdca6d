//! Where the keys and values of one sequence live: dense f16, or a [`mustafar::Cache`].

use super::attention::{self, Heads};
use super::config::Config;
use super::error::{Error, Result};
use half::f16;
use mustafar::{
    Cache, CacheAttend, CacheConfig, CenterMode, Context, DType, Mem, MemMut, PageFormat, SequenceId, Shape,
    Stream, Tensor, TensorMut, ValueType, keep_for_sparsity,
};

/// How a [`mustafar::Cache`] prunes.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Policy {
    /// Fraction of each key row that is dropped.
    pub k_sparsity: f64,
    /// Fraction of each value row that is dropped.
    pub v_sparsity: f64,
    /// Type of the values in pages of K and V: f16, or one of 8 bits.
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
            k_sparsity: sparsity,
            v_sparsity: sparsity,
            values: ValueType::F16,
            window: 32,
            group: 256,
            sinks: 4,
            center: CenterMode::None,
        }
    }
}

/// Bytes that a store holds, and that the same tokens take dense in f16.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct KvBytes {
    pub held: usize,
    pub dense: usize,
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
    /// Per layer keys and values, `[tokens, kv heads, dim]`.
    Dense(Vec<(Vec<f16>, Vec<f16>)>),
    Pruned {
        cache: Box<Cache>,
        sequence: SequenceId,
    },
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
            kind: Kind::Dense(vec![(Vec::new(), Vec::new()); config.layers]),
        }
    }

    /// A [`mustafar::Cache`] of one sequence of up to `max_tokens`, attending with the context's threads.
    pub fn pruned(config: &Config, policy: &Policy, max_tokens: usize, context: &Context) -> Result<Self> {
        let dim = config.head_dim;
        let keep_k = keep_for_sparsity(dim, policy.k_sparsity)?;
        let keep_v = keep_for_sparsity(dim, policy.v_sparsity)?;
        let mut shape =
            CacheConfig::new(config.layers, config.heads, config.kv_heads, dim, keep_k, keep_v, max_tokens)?;
        // A group is whole pages: take the largest common page size that divides it. If none does, the cache says
        // what it needs.
        let page_tokens = [64, 32, 16].into_iter().find(|n| policy.group.is_multiple_of(*n)).unwrap_or(16);
        shape.k = PageFormat::uniform(policy.values, dim, page_tokens, keep_k)?;
        shape.v = PageFormat::uniform(policy.values, dim, page_tokens, keep_v)?;
        shape.window = policy.window;
        shape.group = policy.group;
        shape.sinks = policy.sinks;
        shape.center = policy.center;
        let mut cache = Box::new(Cache::new(context, shape)?);
        let sequence = cache.create()?;
        Ok(Self {
            heads: heads(config),
            lens: vec![0; config.layers],
            kind: Kind::Pruned { cache, sequence },
        })
    }

    /// Tokens that every layer holds.
    pub fn len(&self) -> usize {
        self.lens.last().copied().unwrap_or(0)
    }

    /// Appends tokens to a layer: `k` and `v` are `[tokens, kv heads, dim]`, keys after RoPE.
    pub fn append(&mut self, layer: usize, k: &[f16], v: &[f16]) -> Result<()> {
        let Heads { kv, dim, .. } = self.heads;
        let tokens = k.len() / (kv * dim);
        match &mut self.kind {
            Kind::Dense(layers) => {
                layers[layer].0.extend_from_slice(k);
                layers[layer].1.extend_from_slice(v);
            }
            Kind::Pruned { cache, sequence } => {
                let shape = Shape::contiguous(1, tokens, kv, dim)?;
                let k = Tensor::new("k", Mem::host(k), DType::F16, shape)?;
                let v = Tensor::new("v", Mem::host(v), DType::F16, shape)?;
                cache.append(Stream::NONE, layer, *sequence, k, v)?;
            }
        }
        self.lens[layer] += tokens;
        Ok(())
    }

    /// Appends everything that a dense store holds: what prefilling into this store would have appended.
    pub fn fill_from(&mut self, dense: &Self) -> Result<()> {
        let Kind::Dense(layers) = &dense.kind else {
            return Err(Error::Invalid("only a dense store can be copied into another".to_string()));
        };
        for (layer, (k, v)) in layers.iter().enumerate() {
            self.append(layer, k, v)?;
        }
        Ok(())
    }

    /// Attention of the newest token's queries, `[q heads, dim]`, over everything in the layer.
    pub fn attend(&mut self, layer: usize, q: &[f32], out: &mut [f32]) -> Result<()> {
        match &mut self.kind {
            Kind::Dense(layers) => {
                let (k, v) = &layers[layer];
                attention::decode(self.heads, q, k, v, out);
            }
            Kind::Pruned { cache, sequence } => {
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
            Kind::Pruned { cache, sequence } => Ok(cache.len(0, *sequence)?.1),
        }
    }

    pub fn bytes(&self) -> Result<KvBytes> {
        match &self.kind {
            Kind::Dense(layers) => {
                let bytes = layers.iter().map(|(k, v)| size_of_val(&k[..]) + size_of_val(&v[..])).sum();
                Ok(KvBytes { held: bytes, dense: bytes })
            }
            Kind::Pruned { cache, sequence } => {
                let bytes = cache.sequence_bytes(*sequence)?;
                Ok(KvBytes { held: bytes.pages + bytes.window, dense: bytes.dense_equivalent })
            }
        }
    }
}
