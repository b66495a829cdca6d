//! What strategies know beyond magnitudes: the last queries of each layer of each sequence with their log-sum-exps, and
//! weights that are fixed once.

use super::buffer::{Buffer, Staging};
use super::config::CacheConfig;
use super::copy::{Place, copy_tokens, widen_tokens};
use super::geometry::Geometry;
use super::rows::Rows;
use super::sequences::{Recent, Scoring};
use crate::backend::{Context, Stream};
use crate::dtype::DType;
use crate::error::Result;
use crate::mem::Mem;
use crate::ops::{self, Center, QueryWeights, RECENT_QUERIES, StructuredWeights};
use crate::strategy::{Side, Strategy};
use crate::tensor::{Shape, Tensor, TensorMut};
use std::ops::Range;

#[derive(Debug)]
pub(super) struct Scores {
    /// f32 `[32][q_heads][head_dim]`; the query at position p is in slot p % 32.
    queries: Rows,
    /// f32 `[32][q_heads]`, in the same slots.
    lse: Rows,
    /// Weights of K and V that a sequence keeps, f32 `[kv_heads][head_dim]`.
    fixed: [Rows; 2],
    /// The last queries and log-sum-exps of the sequence that is compressed, oldest first.
    ordered: [Buffer; 2],
    /// Weights of the keys that are compressed, f32 `[kv_heads][head_dim]`.
    weights: Buffer,
}

/// The last queries of a sequence, oldest first.
#[derive(Debug, Clone, Copy)]
pub(super) struct LastQueries<'a> {
    /// f32 `[1, count, q_heads, head_dim]`.
    pub(super) q: Tensor<'a>,
    /// f32 `[1, count, q_heads, 1]`, if a strategy needs attention weights.
    pub(super) lse: Option<Tensor<'a>>,
    /// Position of the newest.
    pub(super) position: usize,
    pub(super) scoring: Scoring,
}

impl LastQueries<'_> {
    /// Those of some query heads.
    pub(super) fn heads(&self, heads: &Range<usize>) -> Result<Self> {
        let lse = self.lse.map(|lse| lse.heads("lse", heads)).transpose()?;
        Ok(Self { q: self.q.heads("queries", heads)?, lse, ..*self })
    }
}

impl Scores {
    pub(super) fn new(context: &Context, config: &CacheConfig, geometry: &Geometry) -> Result<Self> {
        let (query, lse) = (RECENT_QUERIES * geometry.query, RECENT_QUERIES * geometry.lse);
        let weighted = config.k_strategy == Strategy::KtOpa;
        let weights = config.kv_heads * config.k.head_dim() * size_of::<f32>();
        Ok(Self {
            queries: Rows::new(context, config, "queries", query)?,
            lse: Rows::new(context, config, "lse", lse)?,
            fixed: [
                Rows::new(context, config, "k weights", geometry.fixed[0])?,
                Rows::new(context, config, "v weights", geometry.fixed[1])?,
            ],
            ordered: [Buffer::zeroed(context, query)?, Buffer::zeroed(context, lse)?],
            weights: Buffer::zeroed(context, if weighted { weights } else { 0 })?,
        })
    }

    /// Bytes that do not belong to a sequence.
    pub(super) fn scratch_bytes(&self) -> usize {
        self.ordered.iter().map(Buffer::len).sum::<usize>() + self.weights.len()
    }

    /// What every layer of a sequence has, in the order in which it is stored: queries, log-sum-exps, weights.
    pub(super) fn rows_mut(&mut self) -> [&mut Rows; 4] {
        let [k, v] = &mut self.fixed;
        [&mut self.queries, &mut self.lse, k, v]
    }

    /// See [`Scores::rows_mut`].
    pub(super) fn rows(&self) -> [&Rows; 4] {
        let [k, v] = &self.fixed;
        [&self.queries, &self.lse, k, v]
    }

