//! Attention of a prompt over itself: a block of queries at a time, two products and a softmax between them.

use super::blas::Rows;
use super::kernels::WEIGHT_SCALE;
use super::model::GpuModel;
use super::prompt::{PromptMemory, QUERY_BLOCK, pitch};
use crate::llama::error::Result;
use mustafar::DType;

impl GpuModel {
    /// Causal attention of `n` tokens, whose queries and keys have been turned. A KV head's keys and values are shared by
    /// its query heads, which are stacked: nothing is repeated.
    pub(super) fn causal_attention(&self, memory: &PromptMemory, n: usize) -> Result<()> {
        let c = &self.config;
        let (dim, group, width) = (c.head_dim, c.group(), self.qkv_width());
        let scale = 1.0 / (dim as f32).sqrt();
        for first in (0..n).step_by(QUERY_BLOCK) {
            let rows = QUERY_BLOCK.min(n - first);
            let seen = first + rows;
            let scores_of = |address| Rows { address, pitch: pitch(seen), stride: rows * pitch(seen) };
            let (scores, weights) = (scores_of(memory.scores.address()), scores_of(memory.weights.address()));
            for kv_head in 0..c.kv_heads {
                let head = kv_head * group;
                let part = |element| Rows::new(memory.qkv.at::<u16>(element), width);
                let q = Rows { stride: dim, ..part(first * width + head * dim) };
                let k = part(c.q_width() + kv_head * dim);
                let v = part(c.q_width() + c.kv_width() + kv_head * dim);
                let out = Rows {
                    address: memory.attended.at::<u16>(first * c.q_width() + head * dim),
                    pitch: c.q_width(),
                    stride: dim,
                };
                self.blas.product([rows, seen, dim], scale, q, (k, true), scores, DType::F32, group)?;
                self.kernels.causal_softmax(
                    weights.address,
                    scores.address,
                    (memory.lse.at::<f32>(first * c.heads + head), c.heads),
                    (rows, group),
                    first,
                    seen,
                    pitch(seen),
                )?;
                let inverse = 1.0 / WEIGHT_SCALE;
                self.blas.product([rows, dim, seen], inverse, weights, (v, false), out, self.dtype, group)?;
            }
        }
        Ok(())
    }
}
