//! `merge` on the CPU.

use crate::cpu::dense::{AnyRows, AnyRowsMut};
use crate::cpu::simd_attend::MAX_DIM;
use crate::tensor::{Rows, RowsMut, Shape};

/// One partial result.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Part<'a> {
    pub(crate) x: AnyRows<'a>,
    pub(crate) lse: Rows<'a, f32>,
}

impl Part<'_> {
    /// The row and its log-sum-exp; `None` for a side without tokens, whose row is never read.
    fn load<'b>(&self, t: usize, h: usize, row: &'b mut [f32]) -> Option<(&'b [f32], f32)> {
        let lse = self.lse.row(0, t, h)[0];
        if lse.is_infinite() {
            return None;
        }
        self.x.load(0, t, h, row);
        Some((row, lse))
    }
}

/// Merges the rows of `[1, tokens, heads, dim]`, dim at most [`MAX_DIM`].
pub(crate) fn merge(
    shape: &Shape,
    a: Part<'_>,
    b: Part<'_>,
    mut out: AnyRowsMut<'_>,
    mut lse: Option<RowsMut<'_, f32>>,
) {
    let mut buffers = [[0f32; MAX_DIM]; 3];
    let [a_row, b_row, merged] = buffers.each_mut().map(|buffer| &mut buffer[..shape.dim]);
    for t in 0..shape.tokens {
        for h in 0..shape.heads {
            let merged_lse = match (a.load(t, h, a_row), b.load(t, h, b_row)) {
                (Some((a, a_lse)), Some((b, b_lse))) => {
                    let max = a_lse.max(b_lse);
                    let (a_weight, b_weight) = ((a_lse - max).exp(), (b_lse - max).exp());
                    let total = a_weight + b_weight;
                    for ((merged, a), b) in merged.iter_mut().zip(a).zip(b) {
                        *merged = (a_weight * a + b_weight * b) / total;
                    }
                    max + total.ln()
                }
                (Some((row, lse)), None) | (None, Some((row, lse))) => {
                    merged.copy_from_slice(row);
                    lse
                }
                (None, None) => {
                    merged.fill(0.0);
                    f32::NEG_INFINITY
                }
            };
            out.store(0, t, h, merged);
            if let Some(lse) = &mut lse {
                lse.row_mut(0, t, h)[0] = merged_lse;
            }
        }
    }
}
