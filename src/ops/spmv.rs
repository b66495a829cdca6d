//! `spmv_key` and `spmv_value`: the two halves of attention over compressed pages, unfused.

use crate::backend::{Context, Run, Stream};
use crate::cpu::dense::{AnyRows, AnyRowsMut};
use crate::cpu::spmv::{self, Source};
use crate::cuda;
use crate::dtype::DType;
use crate::error::{Error, Result};
use crate::ops::attend::Center;
use crate::ops::check::{self, HostCenter, HostSequences};
use crate::pool::{PagePool, PoolLayout, Sequences};
use crate::tensor::{Shape, Tensor, TensorMut};

const FLOATS: [DType; 3] = [DType::F16, DType::Bf16, DType::F32];

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
/// Each names the argument: shapes, dtypes, heads; on the CPU lengths and page numbers out of range and rows of ragged
/// pages that leave their page. CUDA counts these ([`Context::take_device_errors`]): scores of tokens without a page
/// are not written, damaged rows count as +0.
pub fn spmv_key(context: &Context, stream: Stream, mut args: SpmvKey<'_>) -> Result<()> {
    stream.check(context)?;
    let (layout, q) = (&args.pool.layout, &args.q.shape);
    check::dtype("q.dtype", args.q.dtype, &FLOATS)?;
    check::dtype("scores.dtype", args.scores.dtype, &[DType::F32])?;
    check::same("q.dim", q.dim, layout.format.head_dim(), "head_dim of the pages")?;
    shapes(["q.batch", "q.heads"], q, &args.sequences, layout)?;
    let scores = &args.scores.shape;
    same_rows(["scores.batch", "scores.tokens", "scores.heads"], scores, q, "as q")?;
    long_enough("scores.dim", scores, &args.sequences)?;
    if let Some(center) = &args.center {
        check::center_batch("center.batch", center, args.sequences.batch)?;
    }
    let scale = args.scale.unwrap_or(1.0 / (q.dim as f32).sqrt());
    if !scale.is_finite() {
        return Err(Error::invalid("scale", scale, "a finite number"));
    }
    match context.run() {
        Run::Cpu(cpu) => {
            let source = source(&args.pool, &args.sequences)?;
            let center = |c| HostCenter::new("center.values", c, layout.kv_heads, q.dim);
            let center = args.center.as_ref().map(center).transpose()?;
            let q = AnyRows::new("q", &args.q)?;
            spmv::key(cpu, source, q, center, scale, args.scores.rows_mut("scores")?);
            Ok(())
        }
        Run::Cuda(device) => cuda::spmv_key(device, stream, &mut args, scale),
    }
}

/// `out[b, i, h] = sum over t of weights[b, i, h, t] * v[b, t, h / group]`.
///
/// # Errors
/// As [`spmv_key`]; on CUDA tokens without a page count as no tokens.
pub fn spmv_value(context: &Context, stream: Stream, mut args: SpmvValue<'_>) -> Result<()> {
    stream.check(context)?;
    let (layout, weights) = (&args.pool.layout, &args.weights.shape);
    check::dtype("weights.dtype", args.weights.dtype, &[DType::F32])?;
    check::dtype("out.dtype", args.out.dtype, &FLOATS)?;
    shapes(["weights.batch", "weights.heads"], weights, &args.sequences, layout)?;
    long_enough("weights.dim", weights, &args.sequences)?;
    same_rows(["out.batch", "out.tokens", "out.heads"], &args.out.shape, weights, "as weights")?;
    check::same("out.dim", args.out.shape.dim, layout.format.head_dim(), "head_dim of the pages")?;
    match context.run() {
        Run::Cpu(cpu) => {
            let source = source(&args.pool, &args.sequences)?;
            let weights = args.weights.rows("weights")?;
            spmv::value(cpu, source, weights, AnyRowsMut::new("out", &mut args.out)?);
            Ok(())
        }
        Run::Cuda(device) => cuda::spmv_value(device, stream, &mut args),
    }
}

/// What the inputs of both ops share.
fn shapes(
    [batch, heads]: [&'static str; 2],
    shape: &Shape,
    sequences: &Sequences<'_>,
    layout: &PoolLayout,
) -> Result<()> {
    check::same(batch, shape.batch, sequences.batch, "batch of sequences")?;
    if shape.heads == 0 || layout.kv_heads == 0 || !shape.heads.is_multiple_of(layout.kv_heads) {
        let allowed = format!("a positive multiple of the {} KV heads", layout.kv_heads);
        return Err(Error::invalid(heads, shape.heads, allowed));
    }
    check::sequences(sequences, layout)
}

fn same_rows(
    [batch, tokens, heads]: [&'static str; 3],
    shape: &Shape,
    expected: &Shape,
    source: &str,
) -> Result<()> {
    check::same(batch, shape.batch, expected.batch, source)?;
    check::same(tokens, shape.tokens, expected.tokens, source)?;
    check::same(heads, shape.heads, expected.heads, source)
}

fn long_enough(argument: &'static str, shape: &Shape, sequences: &Sequences<'_>) -> Result<()> {
    if shape.dim < sequences.max_len {
        return Err(Error::invalid(argument, shape.dim, format!("at least max_len ({})", sequences.max_len)));
    }
    Ok(())
}

fn source<'a>(pool: &PagePool<'a>, sequences: &Sequences<'a>) -> Result<Source<'a>> {
    Ok(Source { pages: pool.pages("pool")?, sequences: HostSequences::new(sequences, &pool.layout)? })
}
