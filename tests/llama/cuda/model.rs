//! A model on the device, and what each of its layers computes besides attention.

use super::blas::{Blas, Rows};
use super::gpu::{Buffer, Gpu};
use super::kernels::{DenseTarget, Kernels, RowShape};
use super::prompt::PromptMemory;
use super::weights::{self, DeviceMatrix};
use crate::llama::config::Config;
use crate::llama::error::{Error, Result};
use crate::llama::matmul::Matrix;
use crate::llama::model::Model;
use crate::llama::rope::Rope;
use crate::llama::source::Source;
use crate::llama::weights::{Layer, Weights};
use mustafar::DType;
use std::rc::Rc;

#[derive(Debug)]
pub struct GpuModel {
    pub config: Config,
    /// Type of weights, activations, keys and values.
    pub dtype: DType,
    pub(super) gpu: Rc<Gpu>,
    pub(super) kernels: Kernels,
    pub(super) blas: Blas,
    weights: Weights<DeviceMatrix>,
    /// `[context, pairs]` of (cos, sin).
    turns: Buffer,
    pub(super) prompt: Option<PromptMemory>,
}

/// Where the activations of some rows lie.
#[derive(Debug, Clone, Copy)]
pub(super) struct Activations {
    /// The residual stream, f32 `[rows, hidden]`.
    pub x: u64,
    /// `[rows, hidden]`, 16 bits like all that follow.
    pub normed: u64,
    /// `[rows, q heads + 2 kv heads, dim]`.
    pub qkv: u64,
    /// Attention's results, `[rows, q heads, dim]`.
    pub attended: u64,
    /// `[rows, 2 ffn]`.
    pub gate_up: u64,
}

impl GpuModel {
    /// Reads a model to the device, one matrix at a time. `dtype` is f16 or bf16.
    pub fn load(
        source: &mut dyn Source,
        ordinal: usize,
        dtype: DType,
        progress: &mut dyn FnMut(usize, usize),
    ) -> Result<Self> {
        let config = source.config()?;
        let gpu = Gpu::open(ordinal)?;
        let mut upload = |matrix| DeviceMatrix::upload(&gpu, dtype, &matrix);
        let weights = Weights::load(source, &config, progress, &mut upload)?;
        Self::assemble(config, dtype, gpu, weights)
    }

    /// A copy of a model of the host.
    pub fn of(model: &Model, ordinal: usize, dtype: DType) -> Result<Self> {
        let gpu = Gpu::open(ordinal)?;
        let upload = |matrix: &Matrix| DeviceMatrix::upload(&gpu, dtype, matrix);
        let of = &model.weights;
        let layer = |layer: &Layer<Matrix>| -> Result<_> {
            Ok(Layer {
                attention_norm: upload(&layer.attention_norm)?,
                qkv: upload(&layer.qkv)?,
                attention_out: upload(&layer.attention_out)?,
                ffn_norm: upload(&layer.ffn_norm)?,
                gate_up: upload(&layer.gate_up)?,
                down: upload(&layer.down)?,
            })
        };
        let weights = Weights {
            embedding: upload(&of.embedding)?,
            layers: of.layers.iter().map(layer).collect::<Result<_>>()?,
            final_norm: upload(&of.final_norm)?,
            output: of.output.as_ref().map(upload).transpose()?,
            rope_factors: of.rope_factors.clone(),
        };
        Self::assemble(model.config.clone(), dtype, gpu, weights)
    }

    /// A model with random weights, made on the device.
    pub fn random(config: Config, seed: u64, ordinal: usize, dtype: DType) -> Result<Self> {
        config.check()?;
        let gpu = Gpu::open(ordinal)?;
        let kernels = Kernels::new(&gpu, dtype)?;
        let weights = weights::random(&gpu, &kernels, &config, seed)?;
        Self::assemble(config, dtype, gpu, weights)
    }

