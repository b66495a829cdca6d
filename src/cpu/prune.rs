//! `prune` on the CPU: a mask per row, then zeroes where it has no bit.

use super::Level;
use super::parallel;
use super::select::{select, select_channels};
use super::simd_rows::{self as simd, GROUP, MAX_DIM, Mask};
use crate::backend::Cpu;
use crate::dtype::DType;
use crate::ops::prune::Selection;
use crate::tensor::RowsMut;

/// Tokens that a thread takes at once; a multiple of the channel-direction group.
const CHUNK: usize = 256;

/// How to select.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Rule<'a> {
    pub(crate) dtype: DType,
    pub(crate) selection: Selection,
    /// `[heads, dim]`.
    pub(crate) weights: Option<&'a [f32]>,
}

/// `token_weights`, if given, has one number for each row of `x`, and `mask` `dim / 8` bytes.
pub(crate) fn prune(
    cpu: Cpu,
    rule: Rule<'_>,
    x: RowsMut<'_, u16>,
    token_weights: Option<&[f32]>,
    mask: Option<&mut [u8]>,
) {
    let shape = x.shape;
    let bytes = shape.batch * shape.tokens * shape.heads * shape.dim * 2;
    let threads = parallel::useful_threads(cpu.threads, bytes);
    parallel::for_each(threads, parts(x, token_weights, mask), |mut part| match rule.selection {
        Selection::Channel { keep } => part.prune_channels(cpu.level, rule.dtype, keep),
        _ => part.prune_tokens(cpu.level, &rule),
    });
}

/// Some consecutive tokens of one sequence, all heads, and their weights and masks.
struct Part<'a> {
    x: RowsMut<'a, u16>,
    token_weights: Option<&'a [f32]>,
    mask: Option<&'a mut [u8]>,
}

fn parts<'a>(
    x: RowsMut<'a, u16>,
    token_weights: Option<&'a [f32]>,
    mask: Option<&'a mut [u8]>,
) -> impl Iterator<Item = Part<'a>> + Send {
    let shape = x.shape;
    let (mut token_weights, mut mask) = (token_weights, mask);
    let chunks = x.sequences().flat_map(|sequence| sequence.chunks(CHUNK));
    chunks.map(move |x| {
        let rows = x.shape.tokens * shape.heads;
        let weights_of_chunk = token_weights.take().map(|all| {
            let (chunk, rest) = all.split_at(rows);
            token_weights = Some(rest);
            chunk
        });
        let mask_of_chunk = mask.take().map(|all| {
            let (chunk, rest) = all.split_at_mut(rows * (shape.dim / 8));
            mask = Some(rest);
            chunk
        });
        Part { x, token_weights: weights_of_chunk, mask: mask_of_chunk }
    })
}

impl Part<'_> {
    /// Zeroes what `mask` drops of a row, and writes the mask where one is wanted.
    fn apply(&mut self, level: Level, token: usize, head: usize, mask: &Mask) {
        let shape = self.x.shape;
        simd::zero_dropped(level, self.x.row_mut(0, token, head), mask);
        if let Some(bytes) = &mut self.mask {
            let row_bytes = shape.dim / 8;
            mask.write(&mut bytes[(token * shape.heads + head) * row_bytes..][..row_bytes]);
        }
    }

    fn prune_tokens(&mut self, level: Level, rule: &Rule<'_>) {
        let shape = self.x.shape;
        for token in 0..shape.tokens {
            for head in 0..shape.heads {
                let row = self.x.row_mut(0, token, head);
                let mask = match rule.selection {
                    Selection::TokenReferenceTies { dropped } => {
                        // The `dropped`-th smallest of dim is the (dim - dropped + 1)-th largest.
                        simd::select(level, row, shape.dim - dropped + 1, true)
                    }
                    Selection::Token { keep } | Selection::Channel { keep } => {
                        let weights = rule.weights.map(|w| &w[head * shape.dim..][..shape.dim]);
                        select(level, rule.dtype, row, weights, keep)
                    }
                };
                self.apply(level, token, head, &mask);
            }
        }
    }

    fn prune_channels(&mut self, level: Level, dtype: DType, keep: usize) {
        let shape = self.x.shape;
        let mut group = [[0u16; MAX_DIM]; GROUP];
        for first in (0..shape.tokens).step_by(GROUP) {
            for head in 0..shape.heads {
                for (i, copy) in group.iter_mut().enumerate() {
                    copy[..shape.dim].copy_from_slice(self.x.row_mut(0, first + i, head));
                }
                let weights = self
                    .token_weights
                    .map(|all| std::array::from_fn(|i| all[(first + i) * shape.heads + head]));
                let masks = select_channels(level, dtype, &group, shape.dim, weights, keep);
                for (i, mask) in masks.iter().enumerate() {
                    self.apply(level, first + i, head, mask);
                }
            }
        }
    }
}
