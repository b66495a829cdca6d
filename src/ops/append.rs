//! `append`: prune new tokens and store them into uniform pages, by slot.

use crate::backend::{Context, Stream};
use crate::error::Result;
use crate::mem::Mem;
use crate::ops::attend::Center;
use crate::pool::PagePoolMut;
use crate::tensor::Tensor;

/// One side (K or V) of an [`Append`].
#[derive(Debug)]
pub struct AppendSide<'a> {
    /// New tokens `[1, tokens, kv_heads, head_dim]`, dtype of the pages.
    pub x: Tensor<'a>,
    /// Destination; uniform pages.
    pub pool: PagePoolMut<'a>,
    /// Selection weights, f32 `[kv_heads, head_dim]`, each >= 0; `None`: plain magnitude.
    pub weights: Option<Mem<'a>>,
    /// Centre subtracted before selecting and storing (`x = round16(k - c)`). With a per-sequence centre,
    /// [`Append::sequence`] says which one a token uses.
    pub center: Option<Center<'a>>,
}

/// Arguments of [`append`]: K, V or both, stored at the same slots.
#[derive(Debug)]
pub struct Append<'a> {
    /// Keys.
    pub k: Option<AppendSide<'a>>,
    /// Values.
    pub v: Option<AppendSide<'a>>,
    /// Slot of each token, i64 `[tokens]`: `page * page_tokens + offset`, or -1 to skip the token.
    /// A slot given twice keeps the later token.
    pub slots: Mem<'a>,
    /// Sequence of each token, i32 `[tokens]`: row of a per-sequence centre. Required exactly when a centre has
    /// `batch > 1`.
    pub sequence: Option<Mem<'a>>,
}

/// Selects `keep` values of each row (ties to the lower channel) and writes bitmap and values at the token's slot.
/// Other slots of the page are untouched.
///
/// # Errors
/// Each names the argument: shapes or dtypes that differ, ragged pages, slot below -1 or past the pool, weights
/// negative or NaN, `sequence` missing or out of range.
pub fn append(context: &Context, stream: Stream, args: Append<'_>) -> Result<()> {
    let _ = (context, stream, args);
    todo!()
}