    /// Takes in the newest queries of some sequences: q `[sequences, n, q_heads, head_dim]`, lse f32 `[sequences, n, q_heads,
    /// 1]`. Of each, `newest` has the row and one past the position of its last query; taken are only the last 32, and none
    /// before position 0.
    pub(super) fn observe(
        &mut self,
        context: &Context,
        staging: &mut Staging,
        stream: Stream,
        layer: usize,
        (q, lse): (Tensor<'_>, Option<Tensor<'_>>),
        newest: &[(usize, usize)],
    ) -> Result<()> {
        let tokens = q.shape.tokens;
        let places: Vec<Place> = newest
            .iter()
            .enumerate()
            .flat_map(|(from_row, &(to_row, end))| {
                let taken = end - tokens.min(RECENT_QUERIES).min(end)..end;
                slots(taken).map(move |(position, to_token, n)| Place {
                    from_row,
                    from_token: tokens + position - end,
                    to_row,
                    to_token,
                    tokens: n,
                })
            })
            .collect();
        if places.is_empty() {
            return Ok(());
        }
        let sequences = self.queries.sequences();
        let shape = |dim| Shape::contiguous(sequences, RECENT_QUERIES, q.shape.heads, dim);
        let to = shape(q.shape.dim)?;
        let mut sides =
            vec![(q, TensorMut::new("queries", self.queries.mem_mut(layer, 0)?, DType::F32, to)?)];
        if let Some(lse) = lse.filter(|_| self.lse.bytes() > 0) {
            sides.push((lse, TensorMut::new("lse", self.lse.mem_mut(layer, 0)?, DType::F32, shape(1)?)?));
        }
        widen_tokens(context, staging, stream, &mut sides, &places)
    }

    /// Puts the last queries of a sequence in order, for [`Scores::last_queries`].
    pub(super) fn order(
        &mut self,
        context: &Context,
        staging: &mut Staging,
        stream: Stream,
        (layer, row): (usize, usize),
        recent: Recent,
    ) -> Result<()> {
        let positions = recent.positions();
        let places: Vec<Place> = slots(positions.clone())
            .map(|(position, from_token, tokens)| Place {
                from_row: 0,
                from_token,
                to_row: 0,
                to_token: position - positions.start,
                tokens,
            })
            .collect();
        for (rows, ordered) in [&self.queries, &self.lse].into_iter().zip(&mut self.ordered) {
            if rows.bytes() == 0 || places.is_empty() {
                continue;
            }
            // Floats as the 16-bit halves that tokens are copied in.
            let shape = Shape::contiguous(1, RECENT_QUERIES, 1, rows.bytes() / RECENT_QUERIES / 2)?;
            let from = Tensor::new("queries", rows.mem(layer, row)?, DType::F16, shape)?;
            let to = TensorMut::new("queries", ordered.mem_mut(), DType::F16, shape)?;
            copy_tokens(context, staging, stream, &mut [(from, to)], &places)?;
        }
        Ok(())
    }

