//! `merge`: combine attention over two disjoint sets of tokens.

use crate::backend::{Context, Stream};
use crate::error::Result;
use crate::tensor::{Tensor, TensorMut};

/// Arguments of [`merge`]: two results of [`super::attend`] for the same queries over different tokens.
#[derive(Debug)]
pub struct Merge<'a> {
    /// First partial result `[1, tokens, heads, dim]`, f16, bf16 or f32.
    pub a: Tensor<'a>,
    /// Its log-sum-exp, f32 `[1, tokens, heads, 1]`, natural log; -inf and +inf mean "no tokens".
    pub a_lse: Tensor<'a>,
    /// Second partial result.
    pub b: Tensor<'a>,
    /// Its log-sum-exp.
    pub b_lse: Tensor<'a>,
    /// Receives the result; dtype may differ from the inputs. It must not overlap them.
    pub out: TensorMut<'a>,
    /// Receives the log-sum-exp over both, f32 `[1, tokens, heads, 1]`.
    pub lse: Option<TensorMut<'a>>,
}

/// `out = (exp(a_lse) * a + exp(b_lse) * b) / (exp(a_lse) + exp(b_lse))`, in float32 and without overflow; 0 and
/// -inf where neither side has tokens.
///
/// # Errors
/// Each names the argument: shapes and dtypes.
pub fn merge(context: &Context, stream: Stream, args: Merge<'_>) -> Result<()> {
    let _ = (context, stream, args);
    todo!()
}
