//! `spmv_key` and `spmv_value`: the two halves of attention over compressed pages, unfused.

use crate::backend::{Context, Stream};
use crate::error::Result;
use crate::ops::attend::Center;
use crate::pool::{PagePool, Sequences};
use crate::tensor::{Tensor, TensorMut};

/// Arguments of [`spmv_key`].
#[derive(Debug)]
pub struct SpmvKey<'a> {
    /// Queries `[batch, q_len, q_heads, head_dim]`, f16, bf16 or f32.
    pub q: Tensor<'a>,
    /// Key pages.
    pub pool: PagePool<'a>,
    /// Which pages, and how many tokens.
    pub sequences: Sequences<'a>,
    /// The centre that the pages were written with.
    pub center: Option<Center<'a>>,
    /// Factor of q.k; `None`: `1 / sqrt(head_dim)`.
    pub scale: Option<f32>,
    /// Receives scores, f32 `[batch, q_len, q_heads, >= max_len]`. Tokens past a sequence's length are not written.
    pub scores: TensorMut<'a>,
}

/// Arguments of [`spmv_value`].
#[derive(Debug)]
pub struct SpmvValue<'a> {
    /// Weights of the tokens, f32 `[batch, q_len, q_heads, >= max_len]`.
    pub weights: Tensor<'a>,
    /// Value pages.
    pub pool: PagePool<'a>,
    /// Which pages, and how many tokens.
    pub sequences: Sequences<'a>,
    /// Receives `[batch, q_len, q_heads, head_dim]`, f16, bf16 or f32: the weighted sums, in float32 until stored.
    pub out: TensorMut<'a>,
}

/// `scores[b, i, h, t] = scale * (q[b, i, h] . k[b, t, h / group])` for every compressed token, no masking.
///
/// # Errors
/// Each names the argument: shapes, dtypes, heads, lengths and page numbers.
pub fn spmv_key(context: &Context, stream: Stream, args: SpmvKey<'_>) -> Result<()> {
    let _ = (context, stream, args);
    todo!()
}

/// `out[b, i, h] = sum over t of weights[b, i, h, t] * v[b, t, h / group]`.
///
/// # Errors
/// As [`spmv_key`].
pub fn spmv_value(context: &Context, stream: Stream, args: SpmvValue<'_>) -> Result<()> {
    let _ = (context, stream, args);
    todo!()
}