    /// What [`Scores::order`] has put in order; `None` if there are no queries.
    pub(super) fn last_queries(
        &self,
        config: &CacheConfig,
        recent: Recent,
    ) -> Result<Option<LastQueries<'_>>> {
        let [queries, lse] = &self.ordered;
        let shape = |dim| Shape::contiguous(1, recent.count(), config.q_heads, dim);
        if recent.count() == 0 || queries.len() == 0 {
            return Ok(None);
        }
        let lse = (lse.len() > 0).then(|| Tensor::new("lse", lse.mem(), DType::F32, shape(1)?));
        Ok(Some(LastQueries {
            q: Tensor::new("queries", queries.mem(), DType::F32, shape(config.k.head_dim())?)?,
            lse: lse.transpose()?,
            position: recent.end() - 1,
            scoring: recent.scoring(),
        }))
    }

    /// Computes the weights of `Kt_Opa` from queries that are in order.
    pub(super) fn weigh_keys(
        &mut self,
        context: &Context,
        stream: Stream,
        config: &CacheConfig,
        recent: Recent,
    ) -> Result<()> {
        if config.k_strategy != Strategy::KtOpa {
            return Ok(());
        }
        let shape = Shape::contiguous(1, recent.count(), config.q_heads, config.k.head_dim())?;
        let q = Tensor::new("queries", self.ordered[0].mem(), DType::F32, shape)?;
        let args = QueryWeights { q, kv_heads: config.kv_heads, out: self.weights.mem_mut() };
        ops::query_weights(context, stream, args)
    }

    /// Selection weights of the keys of some heads, if the strategy has any.
    pub(super) fn k_weights(
        &self,
        config: &CacheConfig,
        (layer, row): (usize, usize),
        heads: &Range<usize>,
    ) -> Result<Option<Mem<'_>>> {
        let skip = heads.start * config.k.head_dim() * size_of::<f32>();
        match config.k_strategy {
            Strategy::KtOpa => self.weights.mem().skip("k weights", skip).map(Some),
            Strategy::Think => self.fixed[0].mem(layer, row)?.skip("k weights", skip).map(Some),
            _ => Ok(None),
        }
    }

    /// Selection weights of the values of some heads, if the strategy has any.
    pub(super) fn v_weights(
        &self,
        config: &CacheConfig,
        (layer, row): (usize, usize),
        heads: &Range<usize>,
    ) -> Result<Option<Mem<'_>>> {
        let skip = heads.start * config.v.head_dim() * size_of::<f32>();
        match config.v_strategy {
            Strategy::Thinv => self.fixed[1].mem(layer, row)?.skip("v weights", skip).map(Some),
            _ => Ok(None),
        }
    }

    /// Chooses channels for good, from the tokens that are compressed first.
    pub(super) fn fix(
        &mut self,
        context: &Context,
        stream: Stream,
        config: &CacheConfig,
        choice: &Choice<'_>,
    ) -> Result<()> {
        let Self { fixed: [k_weights, v_weights], ordered: [queries, _], .. } = self;
        let (weights, structured) = match choice.side {
            Side::K => (k_weights, config.k_strategy.is_structured()),
            Side::V => (v_weights, config.v_strategy.is_structured()),
        };
        if !structured {
            return Ok(());
        }
        let group = config.q_heads / config.kv_heads;
        let q_heads = choice.heads.start * group..choice.heads.end * group;
        let shape = Shape::contiguous(1, choice.recent.count(), config.q_heads, config.k.head_dim())?;
        let q = match choice.side {
            Side::K => {
                Some(Tensor::new("queries", queries.mem(), DType::F32, shape)?.heads("queries", &q_heads)?)
            }
            Side::V => None,
        };
        let skip = choice.heads.start * choice.x[0].shape.dim * size_of::<f32>();
        let out = weights.mem_mut(choice.layer, choice.row)?.skip("weights", skip)?;
        let (x, center, keep) = (choice.x, choice.center, choice.keep);
        ops::structured_weights(context, stream, StructuredWeights { x, center, q, keep, out })
    }
}

/// Runs of positions whose queries lie in consecutive slots: first position, first slot, length.
fn slots(positions: Range<usize>) -> impl Iterator<Item = (usize, usize, usize)> {
    let mut next = positions.start;
    std::iter::from_fn(move || {
        let (position, slot) = (next, next % RECENT_QUERIES);
        let n = (RECENT_QUERIES - slot).min(positions.end - position);
        next += n;
        (n > 0).then_some((position, slot, n))
    })
}

/// A choice of whole channels.
pub(super) struct Choice<'a> {
    pub(super) side: Side,
    pub(super) layer: usize,
    pub(super) row: usize,
    pub(super) heads: &'a Range<usize>,
    /// K or V of the tokens, of these heads alone; likewise the centre.
    pub(super) x: &'a [Tensor<'a>],
    pub(super) center: Option<Center<'a>>,
    pub(super) keep: usize,
    /// Queries, which are in order.
    pub(super) recent: Recent,
}
