//! Configuration of a cache.

use crate::dtype::{DType, ValueType};
use crate::error::{Error, Result};
use crate::format::PageFormat;
use crate::pool::PoolLayout;

/// Whether keys are centred before they are pruned.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
#[non_exhaustive]
pub enum CenterMode {
    /// Keys are stored as they are.
    #[default]
    None,
    /// Each layer of a sequence subtracts the per-channel median of the first tokens it compresses (all tokens
    /// compressed by the first call that compresses any). Of an even number of tokens it is the lower median, the
    /// smaller of the two values in the middle, which the value type holds exactly.
    Median,
}

impl CenterMode {
    /// The number that snapshots store; never reused.
    pub(super) fn code(self) -> u64 {
        match self {
            Self::None => 0,
            Self::Median => 1,
        }
    }
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
    /// Type of the tokens that pages of 8-bit values are made from, f16 or bf16. For pages of 16-bit values tokens have
    /// the type of these.
    pub scaled_from: DType,
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
            k: PageFormat::uniform(ValueType::F16, head_dim, 64, keep_k)?,
            v: PageFormat::uniform(ValueType::F16, head_dim, 64, keep_v)?,
            scaled_from: DType::F16,
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
    /// The first field that is out of range or contradicts another; [`Error::Overflow`] when the cache would have
    /// 2^64 bytes or more.
    pub fn check(&self) -> Result<()> {
        let positive = [
            ("layers", self.layers),
            ("kv_heads", self.kv_heads),
            ("q_heads", self.q_heads),
            ("window", self.window),
            ("max_tokens", self.max_tokens),
            ("max_sequences", self.max_sequences),
        ];
        for (argument, n) in positive {
            if n == 0 {
                return Err(Error::invalid(argument, n, "at least 1"));
            }
        }
        if !self.q_heads.is_multiple_of(self.kv_heads) {
            let allowed = format!("a multiple of kv_heads ({})", self.kv_heads);
            return Err(Error::invalid("q_heads", self.q_heads, allowed));
        }
        for (argument, format) in [("k", self.k), ("v", self.v)] {
            if format.keep().is_none() {
                return Err(Error::invalid(argument, "a ragged page format", "uniform page formats"));
            }
        }
        if self.scaled_from == DType::F32 {
            return Err(Error::invalid("scaled_from", self.scaled_from, "f16, bf16"));
        }
        let page_tokens = self.k.page_tokens();
        if self.v.page_tokens() != page_tokens {
            let allowed = format!("that of k ({page_tokens})");
            return Err(Error::invalid("v.page_tokens", self.v.page_tokens(), allowed));
        }
        if self.group == 0 || !self.group.is_multiple_of(page_tokens) {
            let allowed = format!("a positive multiple of page_tokens ({page_tokens})");
            return Err(Error::invalid("group", self.group, allowed));
        }
        // Block tables, rows and lengths are i32 in the ops.
        let longest = [self.sinks, self.window, self.group, page_tokens - 1, self.max_tokens]
            .into_iter()
            .try_fold(0usize, usize::checked_add);
        if longest.is_none_or(|n| n > i32::MAX as usize) {
            let found = format!(
                "{} with {} sinks, window {} and group {}",
                self.max_tokens, self.sinks, self.window, self.group
            );
            return Err(Error::invalid("max_tokens", found, "together below 2^31"));
        }
        if self.max_sequences > i32::MAX as usize {
            return Err(Error::invalid("max_sequences", self.max_sequences, "below 2^31"));
        }
        Geometry::new(self).map(|_| ())
    }

    /// Type of the tokens that pages of this format, `k` or `v`, are made from; also that of window and sinks.
    #[must_use]
    pub fn dtype(&self, format: PageFormat) -> DType {
        format.value_type().dtype().unwrap_or(self.scaled_from)
    }
}

/// Sizes that follow from a configuration, in bytes unless said otherwise.
#[derive(Debug, Clone, Copy)]
pub(super) struct Geometry {
    /// Pages of each layer, a number.
    pub(super) num_pages: usize,
    /// Layouts of the K and V pages of one layer.
    pub(super) layouts: (PoolLayout, PoolLayout),
    /// One page number in one layer: K and V pages of all heads.
    pub(super) page: usize,
    /// All pages of one layer.
    pub(super) layer_pages: usize,
    /// All pages.
    pub(super) pages: usize,
    /// One dense token of one layer: K and V of all heads.
    pub(super) token: usize,
    /// The centre of one layer of one sequence; 0 without centre.
    pub(super) center: usize,
    /// All centres.
    pub(super) centers: usize,
    /// Everything but the workspace.
    pub(super) total: usize,
}

impl Geometry {
    fn new(config: &CacheConfig) -> Result<Self> {
        let product = |argument, factors: &[usize]| {
            factors.iter().try_fold(1usize, |a, &b| a.checked_mul(b)).ok_or(Error::Overflow { argument })
        };
        let num_pages = config.max_tokens.div_ceil(config.k.page_tokens());
        let layouts = PoolLayout::pair(config.k, config.v, num_pages, config.kv_heads)?;
        let page = layouts.0.page_stride;
        let layer_pages = product("max_tokens", &[num_pages, page])?;
        let row = |format: PageFormat| format.head_dim() * config.dtype(format).bytes();
        let token = product("kv_heads", &[config.kv_heads, row(config.k) + row(config.v)])?;
        let center = match config.center {
            CenterMode::None => 0,
            CenterMode::Median => {
                product("kv_heads", &[config.kv_heads, config.k.head_dim(), size_of::<f32>()])?
            }
        };
        let pages = product("layers", &[config.layers, layer_pages])?;
        let dense = config.sinks + config.window + config.group;
        let dense = product("max_sequences", &[config.layers, config.max_sequences, dense, token])?;
        let centers = product("max_sequences", &[config.layers, config.max_sequences, center])?;
        let total = pages
            .checked_add(dense)
            .and_then(|n| n.checked_add(centers))
            .ok_or(Error::Overflow { argument: "layers" })?;
        Ok(Self { num_pages, layouts, page, layer_pages, pages, token, center, centers, total })
    }

    /// Byte offset of the centre of a layer of the sequence in this row.
    pub(super) fn center_at(&self, config: &CacheConfig, layer: usize, row: usize) -> usize {
        (layer * config.max_sequences + row) * self.center
    }

    /// The sizes of a configuration after all its checks.
    pub(super) fn checked(config: &CacheConfig) -> Result<Self> {
        config.check()?;
        Self::new(config)
    }
}
