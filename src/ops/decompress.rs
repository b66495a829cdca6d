//! `decompress`: pages back to a dense tensor.

use crate::backend::{Context, Stream};
use crate::error::Result;
use crate::ops::attend::Center;
use crate::pool::{PagePool, Sequences};
use crate::tensor::TensorMut;

/// Arguments of [`decompress`].
#[derive(Debug)]
pub struct Decompress<'a> {
    /// Pages, uniform or ragged.
    pub pool: PagePool<'a>,
    /// Which pages, and how many tokens.
    pub sequences: Sequences<'a>,
    /// Centre to add back: every element becomes `round(x + c)`, dropped ones `round(c)`. `None`: dropped
    /// elements become +0.
    pub center: Option<Center<'a>>,
    /// Receives `[batch, >= max_len, kv_heads, head_dim]` in f16, bf16 or f32. Tokens past a sequence's length
    /// are not written.
    pub out: TensorMut<'a>,
}

/// Writes the dense form of the compressed tokens.
///
/// # Errors
/// Shapes, lengths above `max_len`, page numbers out of range, and rows of ragged pages that leave their page, each
/// by name.
pub fn decompress(context: &Context, stream: Stream, args: Decompress<'_>) -> Result<()> {
    let _ = (context, stream, args);
    todo!()
}
