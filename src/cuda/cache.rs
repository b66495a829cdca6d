//! Launches that a cache needs besides the ops.
#![allow(unsafe_code)]

use super::Device;
use super::args::{int32, stride};
use super::kernels::{Kernel, LaunchShape, grid_rows, units, warps};
use super::params::{CopyParams, CopyPlace, CopySide, MedianParams, MedianPart};
use crate::backend::Stream;
use crate::cache::Place;
use crate::error::Result;
use crate::mem::{Mem, MemMut};
use crate::tensor::{Tensor, TensorMut};

/// `kMedianChannels` and `kMedianThreads` of the kernel.
const MEDIAN_CHANNELS: usize = 32;
const MEDIAN_THREADS: u32 = 512;

/// The places as the kernel reads them, flat.
pub(crate) fn flat_places(places: &[Place]) -> Vec<i32> {
    places
        .iter()
        .flat_map(|p| [p.from_row, p.from_token, p.to_row, p.to_token, p.tokens])
        .map(|n| n as i32)
        .collect()
}

/// Copies runs of tokens in one or two pairs of tensors: of 16-bit elements as they are, or `widened` from any type to f32.
/// `places` are checked by the caller; `on_device` holds them as [`flat_places`] makes them.
pub(crate) fn copy_tokens(
    device: &Device,
    stream: Stream,
    widened: bool,
    sides: &mut [(Tensor<'_>, TensorMut<'_>)],
    places: &[Place],
    on_device: &Mem<'_>,
) -> Result<()> {
    let _entered = device.context.enter()?;
    let heads = sides[0].0.shape.heads;
    let max_tokens = places.iter().map(|place| place.tokens).max().unwrap_or(0);
    let units = units("tokens * heads", &[places.len(), max_tokens, heads])?;
    let side = |(from, to): &mut (Tensor<'_>, TensorMut<'_>)| {
        let (a, b) = (from.shape, to.shape);
        Ok::<_, crate::Error>(CopySide {
            from: device.tensor("from", from)?,
            from_row_stride: stride("from", a.batch, a.batch_stride)?,
            from_token_stride: stride("from", a.tokens, a.token_stride)?,
            from_head_stride: stride("from", a.heads, a.head_stride)?,
            to_row_stride: stride("to", b.batch, b.batch_stride)?,
            to_token_stride: stride("to", b.tokens, b.token_stride)?,
            to_head_stride: stride("to", b.heads, b.head_stride)?,
            dim: int32("dim", a.dim)?,
            from_dtype: from.dtype as i32,
            to: device.tensor_mut("to", to)?,
        })
    };
    let rows = sides.len() as u32;
    let sides = sides.iter_mut().map(side).collect::<Result<Vec<_>>>()?;
    let (Some(&first), Some(&last)) = (sides.first(), sides.last()) else { return Ok(()) };
    let params = CopyParams {
        side: [first, last],
        places: device.read::<i32>("places", on_device, 5 * places.len())?.cast::<CopyPlace>(),
        num_places: int32("places", places.len())?,
        max_tokens: int32("tokens", max_tokens)?,
        heads: int32("heads", heads)?,
        reserved: 0,
    };
    let kernel = if widened { Kernel::Widen } else { Kernel::Copy };
    // SAFETY: the tensors reach as far as the places go, which the caller has checked, and views promise the memory
    // until the stream has run this.
    unsafe { device.kernels.launch(kernel, warps(units, rows), stream, &params) }
}

/// Writes the lower median of each channel over the tokens of both parts to `out`, f32 `[heads, dim]`; as
/// `cpu::median`, to the bit.
pub(crate) fn median(
    device: &Device,
    stream: Stream,
    parts: &[Tensor<'_>; 2],
    mut out: MemMut<'_>,
) -> Result<()> {
    let _entered = device.context.enter()?;
    let (heads, dim, dtype) = (parts[0].shape.heads, parts[0].shape.dim, parts[0].dtype);
    let part = |x: &Tensor<'_>| {
        Ok::<_, crate::Error>(MedianPart {
            x: device.tensor("k", x)?.cast(),
            token_stride: stride("k", x.shape.tokens, x.shape.token_stride)?,
            head_stride: stride("k", x.shape.heads, x.shape.head_stride)?,
            tokens: int32("k.tokens", x.shape.tokens)?,
            reserved: 0,
        })
    };
    let params = MedianParams {
        part: [part(&parts[0])?, part(&parts[1])?],
        out: device.write("center", &mut out, heads * dim)?,
        dim: int32("k.dim", dim)?,
        dtype: dtype as i32,
    };
    let grid = [(dim / MEDIAN_CHANNELS) as u32, grid_rows("k.heads", heads)?, 1];
    // SAFETY: as in `copy_tokens`.
    unsafe { device.kernels.launch(Kernel::Median, LaunchShape::new(grid, MEDIAN_THREADS), stream, &params) }
}
