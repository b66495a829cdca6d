//! Launches of the ops that write, read back and check pages, and of `prune`.
#![allow(unsafe_code)]

use super::args::{int32, int64, stride};
use super::kernels::{Family, Kernel, LaunchShape, STORE_WARPS, units, warps};
use super::params::{
    self, AppendParams, CompressParams, DecompressParams, PruneParams, StorePool, ValidateParams,
};
use super::{Counter, Device};
use crate::backend::Stream;
use crate::dtype::DType;
use crate::error::{Error, Result};
use crate::mem::Mem;
use crate::ops::append::{Append, AppendSide, Names};
use crate::ops::compress::Compress;
use crate::ops::decompress::Decompress;
use crate::ops::prune::{Prune, Selection, mask_bytes};
use crate::ops::validate::Validate;
use crate::pool::PoolLayout;
use crate::tensor::Shape;
use crate::variants::CHANNEL_GROUP;
use std::ptr::null_mut;

/// Tokens of one head that a warp takes: `kTileRows` of the kernels.
const TILE_ROWS: usize = 16;
/// `kValidateThreads` of the kernels.
const VALIDATE_THREADS: u32 = 256;
/// Channels that a warp of channel-direction prune takes.
const PRUNE_CHANNELS: usize = 64;

/// A pool as the kernels take it.
pub(super) fn store_pool(
    device: &Device,
    argument: &'static str,
    mem: &Mem<'_>,
    layout: &PoolLayout,
) -> Result<StorePool> {
    Ok(StorePool {
        pages: device.pages(argument, mem, layout)?.cast_mut(),
        page_stride_bytes: stride(argument, layout.num_pages, layout.page_stride)?,
        head_stride_bytes: stride(argument, layout.kv_heads, layout.head_stride)?,
        keep: int32("keep", layout.format.keep().unwrap_or(0))?,
        values_offset_bytes: int32("values_offset", layout.format.values_offset())?,
        value_type: layout.format.value_type() as i32,
        reserved: 0,
    })
}

/// The type that names the kernel for these pages: kernels of either type read 8-bit values.
pub(super) fn kernel_dtype(layout: &PoolLayout) -> DType {
    layout.format.value_type().dtype().unwrap_or(DType::F16)
}

/// One side of an append, ready to launch.
#[derive(Clone, Copy)]
struct Side {
    dtype: DType,
    dim: usize,
    weighted: bool,
    params: params::AppendSide,
}

fn append_side(device: &Device, side: &AppendSide<'_>, names: &Names) -> Result<Side> {
    let (layout, shape) = (&side.pool.layout, &side.x.shape);
    let (heads, dim) = (layout.kv_heads, layout.format.head_dim());
    let weights = heads.checked_mul(dim).ok_or(Error::Overflow { argument: names.weights })?;
    let params = params::AppendSide {
        x: device.tensor(names.x, &side.x)?.cast(),
        weights: device.read_optional(names.weights, side.weights.as_ref(), weights)?,
        center: device.center(names.center, side.center.as_ref(), heads, dim)?,
        pool: store_pool(device, names.pool, &side.pool.mem.as_ref(), layout)?,
        x_token_stride: stride(names.x, shape.tokens, shape.token_stride)?,
        x_head_stride: stride(names.x, shape.heads, shape.head_stride)?,
        center_batch: int32(names.center_batch, side.center.map_or(1, |c| c.batch))?,
        reserved: 0,
    };
    Ok(Side { dtype: side.x.dtype, dim, weighted: side.weights.is_some(), params })
}

