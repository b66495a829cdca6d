//! `merge`: combine attention over two disjoint sets of tokens.

use crate::backend::{Context, Run, Stream};
use crate::cpu::dense::{AnyRows, AnyRowsMut};
use crate::cpu::merge::{self, Part};
use crate::cuda;
use crate::dtype::DType;
use crate::error::{Error, Result};
use crate::format::list;
use crate::ops::check;
use crate::tensor::{Shape, Tensor, TensorMut};
use crate::variants::HEAD_DIMS;

const FLOATS: [DType; 3] = [DType::F16, DType::Bf16, DType::F32];

/// Arguments of [`merge`]: two results of [`super::attend()`] for the same queries over different tokens.
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
pub fn merge(context: &Context, stream: Stream, mut args: Merge<'_>) -> Result<()> {
    stream.check(context)?;
    let shape = args.a.shape;
    check::same("a.batch", shape.batch, 1, "queries of all sequences are packed in one")?;
    if !HEAD_DIMS.contains(&shape.dim) {
        return Err(Error::unsupported("a.dim", shape.dim, list(&HEAD_DIMS)));
    }
    let rows = Shape { dim: 1, ..shape };
    check::dtype("a.dtype", args.a.dtype, &FLOATS)?;
    check::dtype("b.dtype", args.b.dtype, &FLOATS)?;
    check::dtype("out.dtype", args.out.dtype, &FLOATS)?;
    same(["b.batch", "b.tokens", "b.heads", "b.dim"], &args.b.shape, &shape)?;
    same(["out.batch", "out.tokens", "out.heads", "out.dim"], &args.out.shape, &shape)?;
    check::dtype("a_lse.dtype", args.a_lse.dtype, &[DType::F32])?;
    check::dtype("b_lse.dtype", args.b_lse.dtype, &[DType::F32])?;
    same(["a_lse.batch", "a_lse.tokens", "a_lse.heads", "a_lse.dim"], &args.a_lse.shape, &rows)?;
    same(["b_lse.batch", "b_lse.tokens", "b_lse.heads", "b_lse.dim"], &args.b_lse.shape, &rows)?;
    if let Some(lse) = &args.lse {
        check::dtype("lse.dtype", lse.dtype, &[DType::F32])?;
        same(["lse.batch", "lse.tokens", "lse.heads", "lse.dim"], &lse.shape, &rows)?;
    }
    match context.run() {
        Run::Cpu(_) => {
            let a = Part { x: AnyRows::new("a", &args.a)?, lse: args.a_lse.rows("a_lse")? };
            let b = Part { x: AnyRows::new("b", &args.b)?, lse: args.b_lse.rows("b_lse")? };
            let lse = args.lse.as_mut().map(|lse| lse.rows_mut("lse")).transpose()?;
            merge::merge(&shape, a, b, AnyRowsMut::new("out", &mut args.out)?, lse);
            Ok(())
        }
        Run::Cuda(device) => cuda::merge(device, stream, &mut args),
    }
}

/// Sizes as those of `a`; a log-sum-exp has one value per row.
fn same(names: [&'static str; 4], found: &Shape, expected: &Shape) -> Result<()> {
    let [batch, tokens, heads, dim] = names;
    check::same(batch, found.batch, expected.batch, "as a")?;
    check::same(tokens, found.tokens, expected.tokens, "tokens of a")?;
    check::same(heads, found.heads, expected.heads, "heads of a")?;
    check::same(
        dim,
        found.dim,
        expected.dim,
        if expected.dim == 1 { "one value per row" } else { "dim of a" },
    )
}
