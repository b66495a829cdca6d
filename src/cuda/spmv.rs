//! Launches of `spmv_key` and `spmv_value`.
#![allow(unsafe_code)]

use super::args::{int32, stride};
use super::kernels::{Family, Kernel, LaunchShape, units};
use super::params::{SpmvKeyParams, SpmvValueParams};
use super::store::{kernel_dtype, store_pool};
use super::{Counter, Device};
use crate::backend::Stream;
use crate::error::Result;
use crate::ops::spmv::{SpmvKey, SpmvValue};

/// `kKeyRows`, `kKeyTokens` and threads of a block of `spmv_key`.
const KEY_ROWS: usize = 8;
const KEY_TOKENS: usize = 128;
const KEY_THREADS: u32 = 32 * 4;
/// `kValueRows` and threads of a block of `spmv_value`.
const VALUE_ROWS: usize = 2;
const VALUE_THREADS: u32 = 32 * 12;

pub(crate) fn spmv_key(device: &Device, stream: Stream, args: &mut SpmvKey<'_>, scale: f32) -> Result<()> {
    let _entered = device.context.enter()?;
    let (layout, q, scores) = (args.pool.layout, args.q.shape, args.scores.shape);
    let (format, max_len) = (layout.format, args.sequences.max_len);
    let group = q.heads / layout.kv_heads;
    let tiles = q.tokens.saturating_mul(group).div_ceil(KEY_ROWS);
    let work = [q.batch, layout.kv_heads, tiles, max_len.div_ceil(KEY_TOKENS)];
    let grid = units("batch * heads * tokens of q * max_len", &work)?;
    let params = SpmvKeyParams {
        pool: store_pool(device, "pool", &args.pool.mem, &layout)?,
        sequences: device.sequences(&args.sequences, &layout)?,
        q: device.tensor("q", &args.q)?,
        center: device.center("center.values", args.center.as_ref(), layout.kv_heads, q.dim)?,
        errors: device.counter(Counter::Read),
        q_batch_stride: stride("q", q.batch, q.batch_stride)?,
        q_token_stride: stride("q", q.tokens, q.token_stride)?,
        q_head_stride: stride("q", q.heads, q.head_stride)?,
        scores_batch_stride: stride("scores", scores.batch, scores.batch_stride)?,
        scores_token_stride: stride("scores", scores.tokens, scores.token_stride)?,
        scores_head_stride: stride("scores", scores.heads, scores.head_stride)?,
        center_batch: int32("center.batch", args.center.map_or(1, |c| c.batch))?,
        q_dtype: args.q.dtype as i32,
        batch: int32("q.batch", q.batch)?,
        heads: int32("kv_heads", layout.kv_heads)?,
        group: int32("q.heads", group)?,
        q_len: int32("q.tokens", q.tokens)?,
        max_len: int32("sequences.max_len", max_len)?,
        num_pages: int32("pool.num_pages", layout.num_pages)?,
        capacity: int32("capacity", format.capacity())?,
        scale,
        scores: device.tensor_mut("scores", &mut args.scores)?.cast(),
    };
    let kernel = Kernel::Typed(Family::SpmvKey, kernel_dtype(&layout), format.head_dim());
    // SAFETY: every pointer was checked to reach as far as counts, strides and upper bounds go, and views promise the
    // memory until the stream has run this.
    unsafe { device.kernels.launch(kernel, LaunchShape::new([grid, 1, 1], KEY_THREADS), stream, &params) }
}

pub(crate) fn spmv_value(device: &Device, stream: Stream, args: &mut SpmvValue<'_>) -> Result<()> {
    let _entered = device.context.enter()?;
    let (layout, weights, out) = (args.pool.layout, args.weights.shape, args.out.shape);
    let format = layout.format;
    let group = weights.heads / layout.kv_heads;
    let tiles = weights.tokens.saturating_mul(group).div_ceil(VALUE_ROWS);
    let grid = units("batch * heads * tokens of weights", &[weights.batch, layout.kv_heads, tiles])?;
    let params = SpmvValueParams {
        pool: store_pool(device, "pool", &args.pool.mem, &layout)?,
        sequences: device.sequences(&args.sequences, &layout)?,
        weights: device.tensor("weights", &args.weights)?.cast(),
        errors: device.counter(Counter::Read),
        weights_batch_stride: stride("weights", weights.batch, weights.batch_stride)?,
        weights_token_stride: stride("weights", weights.tokens, weights.token_stride)?,
        weights_head_stride: stride("weights", weights.heads, weights.head_stride)?,
        out_batch_stride: stride("out", out.batch, out.batch_stride)?,
        out_token_stride: stride("out", out.tokens, out.token_stride)?,
        out_head_stride: stride("out", out.heads, out.head_stride)?,
        out_dtype: args.out.dtype as i32,
        batch: int32("weights.batch", weights.batch)?,
        heads: int32("kv_heads", layout.kv_heads)?,
        group: int32("weights.heads", group)?,
        q_len: int32("weights.tokens", weights.tokens)?,
        max_len: int32("sequences.max_len", args.sequences.max_len)?,
        num_pages: int32("pool.num_pages", layout.num_pages)?,
        capacity: int32("capacity", format.capacity())?,
        out: device.tensor_mut("out", &mut args.out)?,
    };
    let kernel = Kernel::Typed(Family::SpmvValue, kernel_dtype(&layout), format.head_dim());
    // SAFETY: as in `spmv_key`.
    unsafe { device.kernels.launch(kernel, LaunchShape::new([grid, 1, 1], VALUE_THREADS), stream, &params) }
}
