//! Scores of the strategies that look beyond magnitudes: weights for [`super::prune()`] and [`super::append()`] from
//! queries, keys and log-sum-exps.
//!
//! Equal arguments give equal bits on every backend, instruction set and number of threads, and so do the masks that are
//! made of them:
//! - Sums over rows (tokens, or queries: token by token, in each the query heads of a KV head in order) go to 32 lanes, row r
//!   to lane r mod 32 in rising order; then the upper half of the lanes is added to the lower one, until one is left.
//! - Magnitudes and squares are added up in float64, where the square of a float32 is exact.
//! - A dot product adds its channels in rising order in float32. There, and in exp and tanh, which are polynomials, each
//!   operation is rounded by itself: none are fused.

use crate::backend::{Context, Run, Stream};
use crate::cpu::score as on_cpu;
use crate::cuda;
use crate::dtype::DType;
use crate::error::{Error, Result};
use crate::mem::MemMut;
use crate::ops::attend::Center;
use crate::ops::check::{self, HostCenter};
use crate::tensor::Tensor;

/// Queries that the strategies average over.
pub const RECENT_QUERIES: usize = 32;

const FLOATS: [DType; 3] = [DType::F16, DType::Bf16, DType::F32];
const PAGED: [DType; 2] = [DType::F16, DType::Bf16];

/// Arguments of [`query_weights`].
#[derive(Debug)]
pub struct QueryWeights<'a> {
    /// Queries of one sequence after RoPE, f16, bf16 or f32 `[1, tokens >= 1, q_heads, dim]`; the strategy takes the
    /// newest 32.
    pub q: Tensor<'a>,
    /// KV heads, a divisor of q_heads.
    pub kv_heads: usize,
    /// Receives f32 `[kv_heads, dim]`.
    pub out: MemMut<'a>,
}

/// Selection weights of `Kt_Opa`: per KV head and channel the mean of abs(q) over the tokens, summed over the query
/// heads of the KV head. A NaN becomes infinity.
///
/// # Errors
/// Each names the argument: dtype, no tokens, heads that do not divide, memory too small.
pub fn query_weights(context: &Context, stream: Stream, mut args: QueryWeights<'_>) -> Result<()> {
    stream.check(context)?;
    let shape = args.q.shape;
    check_queries(&args.q, args.kv_heads)?;
    let count = product("out", args.kv_heads, shape.dim)?;
    match context.run() {
        Run::Cpu(cpu) => on_cpu::query_weights(cpu, &args.q, args.out.slice_mut("out", count)?),
        Run::Cuda(device) => cuda::query_weights(device, stream, &mut args),
    }
}

/// Arguments of [`structured_weights`].
#[derive(Debug)]
pub struct StructuredWeights<'a> {
    /// K or V of one sequence in one or two parts, f16 or bf16 `[1, tokens, kv_heads, dim]` each; together at least one
    /// token.
    pub x: &'a [Tensor<'a>],
    /// Centre that is subtracted before `x` is judged, as [`super::AppendSide::center`]; batch 1.
    pub center: Option<Center<'a>>,
    /// Queries as [`QueryWeights::q`] (think), or `None` (thinv).
    pub q: Option<Tensor<'a>>,
    /// Channels kept of each KV head, 1 to dim.
    pub keep: usize,
    /// Receives f32 `[kv_heads, dim]`.
    pub out: MemMut<'a>,
}

/// Selection weights of `think` and `thinv`: infinity for the `keep` channels of the largest mean(q^2) * mean(x^2) of each
/// KV head, 0 for the others; ties go to the lower channel. q^2 is averaged over tokens and query heads of the KV head. What
/// is compared are the products of the sums, rounded to float32; a NaN counts as infinity.
///
/// With such weights and the same `keep`, token-direction selection takes exactly these channels of every row whose
/// elements are finite.
///
/// # Errors
/// Each names the argument: dtypes, shapes that differ, no tokens, keep, centre of more than one sequence, memory too
/// small.
pub fn structured_weights(context: &Context, stream: Stream, mut args: StructuredWeights<'_>) -> Result<()> {
    stream.check(context)?;
    let (Some(first), true) = (args.x.first(), args.x.len() <= 2) else {
        return Err(Error::invalid("x", format!("{} tensors", args.x.len()), "1 or 2"));
    };
    let (heads, dim) = (first.shape.heads, first.shape.dim);
    check::head_dim("x.dim", dim)?;
    for part in args.x {
        check::dtype("x.dtype", part.dtype, &PAGED)?;
        if part.dtype != first.dtype {
            let allowed = format!("{}, as the first tensor", first.dtype);
            return Err(Error::invalid("x.dtype", part.dtype, allowed));
        }
        check::same("x.batch", part.shape.batch, 1, "one sequence")?;
        check::same("x.heads", part.shape.heads, heads, "heads of the first tensor")?;
        check::same("x.dim", part.shape.dim, dim, "dim of the first tensor")?;
    }
    if args.x.iter().all(|part| part.shape.tokens == 0) {
        return Err(Error::invalid("x.tokens", 0, "at least 1"));
    }
    if args.keep == 0 || args.keep > dim {
        return Err(Error::invalid("keep", args.keep, format!("1 to {dim} (dim)")));
    }
    if let Some(center) = &args.center {
        check::same("center.batch", center.batch, 1, "one sequence")?;
    }
    if let Some(q) = &args.q {
        check_queries(q, heads)?;
        check::same("q.dim", q.shape.dim, dim, "dim of x")?;
    }
    let count = product("out", heads, dim)?;
    match context.run() {
        Run::Cpu(cpu) => {
            let center = args.center.map(|c| HostCenter::new("center", &c, heads, dim)).transpose()?;
            let out = args.out.slice_mut("out", count)?;
            on_cpu::structured_weights(cpu, args.x, center, args.q.as_ref(), args.keep, out)
        }
        Run::Cuda(device) => cuda::structured_weights(device, stream, &mut args),
    }
}

