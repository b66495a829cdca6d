//! Copying runs of tokens between tensors.

use super::buffer::{Kept, Staging};
use crate::backend::{Context, Run, Stream};
use crate::cpu::dense::AnyRows;
use crate::cuda;
use crate::error::Result;
use crate::tensor::{Tensor, TensorMut};

/// One run of tokens: `tokens` of them, from a row (batch index) and token on to a row and token on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Place {
    pub(crate) from_row: usize,
    pub(crate) from_token: usize,
    pub(crate) to_row: usize,
    pub(crate) to_token: usize,
    pub(crate) tokens: usize,
}

/// Copies the same runs in one or two pairs of tensors of 16-bit elements with equally many heads, where a pair has the
/// same head_dim. All runs must lie inside the tensors.
pub(super) fn copy_tokens(
    context: &Context,
    staging: &mut Staging,
    stream: Stream,
    sides: &mut [(Tensor<'_>, TensorMut<'_>)],
    places: &[Place],
) -> Result<()> {
    copy(context, staging, stream, false, sides, places)
}

/// As [`copy_tokens`], from tensors of any type to tensors of f32.
pub(super) fn widen_tokens(
    context: &Context,
    staging: &mut Staging,
    stream: Stream,
    sides: &mut [(Tensor<'_>, TensorMut<'_>)],
    places: &[Place],
) -> Result<()> {
    copy(context, staging, stream, true, sides, places)
}

fn copy(
    context: &Context,
    staging: &mut Staging,
    stream: Stream,
    widened: bool,
    sides: &mut [(Tensor<'_>, TensorMut<'_>)],
    places: &[Place],
) -> Result<()> {
    for place in places {
        for (from, to) in &*sides {
            let inside = place.from_row < from.shape.batch
                && place.from_token + place.tokens <= from.shape.tokens
                && place.to_row < to.shape.batch
                && place.to_token + place.tokens <= to.shape.tokens;
            assert!(
                inside && from.shape.heads == to.shape.heads && from.shape.dim == to.shape.dim,
                "{place:?}"
            );
        }
    }
    match context.run() {
        Run::Cpu(_) if widened => sides.iter_mut().try_for_each(|(from, to)| widen_on_host(from, to, places)),
        Run::Cpu(_) => sides.iter_mut().try_for_each(|(from, to)| copy_on_host(from, to, places)),
        Run::Cuda(device) => {
            let flat = cuda::flat_places(places);
            let kept = if widened { Kept::Queries } else { Kept::Places };
            let on_device = staging.send_kept(stream, kept, &flat)?;
            cuda::copy_tokens(device, stream, widened, sides, places, &on_device)
        }
    }
}

fn copy_on_host(from: &Tensor<'_>, to: &mut TensorMut<'_>, places: &[Place]) -> Result<()> {
    let from = from.rows::<u16>("tokens")?;
    let heads = from.shape.heads;
    let mut to = to.rows_mut::<u16>("tokens")?;
    for place in places {
        for (t, h) in (0..place.tokens).flat_map(|t| (0..heads).map(move |h| (t, h))) {
            let row = from.row(place.from_row, place.from_token + t, h);
            to.row_mut(place.to_row, place.to_token + t, h).copy_from_slice(row);
        }
    }
    Ok(())
}

fn widen_on_host(from: &Tensor<'_>, to: &mut TensorMut<'_>, places: &[Place]) -> Result<()> {
    let from = AnyRows::new("tokens", from)?;
    let heads = from.shape().heads;
    let mut to = to.rows_mut::<f32>("tokens")?;
    for place in places {
        for (t, h) in (0..place.tokens).flat_map(|t| (0..heads).map(move |h| (t, h))) {
            let to = to.row_mut(place.to_row, place.to_token + t, h);
            from.load(place.from_row, place.from_token + t, h, to);
        }
    }
    Ok(())
}
