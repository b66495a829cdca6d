//! The pruning strategies by name, and what each asks of pages and scores.
//!
//! A name says direction and score: `K` or `V`, `t` (token: each row keeps its largest scores) or `c` (channel: in 32
//! consecutive tokens each channel keeps its largest), `Mag` (magnitude) or `Opa` (output-aware: magnitude times what
//! queries make of it). A [`crate::Cache`] runs any of them by itself; an engine that owns its pages computes the score
//! with [`crate::ops::score`] and hands it to [`crate::ops::prune()`] or [`crate::ops::append()`].
//!
//! ```
//! use mustafar::{Side, Strategy, ValueType};
//!
//! let strategy = Strategy::for_side("k_strategy", Side::K, "Kt_Opa")?;
//! assert_eq!(strategy.page_format(ValueType::F16, 128, 64, 0.7)?.keep(), Some(39));
//! // In channel direction rows differ, and only what 32 tokens keep together is fixed: 10 of 32 in each channel.
//! assert_eq!(Strategy::VcMag.page_format(ValueType::F16, 128, 64, 0.7)?.capacity(), 2 * 128 * 10);
//! # Ok::<(), mustafar::Error>(())
//! ```

use crate::dtype::ValueType;
use crate::error::{Error, Result};
use crate::format::PageFormat;
use crate::sparsity::keep_for_sparsity;
use crate::variants::CHANNEL_GROUP;
use std::fmt;
use std::str::FromStr;

/// Keys or values.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Side {
    /// Keys.
    K,
    /// Values.
    V,
}

/// How keys or values are chosen. `x` is an element of K or V, G the query heads of its KV head.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[repr(u32)]
#[non_exhaustive]
pub enum Strategy {
    /// `Kt_Mag`: in each row of K the largest `abs(x)`.
    KtMag = 1,
    /// `Kt_Opa`: in each row of K the largest `abs(x) * w`, w being the mean `abs(q)` of the last 32 queries, summed
    /// over G ([`crate::ops::query_weights`]). A [`crate::Cache`] takes the 32 before a compression, for all tokens that
    /// this compresses, in a prompt and in decoding alike.
    KtOpa = 2,
    /// `Kc_Mag`: in 32 consecutive tokens, each channel of K keeps its largest `abs(x)`.
    KcMag = 3,
    /// `think`: whole channels of K, chosen once by mean `q^2` (of the last 32 queries and of G) times mean `x^2` (of all
    /// tokens compressed first), as ThinK does ([`crate::ops::structured_weights`]).
    Think = 4,
    /// `Vt_Mag`: in each row of V the largest `abs(x)`.
    VtMag = 5,
    /// `Vt_Opa`: in each row of V the largest `abs(x) * a`, a being the attention the token got. Since a is one number
    /// for the whole row, the choice is that of `Vt_Mag`, which is what runs.
    VtOpa = 6,
    /// `Vc_Mag`: in 32 consecutive tokens, each channel of V keeps its largest `abs(x)`.
    VcMag = 7,
    /// `Vc_Opa`: in 32 consecutive tokens, each channel of V keeps its largest `abs(x) * a`, a being the attention the
    /// token got, summed over the last 32 queries and over G ([`crate::ops::token_weights`]).
    VcOpa = 8,
    /// `thinv`: whole channels of V, chosen once by mean `x^2` of all tokens compressed first.
    Thinv = 9,
}

impl Strategy {
    /// All of them.
    pub const ALL: [Self; 9] = [
        Self::KtMag,
        Self::KtOpa,
        Self::KcMag,
        Self::Think,
        Self::VtMag,
        Self::VtOpa,
        Self::VcMag,
        Self::VcOpa,
        Self::Thinv,
    ];