    fn assemble(config: Config, dtype: DType, gpu: Rc<Gpu>, weights: Weights<DeviceMatrix>) -> Result<Self> {
        for (field, size) in [("head_dim", config.head_dim), ("hidden_size", config.hidden)] {
            if !size.is_multiple_of(32) {
                return Err(Error::unsupported(field, size, "multiples of 32 on the GPU"));
            }
        }
        let rope = Rope::new(config.rope_base, config.rope_dim, weights.rope_factors.as_deref());
        let positions: Vec<usize> = (0..config.context).collect();
        let turns: Vec<f32> = rope.table(&positions).into_iter().flat_map(|(cos, sin)| [cos, sin]).collect();
        Ok(Self {
            dtype,
            kernels: Kernels::new(&gpu, dtype)?,
            blas: Blas::new(&gpu, dtype)?,
            turns: Buffer::of(&gpu, &turns)?,
            prompt: None,
            config,
            gpu,
            weights,
        })
    }

    /// The device, for its name and memory.
    pub fn gpu(&self) -> &Gpu {
        &self.gpu
    }

    /// Queries, keys and values of a token together.
    pub(super) fn qkv_width(&self) -> usize {
        self.config.q_width() + 2 * self.config.kv_width()
    }

    /// Rows of the embedding.
    pub(super) fn embed(&self, tokens: u64, x: u64, rows: usize) -> Result<()> {
        self.kernels.embed(x, self.weights.embedding.address(), tokens, rows, self.config.hidden)
    }

    /// What lies between two attentions: the rest of the layer before, and queries, keys and values of layer `layer`. The
    /// first has no layer before, the one past the last no projections.
    pub(super) fn between(&self, layer: usize, a: Activations, rows: usize) -> Result<()> {
        if let Some(before) = layer.checked_sub(1) {
            self.finish(&self.weights.layers[before], a, rows)?;
        }
        let Some(layer) = self.weights.layers.get(layer) else { return Ok(()) };
        let (hidden, width) = (self.config.hidden, self.qkv_width());
        self.norm(&layer.attention_norm, a.x, a.normed, rows)?;
        let (x, y) = (Rows::new(a.normed, hidden), Rows::new(a.qkv, width));
        self.blas.apply(&layer.qkv, x, rows, y, self.dtype, false)
    }

    /// A layer from the results of its attention on. cuBLAS adds to the residual stream.
    fn finish(&self, layer: &Layer<DeviceMatrix>, a: Activations, rows: usize) -> Result<()> {
        let c = &self.config;
        let stream = Rows::new(a.x, c.hidden);
        let attended = Rows::new(a.attended, c.q_width());
        self.blas.apply(&layer.attention_out, attended, rows, stream, DType::F32, true)?;
        self.norm(&layer.ffn_norm, a.x, a.normed, rows)?;
        let gate_up = Rows::new(a.gate_up, 2 * c.ffn);
        self.blas.apply(&layer.gate_up, Rows::new(a.normed, c.hidden), rows, gate_up, self.dtype, false)?;
        self.kernels.silu_mul(a.gate_up, rows, c.ffn)?;
        self.blas.apply(&layer.down, gate_up, rows, stream, DType::F32, true)
    }

    fn norm(&self, weight: &DeviceMatrix, x: u64, out: u64, rows: usize) -> Result<()> {
        self.kernels.rms_norm(out, x, weight.address(), rows, self.config.hidden, self.config.rms_eps)
    }

    /// Turns queries and keys; see [`Kernels::rope`].
    pub(super) fn turn(
        &self,
        qkv: u64,
        rows: usize,
        positions: u64,
        dense: Option<DenseTarget>,
    ) -> Result<()> {
        let c = &self.config;
        let shape = RowShape { heads: c.heads, kv_heads: c.kv_heads, dim: c.head_dim, pairs: c.rope_dim / 2 };
        self.kernels.rope(qkv, rows, shape, self.turns.address(), positions, dense)
    }

    /// f32 logits `[rows, vocab]` of rows of the residual stream.
    pub(super) fn logits(&self, x: u64, normed: u64, logits: u64, rows: usize) -> Result<()> {
        let (hidden, vocab) = (self.config.hidden, self.config.vocab);
        self.norm(&self.weights.final_norm, x, normed, rows)?;
        let y = Rows::new(logits, vocab);
        self.blas.apply(self.weights.output(), Rows::new(normed, hidden), rows, y, DType::F32, false)
    }
}
