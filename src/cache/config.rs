//! Configuration of a cache.

use super::geometry::Geometry;
use crate::dtype::{DType, ValueType};
use crate::error::{Error, Result};
use crate::format::PageFormat;
use crate::strategy::{Side, Strategy};
use std::ops::Range;

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

/// Page formats of some heads of some layers, in place of those of the whole cache. A head is left dense by a format that
/// keeps everything: `keep` = head_dim, or in channel direction 32 of 32 tokens. [`crate::ops::attend_advice`] says what that
/// costs: in 16 bits attention over such pages is slower than over dense tokens.
///
/// Dense means that nothing is dropped, not that values are exact: a cache has one value type for K and one for V, so in a
/// cache of 8-bit values a head left dense has 8-bit values too, with a scale per row.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct HeadFormats {
    /// Layers, not empty.
    pub layers: Range<usize>,
    /// KV heads, not empty.
    pub heads: Range<usize>,
    /// Format of key pages; of [`CacheConfig::k`] only the number kept may differ.
    pub k: PageFormat,
    /// Format of value pages; likewise.
    pub v: PageFormat,
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
    /// How keys are chosen.
    pub k_strategy: Strategy,
    /// How values are chosen.
    pub v_strategy: Strategy,
    /// Format of key pages, which says how many are kept: as [`Strategy::page_format`] gives it, uniform in token
    /// direction, ragged in channel direction.
    pub k: PageFormat,
    /// Format of value pages; likewise, same page_tokens as `k`.
    pub v: PageFormat,
    /// Type of the tokens that pages of 8-bit values are made from, f16 or bf16. For pages of 16-bit values tokens have
    /// the type of these.
    pub scaled_from: DType,
    /// Layers and heads whose pages have other formats: more kept, or less. Of several that name a head the last counts.
    pub overrides: Vec<HeadFormats>,
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
    /// The defaults of this library for a model: magnitude in token direction, f16 pages of 64 tokens, R = 32, group 256, 4 sinks, no centre, one
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
            k_strategy: Strategy::KtMag,
            v_strategy: Strategy::VtMag,
            k: PageFormat::uniform(ValueType::F16, head_dim, 64, keep_k)?,
            v: PageFormat::uniform(ValueType::F16, head_dim, 64, keep_v)?,
            scaled_from: DType::F16,
            overrides: Vec::new(),
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
        self.k_strategy.check_side("k_strategy", Side::K)?;
        self.v_strategy.check_side("v_strategy", Side::V)?;
        self.k_strategy.keep("k", &self.k)?;
        self.v_strategy.keep("v", &self.v)?;
        if self.scaled_from == DType::F32 {
            return Err(Error::invalid("scaled_from", self.scaled_from, "f16, bf16"));
        }
        let page_tokens = self.k.page_tokens();
        if self.v.page_tokens() != page_tokens {
            let allowed = format!("that of k ({page_tokens})");
            return Err(Error::invalid("v.page_tokens", self.v.page_tokens(), allowed));
        }
        self.overrides.iter().try_for_each(|formats| self.check_override(formats))?;
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

    fn check_override(&self, formats: &HeadFormats) -> Result<()> {
        let ranges = [
            ("overrides.layers", &formats.layers, self.layers),
            ("overrides.heads", &formats.heads, self.kv_heads),
        ];
        for (argument, range, end) in ranges {
            if range.is_empty() || range.end > end {
                return Err(Error::invalid(
                    argument,
                    format!("{range:?}"),
                    format!("not empty, within 0..{end}"),
                ));
            }
        }
        self.k_strategy.keep("overrides.k", &formats.k)?;
        self.v_strategy.keep("overrides.v", &formats.v)?;
        let sides = [("overrides.k", formats.k, self.k), ("overrides.v", formats.v, self.v)];
        for (argument, found, all) in sides {
            let of = |f: PageFormat| {
                format!("{} of {} tokens x {}", f.value_type(), f.page_tokens(), f.head_dim())
            };
            if of(found) != of(all) {
                return Err(Error::invalid(argument, of(found), format!("{}, as everywhere else", of(all))));
            }
        }
        Ok(())
    }

    /// Formats of K and V pages of a head.
    pub(super) fn formats(&self, layer: usize, head: usize) -> (PageFormat, PageFormat) {
        let mut overrides = self.overrides.iter().rev();
        let own = overrides.find(|o| o.layers.contains(&layer) && o.heads.contains(&head));
        own.map_or((self.k, self.v), |own| (own.k, own.v))
    }

    /// Whether some pages are filled tokens of 32 at a time.
    pub(super) fn is_channel(&self) -> bool {
        self.k_strategy.is_channel() || self.v_strategy.is_channel()
    }

    /// Whether a score needs the last queries.
    pub(super) fn needs_queries(&self) -> bool {
        self.k_strategy.needs_queries() || self.v_strategy.needs_queries()
    }

    /// Type of the tokens that pages of this format, `k` or `v`, are made from; also that of window and sinks.
    #[must_use]
    pub fn dtype(&self, format: PageFormat) -> DType {
        format.value_type().dtype().unwrap_or(self.scaled_from)
    }
}