    /// The name, as [`FromStr`] reads it.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::KtMag => "Kt_Mag",
            Self::KtOpa => "Kt_Opa",
            Self::KcMag => "Kc_Mag",
            Self::Think => "think",
            Self::VtMag => "Vt_Mag",
            Self::VtOpa => "Vt_Opa",
            Self::VcMag => "Vc_Mag",
            Self::VcOpa => "Vc_Opa",
            Self::Thinv => "thinv",
        }
    }

    /// What it prunes.
    #[must_use]
    pub fn side(self) -> Side {
        match self {
            Self::KtMag | Self::KtOpa | Self::KcMag | Self::Think => Side::K,
            Self::VtMag | Self::VtOpa | Self::VcMag | Self::VcOpa | Self::Thinv => Side::V,
        }
    }

    /// The strategy of a name, for K or for V.
    ///
    /// # Errors
    /// [`Error::InvalidArgument`] naming `argument`: an unknown name, or one that prunes the other side. Both list what
    /// there is.
    pub fn for_side(argument: &'static str, side: Side, name: &str) -> Result<Self> {
        match Self::ALL.into_iter().find(|strategy| strategy.name() == name) {
            Some(strategy) => strategy.check_side(argument, side).map(|()| strategy),
            None => Err(Error::invalid(argument, format!("{name:?}"), names(Self::ALL.into_iter()))),
        }
    }

    pub(crate) fn check_side(self, argument: &'static str, side: Side) -> Result<()> {
        if self.side() == side {
            return Ok(());
        }
        let of_side = names(Self::ALL.into_iter().filter(|strategy| strategy.side() == side));
        Err(Error::invalid(
            argument,
            format!("{self}, which prunes {:?}", self.side()),
            format!("what prunes {side:?}: {of_side}"),
        ))
    }

    /// Whether tokens are ranked against each other, so that rows differ in count and pages are ragged.
    #[must_use]
    pub fn is_channel(self) -> bool {
        matches!(self, Self::KcMag | Self::VcMag | Self::VcOpa)
    }

    /// Whether whole channels are chosen, once for a sequence.
    #[must_use]
    pub fn is_structured(self) -> bool {
        matches!(self, Self::Think | Self::Thinv)
    }

    /// Whether the score needs the last queries.
    #[must_use]
    pub fn needs_queries(self) -> bool {
        matches!(self, Self::KtOpa | Self::Think | Self::VcOpa)
    }

    /// The pages that hold what is kept at a sparsity: uniform ones of `keep_for_sparsity(head_dim, sparsity)`, or in
    /// channel direction ragged ones with room for exactly `keep_for_sparsity(32, sparsity)` tokens of each channel in
    /// every 32.
    ///
    /// # Errors
    /// As [`PageFormat::uniform`] and [`keep_for_sparsity`]; pages of 16 tokens in channel direction.
    pub fn page_format(
        self,
        value_type: ValueType,
        head_dim: usize,
        page_tokens: usize,
        sparsity: f64,
    ) -> Result<PageFormat> {
        if !self.is_channel() {
            let keep = keep_for_sparsity(head_dim, sparsity)?;
            return PageFormat::uniform(value_type, head_dim, page_tokens, keep);
        }
        let keep = keep_for_sparsity(CHANNEL_GROUP, sparsity)?;
        if !page_tokens.is_multiple_of(CHANNEL_GROUP) {
            let allowed = format!("a multiple of {CHANNEL_GROUP} for {self}");
            return Err(Error::invalid("page_tokens", page_tokens, allowed));
        }
        PageFormat::ragged(value_type, head_dim, page_tokens, page_tokens / CHANNEL_GROUP * head_dim * keep)
    }

    /// What a format makes the strategy keep: values of a row, or tokens of each channel in 32.
    ///
    /// # Errors
    /// A format that [`Strategy::page_format`] does not give.
    pub(crate) fn keep(self, argument: &'static str, format: &PageFormat) -> Result<usize> {
        let found = format.rows();
        match (format.keep(), self.is_channel()) {
            (Some(keep), false) => Ok(keep),
            (Some(_), true) => {
                Err(Error::invalid(argument, format!("{found:?} with {self}"), "a ragged page format"))
            }
            (None, false) => {
                Err(Error::invalid(argument, format!("{found:?} with {self}"), "a uniform page format"))
            }
            (None, true) => {
                let one = format.page_tokens() / CHANNEL_GROUP * format.head_dim();
                let keep = format.capacity().checked_div(one).unwrap_or(0);
                if keep == 0 || keep * one != format.capacity() {
                    let allowed = format!(
                        "pages of a multiple of {CHANNEL_GROUP} tokens whose capacity is 1 to {CHANNEL_GROUP} times {one}"
                    );
                    return Err(Error::invalid(argument, format!("{found:?} with {self}"), allowed));
                }
                Ok(keep)
            }
        }
    }
}

