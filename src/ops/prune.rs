//! `prune`: zero what a strategy drops, in place on a dense tensor.

use crate::backend::{Context, Stream};
use crate::error::Result;
use crate::mem::{Mem, MemMut};
use crate::tensor::TensorMut;

/// Which elements survive.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum Selection {
    /// Token direction: the `keep` largest scores of each row of `dim` channels; ties go to the lower channel.
    Token {
        /// Values kept per row, 1 to dim.
        keep: usize,
    },
    /// Token direction as the original Mustafar prunes: every magnitude of at least the `dropped`-th smallest, so
    /// ties are all kept and rows differ in count. See [`crate::reference_keep`] for the usual count.
    TokenReferenceTies {
        /// The k of kthvalue, 1 to dim: `max(1, floor(sparsity * dim))`.
        dropped: usize,
    },
    /// Channel direction: in each group of 32 consecutive tokens, each channel keeps its `keep` largest
    /// magnitudes; ties go to the older token.
    Channel {
        /// Tokens kept per channel and group, 1 to 32.
        keep: usize,
    },
}

/// Arguments of [`prune`].
#[derive(Debug)]
pub struct Prune<'a> {
    /// f16 or bf16 `[batch, tokens, heads, dim]`, changed in place: dropped elements become +0.
    /// For [`Selection::Channel`] tokens must be a multiple of 32.
    pub x: TensorMut<'a>,
    /// Which elements survive. Magnitudes compare by bit pattern, so NaN outranks everything.
    pub selection: Selection,
    /// Selection weights, f32 `[heads, dim]`, each >= 0: the score is `abs(x) * w` in f32 (token direction only,
    /// not with reference ties). `None`: plain magnitude.
    pub weights: Option<Mem<'a>>,
    /// Receives the mask, contiguous `[batch, tokens, heads, dim / 8]` bytes, bit c % 8 of byte c / 8 for channel c.
    pub mask: Option<MemMut<'a>>,
}

/// Zeroes what `selection` drops.
///
/// # Errors
/// Each names the argument: dtype or dim unsupported, keep out of range, tokens no multiple of the group, weights
/// negative or NaN or given where they do not apply, mask too small.
pub fn prune(context: &Context, stream: Stream, args: Prune<'_>) -> Result<()> {
    let _ = (context, stream, args);
    todo!()
}
