//! Launches of the scores of strategies.
#![allow(unsafe_code)]

use super::Device;
use super::args::{int32, stride};
use super::kernels::{Kernel, LaunchShape, grid_rows, units};
use super::params::{ChannelScoresParams, QueriesParams, QueryWeightsParams, ScoredPart, TokenWeightsParams};
use crate::backend::Stream;
use crate::error::Result;
use crate::ops::score::{QueryWeights, StructuredWeights, TokenWeights};
use crate::tensor::Tensor;
use std::ptr::null;

/// `kScoreChannels` and the threads of a block of the kernels that sum over rows.
const SCORE_CHANNELS: usize = 16;
const SCORE_THREADS: u32 = 512;
/// `kWeighedTokens`, `kWeighThreads` and what queries of a KV head a team of them takes at a time.
const WEIGHED_TOKENS: usize = 64;
const WEIGH_THREADS: u32 = 128;
const TEAM_ROWS: usize = 32;

/// Where there are no queries.
const NO_QUERIES: QueriesParams =
    QueriesParams { q: null(), token_stride: 0, head_stride: 0, tokens: 0, group: 1, dtype: 0, reserved: 0 };

fn queries(device: &Device, q: &Tensor<'_>, kv_heads: usize) -> Result<QueriesParams> {
    // Kernels count the rows of a KV head in 32 bits.
    units("q.tokens * q.heads", &[q.shape.tokens, q.shape.heads])?;
    Ok(QueriesParams {
        q: device.tensor("q", q)?,
        token_stride: stride("q", q.shape.tokens, q.shape.token_stride)?,
        head_stride: stride("q", q.shape.heads, q.shape.head_stride)?,
        tokens: int32("q.tokens", q.shape.tokens)?,
        group: int32("q.heads", q.shape.heads / kv_heads)?,
        dtype: q.dtype as i32,
        reserved: 0,
    })
}

/// A block for each 16 channels of each KV head.
fn by_channels(kv_heads: usize, dim: usize) -> Result<LaunchShape> {
    let grid = [(dim / SCORE_CHANNELS) as u32, grid_rows("kv_heads", kv_heads)?, 1];
    Ok(LaunchShape::new(grid, SCORE_THREADS))
}

pub(crate) fn query_weights(device: &Device, stream: Stream, args: &mut QueryWeights<'_>) -> Result<()> {
    let _entered = device.context.enter()?;
    let (kv_heads, dim) = (args.kv_heads, args.q.shape.dim);
    let params = QueryWeightsParams {
        queries: queries(device, &args.q, kv_heads)?,
        out: device.write("out", &mut args.out, kv_heads * dim)?,
        dim: int32("q.dim", dim)?,
        reserved: 0,
    };
    // SAFETY: the arguments were checked, and views promise their memory until the stream has run this.
    unsafe { device.kernels.launch(Kernel::QueryWeights, by_channels(kv_heads, dim)?, stream, &params) }
}

pub(crate) fn structured_weights(
    device: &Device,
    stream: Stream,
    args: &mut StructuredWeights<'_>,
) -> Result<()> {
    let _entered = device.context.enter()?;
    let (first, last) = (&args.x[0], args.x.get(1));
    let (heads, dim) = (first.shape.heads, first.shape.dim);
    let part = |x: &Tensor<'_>| {
        Ok(ScoredPart {
            x: device.tensor("x", x)?.cast(),
            token_stride: stride("x", x.shape.tokens, x.shape.token_stride)?,
            head_stride: stride("x", x.shape.heads, x.shape.head_stride)?,
            tokens: int32("x.tokens", x.shape.tokens)?,
            reserved: 0,
        })
    };
    let nothing = ScoredPart { x: null(), token_stride: 0, head_stride: 0, tokens: 0, reserved: 0 };
    let params = ChannelScoresParams {
        part: [part(first)?, last.map_or(Ok(nothing), part)?],
        queries: args.q.as_ref().map_or(Ok(NO_QUERIES), |q| queries(device, q, heads))?,
        center: device.center("center", args.center.as_ref(), heads, dim)?,
        out: device.write("out", &mut args.out, heads * dim)?,
        dim: int32("x.dim", dim)?,
        dtype: first.dtype as i32,
        keep: int32("keep", args.keep)?,
        reserved: 0,
    };
    let choose = LaunchShape::new([heads as u32, 1, 1], dim as u32);
    // SAFETY: as in `query_weights`; the second kernel works on what the first has written.
    unsafe {
        device.kernels.launch(Kernel::ChannelScores, by_channels(heads, dim)?, stream, &params)?;
        device.kernels.launch(Kernel::ChooseChannels, choose, stream, &params)
    }
}

pub(crate) fn token_weights(device: &Device, stream: Stream, args: &mut TokenWeights<'_>) -> Result<()> {
    let _entered = device.context.enter()?;
    let (k, lse) = (args.k.shape, args.lse.shape);
    let (scale, sliding_window) = (args.scale(), args.sliding_window());
    let params = TokenWeightsParams {
        queries: queries(device, &args.q, k.heads)?,
        lse: device.tensor("lse", &args.lse)?.cast(),
        k: device.tensor("k", &args.k)?,
        out: device.write("out", &mut args.out, k.tokens * k.heads)?,
        lse_token_stride: stride("lse", lse.tokens, lse.token_stride)?,
        lse_head_stride: stride("lse", lse.heads, lse.head_stride)?,
        k_token_stride: stride("k", k.tokens, k.token_stride)?,
        k_head_stride: stride("k", k.heads, k.head_stride)?,
        q_position: int32("q_position", args.q_position)?,
        k_position: int32("k_position", args.k_position)?,
        tokens: int32("k.tokens", k.tokens)?,
        kv_heads: int32("k.heads", k.heads)?,
        dim: int32("k.dim", k.dim)?,
        k_dtype: args.k.dtype as i32,
        sliding_window,
        scale,
        softcap: args.softcap.unwrap_or(0.0),
        reserved: 0,
    };
    let grid = [k.tokens.div_ceil(WEIGHED_TOKENS) as u32, grid_rows("k.heads", k.heads)?, 1];
    let teams = match (args.q.shape.tokens * args.q.shape.heads / k.heads).div_ceil(TEAM_ROWS) {
        0 | 1 => 1,
        2 => 2,
        _ => 4,
    };
    let shape = LaunchShape::new(grid, teams * WEIGH_THREADS);
    // SAFETY: as in `query_weights`.
    unsafe { device.kernels.launch(Kernel::TokenWeights, shape, stream, &params) }
}