/// Arguments of [`token_weights`].
#[derive(Debug)]
pub struct TokenWeights<'a> {
    /// Queries as [`QueryWeights::q`].
    pub q: Tensor<'a>,
    /// Natural-log log-sum-exp of each query, f32 `[1, tokens of q, q_heads, 1]`, as [`super::attend()`] gives it.
    pub lse: Tensor<'a>,
    /// Position of the newest query in its sequence; the others stand one before another.
    pub q_position: usize,
    /// Keys as the queries saw them (not centred), f16, bf16 or f32 `[1, tokens, kv_heads, dim]`.
    pub k: Tensor<'a>,
    /// Position of the first key.
    pub k_position: usize,
    /// Factor of q.k; `None`: `1 / sqrt(dim)`.
    pub scale: Option<f32>,
    /// As [`super::Attend::softcap`].
    pub softcap: Option<f32>,
    /// As [`super::Attend::sliding_window`].
    pub sliding_window: Option<usize>,
    /// Receives f32 `[tokens, kv_heads]`.
    pub out: MemMut<'a>,
}

/// Token weights of `Vc_Opa`: per token and KV head the attention weight exp(score - lse), summed over the queries that
/// see the token and over the query heads of the KV head. A weight below exp(-87.3) counts as 0, one above exp(88) and a NaN
/// as infinity.
///
/// On CUDA the log-sum-exps of [`super::attend()`] differ from those of the CPU by rounding, and so may masks then.
///
/// # Errors
/// Each names the argument: dtypes, shapes that differ, no queries, positions and scalars out of range, memory too small.
pub fn token_weights(context: &Context, stream: Stream, mut args: TokenWeights<'_>) -> Result<()> {
    stream.check(context)?;
    let (q, k) = (args.q.shape, args.k.shape);
    check_queries(&args.q, k.heads)?;
    check::dtype("k.dtype", args.k.dtype, &FLOATS)?;
    check::same("k.batch", k.batch, 1, "one sequence")?;
    check::same("k.dim", k.dim, q.dim, "dim of q")?;
    check::dtype("lse.dtype", args.lse.dtype, &[DType::F32])?;
    check::same("lse.batch", args.lse.shape.batch, 1, "one sequence")?;
    check::same("lse.tokens", args.lse.shape.tokens, q.tokens, "tokens of q")?;
    check::same("lse.heads", args.lse.shape.heads, q.heads, "heads of q")?;
    check::same("lse.dim", args.lse.shape.dim, 1, "one value per query and head")?;
    check::scalars(args.scale, args.softcap, args.sliding_window)?;
    check_position("q_position", args.q_position, q.tokens)?;
    check_position("k_position", args.k_position, k.tokens)?;
    let count = product("out", k.tokens, k.heads)?;
    match context.run() {
        Run::Cpu(cpu) => {
            let attention = on_cpu::Attention {
                q: &args.q,
                lse: args.lse.rows("lse")?,
                q_position: args.q_position as i32,
                k: &args.k,
                k_position: args.k_position as i32,
                scale: args.scale(),
                softcap: args.softcap,
                sliding_window: args.sliding_window(),
            };
            on_cpu::token_weights(cpu, &attention, args.out.slice_mut("out", count)?)
        }
        Run::Cuda(device) => cuda::token_weights(device, stream, &mut args),
    }
}

impl TokenWeights<'_> {
    pub(crate) fn scale(&self) -> f32 {
        self.scale.unwrap_or(1.0 / (self.q.shape.dim as f32).sqrt())
    }

    /// More positions than there are if it is off.
    pub(crate) fn sliding_window(&self) -> i32 {
        self.sliding_window.and_then(|n| i32::try_from(n).ok()).unwrap_or(i32::MAX)
    }
}

/// Positions are i32 in the backends.
fn check_position(argument: &'static str, position: usize, tokens: usize) -> Result<()> {
    match position.checked_add(tokens) {
        Some(n) if n <= i32::MAX as usize => Ok(()),
        _ => Err(Error::invalid(argument, format!("{position} with {tokens} tokens"), "together below 2^31")),
    }
}

fn check_queries(q: &Tensor<'_>, kv_heads: usize) -> Result<()> {
    check::dtype("q.dtype", q.dtype, &FLOATS)?;
    check::head_dim("q.dim", q.shape.dim)?;
    check::same("q.batch", q.shape.batch, 1, "one sequence")?;
    if q.shape.tokens == 0 {
        return Err(Error::invalid("q.tokens", 0, "at least 1"));
    }
    if kv_heads == 0 || q.shape.heads == 0 || !q.shape.heads.is_multiple_of(kv_heads) {
        let allowed = format!("a positive multiple of the {kv_heads} KV heads");
        return Err(Error::invalid("q.heads", q.shape.heads, allowed));
    }
    Ok(())
}

fn product(argument: &'static str, a: usize, b: usize) -> Result<usize> {
    a.checked_mul(b).ok_or(Error::Overflow { argument })
}