pub(crate) fn append(device: &Device, stream: Stream, args: &Append<'_>) -> Result<()> {
    let _entered = device.context.enter()?;
    let given = || args.k.iter().chain(&args.v);
    let Some(first) = given().next() else { return Ok(()) };
    let (tokens, layout) = (first.x.shape.tokens, &first.pool.layout);
    let per_sequence = given().any(|side| side.center.is_some_and(|center| center.batch > 1));
    let sequence = args.sequence.as_ref().filter(|_| per_sequence);
    let num_slots = given().map(|side| side.pool.layout.slots()).min().unwrap_or(0);
    let [k, v] = [(&args.k, &crate::ops::append::K), (&args.v, &crate::ops::append::V)]
        .map(|(side, names)| side.as_ref().map(|side| append_side(device, side, names)).transpose());
    let (k, v) = (k?, v?);
    let units = units("tokens * kv_heads", &[tokens.div_ceil(TILE_ROWS), layout.kv_heads])?;
    let slots = device.read("slots", &args.slots, tokens)?;
    let sequence = device.read_optional("sequence", sequence, tokens)?;
    let tokens = int32("tokens", tokens)?;
    // Launches the first of the sides, or both; kernels look at the centres of both to judge a sequence.
    let launch = |sides: [&Side; 2], rows: u32, count: bool| -> Result<()> {
        let params = AppendParams {
            side: sides.map(|side| side.params),
            slots,
            sequence,
            errors: if count { device.counter(Counter::Append) } else { null_mut() },
            num_slots: int64("pool", num_slots)?,
            tokens,
            heads: int32("kv_heads", layout.kv_heads)?,
            page_tokens: int32("page_tokens", layout.format.page_tokens())?,
            reserved: 0,
        };
        let weighted = sides[..rows as usize].iter().any(|side| side.weighted);
        let family = if weighted { Family::AppendWeighted } else { Family::Append };
        let kernel = Kernel::Typed(family, sides[0].dtype, sides[0].dim);
        // SAFETY: every pointer was checked to reach as far as tokens, heads and strides go, and views promise the
        // memory until the stream has run this.
        unsafe { device.kernels.launch(kernel, warps(units, rows), stream, &params) }
    };
    match (&k, &v) {
        (Some(k), Some(v)) if (k.dtype, k.dim) == (v.dtype, v.dim) => launch([k, v], 2, true),
        (Some(k), Some(v)) => {
            launch([k, v], 1, true)?;
            launch([v, k], 1, false)
        }
        (Some(side), None) | (None, Some(side)) => launch([side, side], 1, true),
        (None, None) => Ok(()),
    }
}

pub(crate) fn prune(device: &Device, stream: Stream, args: &mut Prune<'_>) -> Result<()> {
    let _entered = device.context.enter()?;
    let (shape, dtype) = (args.x.shape, args.x.dtype);
    let tiles = shape.tokens.div_ceil(TILE_ROWS);
    let (family, keep, all_ties, factors) = match args.selection {
        Selection::Token { keep } => (Family::PruneToken, keep, 0, [tiles, 1]),
        // The dropped-th smallest is the (dim - dropped + 1)-th largest.
        Selection::TokenReferenceTies { dropped } => {
            (Family::PruneToken, shape.dim - dropped + 1, 1, [tiles, 1])
        }
        Selection::Channel { keep } => {
            let pieces = [shape.tokens / CHANNEL_GROUP, shape.dim.div_ceil(PRUNE_CHANNELS)];
            (Family::PruneChannel, keep, 0, pieces)
        }
    };
    let units = units("batch * tokens * heads", &[shape.batch, shape.heads, factors[0], factors[1]])?;
    let params = PruneParams {
        weights: match &args.token_weights {
            Some(weights) => device.read("token_weights", weights, rows("token_weights", &shape)?)?,
            None => device.read_optional("weights", args.weights.as_ref(), shape.heads * shape.dim)?,
        },
        mask: device.write_optional("mask", args.mask.as_mut(), mask_bytes(&shape)?)?,
        x_batch_stride: stride("x", shape.batch, shape.batch_stride)?,
        x_token_stride: stride("x", shape.tokens, shape.token_stride)?,
        x_head_stride: stride("x", shape.heads, shape.head_stride)?,
        batch: int32("x.batch", shape.batch)?,
        tokens: int32("x.tokens", shape.tokens)?,
        heads: int32("x.heads", shape.heads)?,
        keep: int32("selection.keep", keep)?,
        all_ties,
        reserved: 0,
        x: device.tensor_mut("x", &mut args.x)?.cast(),
    };
    let kernel = Kernel::Typed(family, dtype, shape.dim);
    // SAFETY: as in `append`.
    unsafe { device.kernels.launch(kernel, warps(units, 1), stream, &params) }
}

/// Rows of a tensor, a number.
fn rows(argument: &'static str, shape: &Shape) -> Result<usize> {
    let rows = shape.batch.checked_mul(shape.tokens).and_then(|n| n.checked_mul(shape.heads));
    rows.ok_or(Error::Overflow { argument })
}