fn names(strategies: impl Iterator<Item = Strategy>) -> String {
    strategies.map(Strategy::name).collect::<Vec<_>>().join(", ")
}

impl fmt::Display for Strategy {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

impl FromStr for Strategy {
    type Err = Error;

    fn from_str(name: &str) -> Result<Self> {
        Self::ALL
            .into_iter()
            .find(|strategy| strategy.name() == name)
            .ok_or_else(|| Error::invalid("strategy", format!("{name:?}"), names(Self::ALL.into_iter())))
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn names_are_read_back_for_their_side_only() {
        for strategy in Strategy::ALL {
            assert_eq!(strategy.name().parse(), Ok(strategy));
            assert_eq!(Strategy::for_side("s", strategy.side(), strategy.name()), Ok(strategy));
        }
        let error = Strategy::for_side("k_strategy", Side::K, "Kt_mag").unwrap_err();
        assert_eq!(
            error.to_string(),
            "k_strategy is \"Kt_mag\"; allowed: Kt_Mag, Kt_Opa, Kc_Mag, think, Vt_Mag, Vt_Opa, Vc_Mag, Vc_Opa, thinv"
        );
        let error = Strategy::for_side("k_strategy", Side::K, "Vc_Opa").unwrap_err();
        assert_eq!(
            error.to_string(),
            "k_strategy is Vc_Opa, which prunes V; allowed: what prunes K: Kt_Mag, Kt_Opa, Kc_Mag, think"
        );
        let error = Strategy::for_side("v_strategy", Side::V, "think").unwrap_err();
        assert_eq!(
            error.to_string(),
            "v_strategy is think, which prunes K; allowed: what prunes V: Vt_Mag, Vt_Opa, Vc_Mag, Vc_Opa, thinv"
        );
    }

    #[test]
    fn formats_keep_what_the_sparsity_says() {
        for strategy in Strategy::ALL {
            for page_tokens in [32, 64, 128] {
                let format = strategy.page_format(ValueType::Bf16, 96, page_tokens, 0.7).unwrap();
                let n = if strategy.is_channel() { 32 } else { 96 };
                assert_eq!(strategy.keep("k", &format), keep_for_sparsity(n, 0.7), "{strategy}");
            }
        }
        let error = Strategy::KcMag.page_format(ValueType::F16, 64, 16, 0.5).unwrap_err();
        assert_eq!(error.to_string(), "page_tokens is 16; allowed: a multiple of 32 for Kc_Mag");
    }

    #[test]
    fn formats_of_the_other_direction_are_refused() {
        let uniform = PageFormat::uniform(ValueType::F16, 64, 32, 20).unwrap();
        let ragged = |capacity| PageFormat::ragged(ValueType::F16, 64, 32, capacity).unwrap();
        let message = |result: Result<usize>| result.unwrap_err().to_string();
        assert_eq!(
            message(Strategy::VcMag.keep("v", &uniform)),
            "v is Uniform { keep: 20 } with Vc_Mag; allowed: a ragged page format"
        );
        assert_eq!(
            message(Strategy::VtMag.keep("v", &ragged(640))),
            "v is Ragged { capacity: 640 } with Vt_Mag; allowed: a uniform page format"
        );
        for capacity in [0, 639] {
            assert_eq!(
                message(Strategy::VcMag.keep("v", &ragged(capacity))),
                format!(
                    "v is Ragged {{ capacity: {capacity} }} with Vc_Mag; allowed: pages of a multiple of 32 tokens \
                     whose capacity is 1 to 32 times 64"
                )
            );
        }
        assert_eq!(Strategy::VcMag.keep("v", &ragged(640)), Ok(10));
        // A page of 16 tokens holds no whole group.
        assert!(
            Strategy::VcMag.keep("v", &PageFormat::ragged(ValueType::F16, 64, 16, 640).unwrap()).is_err()
        );
    }
}
