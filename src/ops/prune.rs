//! `prune`: zero what a strategy drops, in place on a dense tensor.

use crate::backend::{Context, Run, Stream};
use crate::cpu::prune::{self as on_cpu, Rule};
use crate::cuda;
use crate::dtype::DType;
use crate::error::{Error, Result};
use crate::mem::{Mem, MemMut};
use crate::ops::check;
use crate::tensor::{Shape, TensorMut};
use crate::variants::CHANNEL_GROUP;

/// Which elements survive.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum Selection {
    /// Token direction: the `keep` largest scores of each row of `dim` channels; ties go to the lower channel.
    Token {
        /// Values kept per row, 1 to dim.
        keep: usize,
    },
    /// Token direction as the original Mustafar prunes: every magnitude of at least the `dropped`-th smallest, so
    /// ties are all kept and rows differ in count. See [`crate::reference_keep`] for the usual count.
    TokenReferenceTies {
        /// The k of kthvalue, 1 to dim: `max(1, floor(sparsity * dim))`.
        dropped: usize,
    },
    /// Channel direction: in each group of 32 consecutive tokens, each channel keeps its `keep` largest
    /// magnitudes; ties go to the older token.
    Channel {
        /// Tokens kept per channel and group, 1 to 32.
        keep: usize,
    },
}

/// Arguments of [`prune`].
#[derive(Debug)]
pub struct Prune<'a> {
    /// f16 or bf16 `[batch, tokens, heads, dim]`, changed in place: dropped elements become +0.
    /// For [`Selection::Channel`] tokens must be a multiple of 32.
    pub x: TensorMut<'a>,
    /// Which elements survive. Magnitudes compare by bit pattern, so NaN outranks everything.
    pub selection: Selection,
    /// Selection weights, f32 `[heads, dim]`, each >= 0: the score is `abs(x) * w` in f32 (token direction only,
    /// not with reference ties). All NaN scores are equal and outrank everything. `None`: plain magnitude.
    pub weights: Option<Mem<'a>>,
    /// Token weights, f32 `[batch, tokens, heads]`, each >= 0: the score is `abs(x) * w` in f32 (channel direction only;
    /// [`super::token_weights`] computes those of `Vc_Opa`). NaN scores as above. `None`: plain magnitude.
    pub token_weights: Option<Mem<'a>>,
    /// Receives the mask, contiguous `[batch, tokens, heads, dim / 8]` bytes, bit c % 8 of byte c / 8 for channel c.
    pub mask: Option<MemMut<'a>>,
}

/// Zeroes what `selection` drops.
///
/// # Errors
/// Each names the argument: dtype or dim unsupported, keep out of range, tokens no multiple of the group, weights
/// given where they do not apply or, on the CPU, negative or NaN, mask too small.
pub fn prune(context: &Context, stream: Stream, mut args: Prune<'_>) -> Result<()> {
    stream.check(context)?;
    check_shapes(&args)?;
    match context.run() {
        Run::Cpu(cpu) => {
            let shape = args.x.shape;
            if shape.extent("x")? == 0 {
                return Ok(());
            }
            let weights =
                args.weights.map(|w| check::weights("weights", &w, shape.heads, shape.dim)).transpose()?;
            let token_weights = args.token_weights.map(|w| {
                let rows = shape
                    .batch
                    .checked_mul(shape.tokens)
                    .ok_or(Error::Overflow { argument: "token_weights" })?;
                check::weights("token_weights", &w, rows, shape.heads)
            });
            let token_weights = token_weights.transpose()?;
            let mask_bytes = mask_bytes(&shape)?;
            let mask = args.mask.as_mut().map(|mask| mask.slice_mut("mask", mask_bytes)).transpose()?;
            let rule = Rule { dtype: args.x.dtype, selection: args.selection, weights };
            on_cpu::prune(cpu, rule, args.x.rows_mut("x")?, token_weights, mask);
            Ok(())
        }
        Run::Cuda(device) => cuda::prune(device, stream, &mut args),
    }
}

fn check_shapes(args: &Prune<'_>) -> Result<()> {
    let shape = args.x.shape;
    check::dtype("x.dtype", args.x.dtype, &[DType::F16, DType::Bf16])?;
    check::head_dim("x.dim", shape.dim)?;
    let (argument, count, most, of) = match args.selection {
        Selection::Token { keep } => ("selection.keep", keep, shape.dim, "x.dim"),
        Selection::TokenReferenceTies { dropped } => ("selection.dropped", dropped, shape.dim, "x.dim"),
        Selection::Channel { keep } => ("selection.keep", keep, CHANNEL_GROUP, "tokens of a group"),
    };
    if count == 0 || count > most {
        return Err(Error::invalid(argument, count, format!("1 to {most} ({of})")));
    }
    let channel_direction = matches!(args.selection, Selection::Channel { .. });
    if channel_direction && !shape.tokens.is_multiple_of(CHANNEL_GROUP) {
        let allowed = format!("a multiple of {CHANNEL_GROUP} in channel direction");
        return Err(Error::invalid("x.tokens", shape.tokens, allowed));
    }
    if args.weights.is_some() && !matches!(args.selection, Selection::Token { .. }) {
        let allowed = "absent for channel direction and reference ties";
        return Err(Error::invalid("weights", "given", allowed));
    }
    if args.token_weights.is_some() && !channel_direction {
        return Err(Error::invalid("token_weights", "given", "absent for token direction"));
    }
    Ok(())
}

/// Bytes of the mask of a tensor.
pub(crate) fn mask_bytes(shape: &Shape) -> Result<usize> {
    let rows = shape.batch.checked_mul(shape.tokens).and_then(|n| n.checked_mul(shape.heads));
    rows.and_then(|n| n.checked_mul(shape.dim / 8)).ok_or(Error::Overflow { argument: "mask" })
}
