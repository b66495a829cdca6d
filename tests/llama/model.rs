//! The forward pass.

use super::attention::{self, Heads};
use super::config::Config;
use super::error::{Error, Result};
use super::matmul::Matrix;
use super::rope::{self, Rope};
use super::source::{self, Source};
use super::store::{KvStore, LastQueries};
use super::tokenizer::Tokenizer;
use super::vector::{add, rms_norm, silu_mul, to_f16, to_f32};
use super::weights::Weights;
use half::f16;
use mustafar::Context;
use rayon::prelude::*;
use std::path::Path;
use std::time::{Duration, Instant};

/// Where the time of forward passes went.
#[derive(Debug, Clone, Copy, Default)]
pub struct Meter {
    pub total: Duration,
    /// Products with weight matrices.
    pub products: Duration,
    /// Attention: the prompt's, or the stores'.
    pub attention: Duration,
    /// Appending to the stores, with the pruning and compression that brings.
    pub append: Duration,
}

/// A loaded model with the threads it may use.
#[derive(Debug)]
pub struct Model {
    pub config: Config,
    pub weights: Weights,
    rope: Rope,
    pool: rayon::ThreadPool,
    context: Context,
}

/// Keys and values of the tokens of one pass and one layer, as the forward pass hands them to attention.
struct Projected<'a> {
    /// `[rows, q heads, dim]`, after RoPE.
    q: &'a [f32],
    /// `[rows, kv heads, dim]`, after RoPE.
    k: &'a [f16],
    v: &'a [f16],
}

impl Model {
    /// Opens a GGUF file, or the folder of a Hugging Face checkpoint, with its tokenizer. `progress` gets (tensors
    /// read, tensors in all).
    pub fn open(
        path: &Path,
        threads: usize,
        progress: &mut (dyn FnMut(usize, usize) + Send),
    ) -> Result<(Self, Tokenizer)> {
        let (mut source, tokenizer) = source::open(path)?;
        Ok((Self::load(&mut *source, threads, progress)?, tokenizer))
    }

    /// The model alone, from what is open already.
    pub fn load(
        source: &mut (dyn Source + Send),
        threads: usize,
        progress: &mut (dyn FnMut(usize, usize) + Send),
    ) -> Result<Self> {
        let config = source.config()?;
        let (pool, context) = workers(threads)?;
        let weights = pool.install(|| Weights::load(source, &config, progress, &mut Ok))?;
        Ok(Self::assemble(config, weights, pool, context))
    }

    /// A model with random weights.
    pub fn random(config: Config, seed: u64, threads: usize) -> Result<Self> {
        config.check()?;
        let (pool, context) = workers(threads)?;
        let weights = Weights::random(&config, seed)?;
        Ok(Self::assemble(config, weights, pool, context))
    }

    fn assemble(config: Config, weights: Weights, pool: rayon::ThreadPool, context: Context) -> Self {
        let rope = Rope::new(config.rope_base, config.rope_dim, weights.rope_factors.as_deref());
        Self { config, weights, rope, pool, context }
    }

    /// Threads of the matrix products.
    pub fn threads(&self) -> usize {
        self.pool.current_num_threads()
    }

    /// The context that caches of this model should use: as many threads as the model.
    pub fn context(&self) -> &Context {
        &self.context
    }

    /// Runs a prompt from position 0 with unpruned attention and then appends its keys and values to the store,
    /// which must be empty. Returns the logits after the last token.
    pub fn prefill(&self, tokens: &[u32], store: &mut KvStore, meter: &mut Meter) -> Result<Vec<f32>> {
        if store.len() > 0 {
            return Err(Error::Invalid(format!("prefill into a store that holds {} tokens", store.len())));
        }
        let positions: Vec<usize> = (0..tokens.len()).collect();
        let heads = self.heads();
        let (mut k, mut v) = (Vec::new(), Vec::new());
        let mut lse = vec![0.0; tokens.len() * heads.q];
        let hidden = self.forward(tokens, &positions, meter, |layer, projected, out, meter| {
            // Attention sees what decoding will see later: keys and values rounded to f16.
            let start = Instant::now();
            k.resize(projected.k.len(), 0.0);
            v.resize(projected.v.len(), 0.0);
            to_f32(projected.k, &mut k);
            to_f32(projected.v, &mut v);
            attention::prefill(heads, projected.q, &k, &v, out, &mut lse);
            meter.attention += start.elapsed();
            let start = Instant::now();
            let queries = LastQueries::of(heads, projected.q, &lse);
            store.append_prompt(layer, projected.k, projected.v, queries)?;
            meter.append += start.elapsed();
            Ok(())
        })?;
        let last = &hidden[hidden.len() - self.config.hidden..];
        Ok(self.logits(last, 1, meter))
    }

    /// One decode step of several sequences: `tokens[i]` continues `stores[i]`. Returns logits `[stores, vocab]`.
    pub fn decode(&self, tokens: &[u32], stores: &mut [&mut KvStore], meter: &mut Meter) -> Result<Vec<f32>> {
        assert_eq!(tokens.len(), stores.len(), "one token per store");
        let positions: Vec<usize> = stores.iter().map(|s| s.len()).collect();
        let (q_width, kv_width) = (self.config.q_width(), self.config.kv_width());
        let hidden = self.forward(tokens, &positions, meter, |layer, projected, out, meter| {
            for (i, store) in stores.iter_mut().enumerate() {
                let start = Instant::now();
                let [k, v] = [projected.k, projected.v].map(|x| &x[i * kv_width..][..kv_width]);
                store.append(layer, k, v)?;
                let appended = Instant::now();
                store.attend(
                    layer,
                    &projected.q[i * q_width..][..q_width],
                    &mut out[i * q_width..][..q_width],
                )?;
                meter.append += appended - start;
                meter.attention += appended.elapsed();
            }
            Ok(())
        })?;
        Ok(self.logits(&hidden, tokens.len(), meter))
    }