pub(crate) fn compress(device: &Device, stream: Stream, args: &mut Compress<'_>) -> Result<()> {
    let _entered = device.context.enter()?;
    let (shape, layout) = (args.x.shape, args.pool.layout);
    let format = layout.format;
    let pages = shape.tokens.div_ceil(format.page_tokens());
    let grid = units("pages * kv_heads", &[pages, layout.kv_heads])?;
    let mask_bytes = mask_bytes(&shape)?;
    let params = CompressParams {
        x: device.tensor("x", &args.x)?.cast(),
        mask: device.read_optional("mask", args.mask.as_ref(), mask_bytes)?,
        page_numbers: device.read("pages", &args.pages, pages)?,
        needed: device.write_optional("needed", args.needed.as_mut(), grid as usize)?,
        errors: device.counter(Counter::Compress),
        pool: store_pool(device, "pool", &args.pool.mem.as_ref(), &layout)?,
        x_token_stride: stride("x", shape.tokens, shape.token_stride)?,
        x_head_stride: stride("x", shape.heads, shape.head_stride)?,
        tokens: int32("x.tokens", shape.tokens)?,
        heads: int32("x.heads", shape.heads)?,
        pages: int32("pages", pages)?,
        num_pages: int32("pool.num_pages", layout.num_pages)?,
        page_tokens: int32("page_tokens", format.page_tokens())?,
        capacity: int32("capacity", format.capacity())?,
    };
    let kernel = Kernel::Typed(Family::Compress, args.x.dtype, format.head_dim());
    let shape = LaunchShape::new([grid, 1, 1], 32 * STORE_WARPS);
    // SAFETY: as in `append`.
    unsafe { device.kernels.launch(kernel, shape, stream, &params) }
}

pub(crate) fn decompress(device: &Device, stream: Stream, args: &mut Decompress<'_>) -> Result<()> {
    let _entered = device.context.enter()?;
    let (layout, out, batch) = (args.pool.layout, args.out.shape, args.sequences.batch);
    let (format, max_len) = (layout.format, args.sequences.max_len);
    let units = units("batch * max_len * kv_heads", &[batch, max_len.div_ceil(TILE_ROWS), layout.kv_heads])?;
    let params = DecompressParams {
        pool: store_pool(device, "pool", &args.pool.mem, &layout)?,
        sequences: device.sequences(&args.sequences, &layout)?,
        center: device.center("center", args.center.as_ref(), layout.kv_heads, format.head_dim())?,
        errors: device.counter(Counter::Read),
        out_batch_stride: stride("out", out.batch, out.batch_stride)?,
        out_token_stride: stride("out", out.tokens, out.token_stride)?,
        out_head_stride: stride("out", out.heads, out.head_stride)?,
        center_batch: int32("center.batch", args.center.map_or(1, |c| c.batch))?,
        out_dtype: args.out.dtype as i32,
        batch: int32("sequences.batch", batch)?,
        heads: int32("kv_heads", layout.kv_heads)?,
        max_len: int32("sequences.max_len", max_len)?,
        num_pages: int32("pool.num_pages", layout.num_pages)?,
        capacity: int32("capacity", format.capacity())?,
        reserved: 0,
        out: device.tensor_mut("out", &mut args.out)?,
    };
    let kernel = Kernel::Typed(Family::Decompress, kernel_dtype(&layout), format.head_dim());
    // SAFETY: as in `append`.
    unsafe { device.kernels.launch(kernel, warps(units, 1), stream, &params) }
}

pub(crate) fn validate(device: &Device, stream: Stream, args: &mut Validate<'_>) -> Result<()> {
    let _entered = device.context.enter()?;
    let (layout, sequences) = (args.pool.layout, &args.sequences);
    let page_tokens = layout.format.page_tokens();
    let rows = units(
        "batch * max_len * kv_heads",
        &[sequences.batch, layout.kv_heads, sequences.max_pages(page_tokens), page_tokens],
    )?;
    let record = args.record.as_mut().ok_or(Error::NullPointer { argument: "record" })?;
    let params = ValidateParams {
        pool: store_pool(device, "pool", &args.pool.mem, &layout)?,
        sequences: device.sequences(sequences, &layout)?,
        first: device.write("record", record, 1)?,
        batch: int32("sequences.batch", sequences.batch)?,
        heads: int32("kv_heads", layout.kv_heads)?,
        max_len: int32("sequences.max_len", sequences.max_len)?,
        num_pages: int32("pool.num_pages", layout.num_pages)?,
        capacity: int32("capacity", layout.format.capacity())?,
        reserved: 0,
    };
    let kernel = Kernel::Typed(Family::Validate, kernel_dtype(&layout), layout.format.head_dim());
    let shape = LaunchShape::new([rows.div_ceil(VALIDATE_THREADS), 1, 1], VALIDATE_THREADS);
    // SAFETY: as in `append`.
    unsafe { device.kernels.launch(kernel, shape, stream, &params) }
}
