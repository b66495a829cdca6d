//! Configuration of a cache.

use crate::dtype::DType;
use crate::error::{Error, Result};
use crate::format::PageFormat;

/// Whether keys are centred before they are pruned.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
#[non_exhaustive]
pub enum CenterMode {
    /// Keys are stored as they are.
    #[default]
    None,
    /// Each layer of a sequence subtracts the per-channel median of the first tokens it compresses (all tokens
    /// compressed by the first call that compresses any).
    Median,
}

/// Shape and policy of a [`super::Cache`].
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct CacheConfig {
    /// Layers, at least 1.
    pub layers: usize,
    /// Query heads, a multiple of `kv_heads`.
    pub q_heads: usize,
    /// KV heads, at least 1.
    pub kv_heads: usize,
    /// Format of key pages; uniform.
    pub k: PageFormat,
    /// Format of value pages; uniform, same page_tokens as `k`.
    pub v: PageFormat,
    /// R: the newest tokens that are never compressed, at least 1.
    pub window: usize,
    /// Tokens compressed together once the window holds `window + group`; a multiple of page_tokens.
    pub group: usize,
    /// First tokens that stay dense; 0 for none.
    pub sinks: usize,
    /// Key centre.
    pub center: CenterMode,
    /// Tokens that all live sequences together may have compressed; rounded up to whole pages.
    pub max_tokens: usize,
    /// Live sequences at most.
    pub max_sequences: usize,
}

impl CacheConfig {
    /// The defaults of this library for a model: f16 pages of 64 tokens, R = 32, group 256, 4 sinks, no centre, one
    /// sequence of `max_tokens` tokens.
    ///
    /// # Errors
    /// Unsupported `head_dim` or `keep` out of range.
    pub fn new(
        layers: usize,
        q_heads: usize,
        kv_heads: usize,
        head_dim: usize,
        keep_k: usize,
        keep_v: usize,
        max_tokens: usize,
    ) -> Result<Self> {
        Ok(Self {
            layers,
            q_heads,
            kv_heads,
            k: PageFormat::uniform(DType::F16, head_dim, 64, keep_k)?,
            v: PageFormat::uniform(DType::F16, head_dim, 64, keep_v)?,
            window: 32,
            group: 256,
            sinks: 4,
            center: CenterMode::None,
            max_tokens,
            max_sequences: 1,
        })
    }

    /// Checks every field.
    ///
    /// # Errors
    /// The first field that is out of range or contradicts another.
    pub fn check(&self) -> Result<()> {
        for (argument, n) in [("layers", self.layers), ("kv_heads", self.kv_heads), ("window", self.window)] {
            if n == 0 {
                return Err(Error::invalid(argument, n, "at least 1"));
            }
        }
        Ok(())
    }
}