    fn heads(&self) -> Heads {
        Heads { q: self.config.heads, kv: self.config.kv_heads, dim: self.config.head_dim }
    }

    /// All blocks over `tokens`, each a row; returns the residual stream `[rows, hidden]`. `attend` gets the layer
    /// and its projections and fills `[rows, q heads, dim]`.
    fn forward(
        &self,
        tokens: &[u32],
        positions: &[usize],
        meter: &mut Meter,
        attend: impl FnMut(usize, Projected<'_>, &mut [f32], &mut Meter) -> Result<()> + Send,
    ) -> Result<Vec<f32>> {
        self.config.check_input(tokens, positions.iter().max().map_or(0, |last| last + 1))?;
        let start = Instant::now();
        let hidden = self.pool.install(|| self.blocks(tokens, positions, meter, attend));
        meter.total += start.elapsed();
        hidden
    }

    fn blocks(
        &self,
        tokens: &[u32],
        positions: &[usize],
        meter: &mut Meter,
        mut attend: impl FnMut(usize, Projected<'_>, &mut [f32], &mut Meter) -> Result<()>,
    ) -> Result<Vec<f32>> {
        let c = &self.config;
        let rows = tokens.len();
        let (q_width, kv_width) = (c.q_width(), c.kv_width());
        let turns = self.rope.table(positions);
        let mut x = Vec::with_capacity(rows * c.hidden);
        for &token in tokens {
            x.extend_from_slice(self.weights.embedding.row(token as usize));
        }
        let mut normed = vec![0.0; rows * c.hidden];
        let mut qkv = vec![0.0; rows * (q_width + 2 * kv_width)];
        let mut q = vec![0.0; rows * q_width];
        let mut k = vec![f16::ZERO; rows * kv_width];
        let mut v = vec![f16::ZERO; rows * kv_width];
        let mut attended = vec![0.0; rows * q_width];
        let mut delta = vec![0.0; rows * c.hidden];
        let mut gate_up = vec![0.0; rows * 2 * c.ffn];
        let mut activated = vec![0.0; rows * c.ffn];

        for (i, layer) in self.weights.layers.iter().enumerate() {
            self.norm(&x, &layer.attention_norm.data, &mut normed);
            self.apply(&layer.qkv, &normed, rows, &mut qkv, meter);
            let split = qkv.par_chunks_mut(q_width + 2 * kv_width).zip(q.par_chunks_mut(q_width));
            let split = split.zip(k.par_chunks_mut(kv_width)).zip(v.par_chunks_mut(kv_width));
            split.enumerate().for_each(|(row, (((qkv, q), k), v))| {
                let turns = self.rope.row(&turns, row);
                let (new_q, new_kv) = qkv.split_at_mut(q_width);
                let (new_k, new_v) = new_kv.split_at_mut(kv_width);
                rope::rotate(new_q, c.head_dim, turns);
                rope::rotate(new_k, c.head_dim, turns);
                q.copy_from_slice(new_q);
                to_f16(new_k, k);
                to_f16(new_v, v);
            });
            attend(i, Projected { q: &q, k: &k, v: &v }, &mut attended, meter)?;
            self.apply(&layer.attention_out, &attended, rows, &mut delta, meter);
            add(&mut x, &delta);

            self.norm(&x, &layer.ffn_norm.data, &mut normed);
            self.apply(&layer.gate_up, &normed, rows, &mut gate_up, meter);
            gate_up.par_chunks_mut(2 * c.ffn).zip(activated.par_chunks_mut(c.ffn)).for_each(
                |(gate_up, out)| {
                    let (gate, up) = gate_up.split_at_mut(c.ffn);
                    silu_mul(gate, up);
                    out.copy_from_slice(gate);
                },
            );
            self.apply(&layer.down, &activated, rows, &mut delta, meter);
            add(&mut x, &delta);
        }
        Ok(x)
    }

    fn norm(&self, x: &[f32], weight: &[f32], out: &mut [f32]) {
        let width = self.config.hidden;
        x.par_chunks(width)
            .zip(out.par_chunks_mut(width))
            .for_each(|(x, out)| rms_norm(x, weight, self.config.rms_eps, out));
    }

    fn apply(&self, matrix: &Matrix, x: &[f32], n: usize, y: &mut [f32], meter: &mut Meter) {
        let start = Instant::now();
        matrix.apply(x, n, y, self.threads());
        meter.products += start.elapsed();
    }

    /// Logits `[rows, vocab]` of rows of the residual stream.
    fn logits(&self, hidden: &[f32], rows: usize, meter: &mut Meter) -> Vec<f32> {
        let start = Instant::now();
        let mut normed = vec![0.0; hidden.len()];
        let mut logits = vec![0.0; rows * self.config.vocab];
        self.pool.install(|| {
            self.norm(hidden, &self.weights.final_norm.data, &mut normed);
            self.apply(self.weights.output(), &normed, rows, &mut logits, meter);
        });
        meter.total += start.elapsed();
        logits
    }
}

/// A thread pool for the matrix products and a context for the library, both of `threads` threads.
fn workers(threads: usize) -> Result<(rayon::ThreadPool, Context)> {
    let context = Context::cpu(threads)?;
    let pool = rayon::ThreadPoolBuilder::new()
        .num_threads(threads)
        .build()
        .map_err(|e| Error::Invalid(format!("cannot start {threads} threads: {e}")))?;
    Ok((pool, context))
}
