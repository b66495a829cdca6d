//! Second pass: merges the partial results of each query row and writes the outputs.

use super::Layout;
use crate::cpu::dense::AnyRowsMut;
use crate::cpu::parallel;
use crate::cpu::simd_attend::MAX_DIM;
use crate::error::Result;
use crate::ops::attend::Attend;
use crate::ops::attend::checks::Host;
use crate::tensor::RowsMut;

/// The outputs, or some rows of them.
#[derive(Debug)]
pub(super) struct Outputs<'a> {
    out: AnyRowsMut<'a>,
    lse: Option<RowsMut<'a, f32>>,
}

impl<'a> Outputs<'a> {
    pub(super) fn new(args: &'a mut Attend<'_>) -> Result<Self> {
        Ok(Self {
            out: AnyRowsMut::new("out", &mut args.out)?,
            lse: args.lse.as_mut().map(|lse| lse.rows_mut("lse")).transpose()?,
        })
    }

    fn split_tokens(self, t: usize) -> (Self, Self) {
        let (low, high) = self.out.split_tokens(t);
        let (lse_low, lse_high) = self.lse.map(|lse| lse.split_tokens(t)).unzip();
        (Self { out: low, lse: lse_low }, Self { out: high, lse: lse_high })
    }

    fn split_heads(self, h: usize) -> (Self, Self) {
        let (low, high) = self.out.split_heads(h);
        let (lse_low, lse_high) = self.lse.map(|lse| lse.split_heads(h)).unzip();
        (Self { out: low, lse: lse_low }, Self { out: high, lse: lse_high })
    }
}

/// One query token and KV head, with the output rows of its group.
struct Piece<'a> {
    b: usize,
    /// Query token inside its sequence.
    i: usize,
    head: usize,
    outputs: Outputs<'a>,
}

/// Merges and writes every output row.
pub(super) fn run(layout: &Layout, host: &Host<'_>, partials: &[f32], outputs: Outputs<'_>, threads: usize) {
    let threads = parallel::useful_threads(threads, size_of_val(partials));
    parallel::drain(std::iter::repeat_n((), threads), pieces(host, outputs), |(), piece| {
        finish(layout, host, partials, piece);
    });
}

/// Cuts the outputs into pieces, query by query, head by head.
fn pieces<'a>(host: &Host<'_>, outputs: Outputs<'a>) -> impl Iterator<Item = Piece<'a>> + Send {
    let (kv_heads, group) = (host.shapes.kv_heads, host.shapes.group());
    let mut tokens = Some(outputs);
    let mut heads: Option<Outputs<'a>> = None;
    let (mut b, mut t, mut head) = (0, 0, 0);
    std::iter::from_fn(move || {
        if t == host.shapes.total_q {
            return None;
        }
        while t >= host.queries(b).end {
            b += 1;
        }
        if head == 0 {
            let (token, rest) = tokens.take()?.split_tokens(1);
            (heads, tokens) = (Some(token), Some(rest));
        }
        let (piece, rest) = heads.take()?.split_heads(group);
        heads = Some(rest);
        let piece = Piece { b, i: t - host.queries(b).start, head, outputs: piece };
        head += 1;
        if head == kv_heads {
            (head, t) = (0, t + 1);
        }
        Some(piece)
    })
}

fn finish(layout: &Layout, host: &Host<'_>, partials: &[f32], mut piece: Piece<'_>) {
    let (group, v_dim) = (host.shapes.group(), host.shapes.v_dim);
    let seen = host.visible(piece.b, piece.head, piece.i, host.queries(piece.b).len());
    // Splits outside what the query sees were never computed; their memory holds anything.
    let splits = match seen.is_empty() {
        true => 0..0,
        false => seen.start / layout.shapes.split_tokens..(seen.end - 1) / layout.shapes.split_tokens + 1,
    };
    let mut buffer = [0.0; MAX_DIM];
    for g in 0..group {
        let row = piece.i * group + g;
        let (tile, row) = (row / layout.tile_rows, row % layout.tile_rows);
        let first = layout.index(piece.b, tile, piece.head, 0);
        let partial = |split: usize| &partials[(first + split) * layout.partial()..][..layout.partial()];
        let max_at = layout.tile_rows * v_dim + row;
        let total_at = max_at + layout.tile_rows;

        let max = splits.clone().map(|s| partial(s)[max_at]).fold(f32::NEG_INFINITY, f32::max);
        let sum = &mut buffer[..v_dim];
        sum.fill(0.0);
        let mut total = 0.0;
        if max > f32::NEG_INFINITY || splits.clone().any(|s| partial(s)[total_at].is_nan()) {
            for partial in splits.clone().map(partial) {
                let weight = (partial[max_at] - max).exp();
                total += weight * partial[total_at];
                for (sum, x) in sum.iter_mut().zip(&partial[row * v_dim..]) {
                    *sum += weight * x;
                }
            }
            sum.iter_mut().for_each(|x| *x /= total);
        }
        piece.outputs.out.store(0, 0, g, sum);
        if let Some(lse) = &mut piece.outputs.lse {
            lse.row_mut(0, 0, g)[0] = if total == 0.0 { f32::NEG_INFINITY } else { max + total.ln() };
        }
    }
}
