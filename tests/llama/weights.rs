//! Weights: from a file, or random for tests.

use super::config::Config;
use super::error::{Error, Result};
use super::matmul::Matrix;
use super::sample::Rng;
use super::source::Source;
use std::collections::BTreeSet;

/// One transformer block. Matrices that are applied to the same input are stacked, so that each is one product.
/// `T` is where a matrix lies: [`Matrix`] on the host, or a device's memory. Norms are matrices of one row.
#[derive(Debug)]
pub struct Layer<T> {
    pub attention_norm: T,
    /// Query, key and value projections: q_width + 2 * kv_width rows.
    pub qkv: T,
    pub attention_out: T,
    pub ffn_norm: T,
    /// Gate and up projections: 2 * ffn rows.
    pub gate_up: T,
    pub down: T,
}

#[derive(Debug)]
pub struct Weights<T = Matrix> {
    /// `[vocab, hidden]`.
    pub embedding: T,
    pub layers: Vec<Layer<T>>,
    pub final_norm: T,
    /// `[vocab, hidden]`; `None`: the embedding.
    pub output: Option<T>,
    /// Divisors of the RoPE frequencies, one per pair (Llama 3.1 and later).
    pub rope_factors: Option<Vec<f32>>,
}

/// A matrix that a model has: tensors on top of each other, each `rows[i]` by `cols`, or a vector where that is 1.
#[derive(Debug)]
pub struct Part<'a> {
    /// As GGUF files call them.
    pub names: Vec<String>,
    pub rows: &'a [usize],
    pub cols: usize,
}

impl Part<'_> {
    pub fn total_rows(&self) -> usize {
        self.rows.iter().sum()
    }

    /// A vector of factors.
    pub fn is_norm(&self) -> bool {
        self.rows == [1]
    }
}

impl<T> Weights<T> {
    pub fn output(&self) -> &T {
        self.output.as_ref().unwrap_or(&self.embedding)
    }

    /// Makes every matrix of a model of this shape, in a fixed order.
    pub fn build(config: &Config, make: &mut dyn FnMut(Part<'_>) -> Result<T>) -> Result<Self> {
        let c = config;
        let mut part = |prefix: &str, names: &[&str], rows: &[usize], cols: usize| {
            let names = names.iter().map(|name| format!("{prefix}{name}.weight")).collect();
            make(Part { names, rows, cols })
        };
        let embedding = part("", &["token_embd"], &[c.vocab], c.hidden)?;
        let mut layers = Vec::new();
        for i in 0..c.layers {
            let prefix = format!("blk.{i}.");
            let mut part = |names: &[&str], rows: &[usize], cols| part(&prefix, names, rows, cols);
            layers.push(Layer {
                attention_norm: part(&["attn_norm"], &[1], c.hidden)?,
                qkv: part(
                    &["attn_q", "attn_k", "attn_v"],
                    &[c.q_width(), c.kv_width(), c.kv_width()],
                    c.hidden,
                )?,
                attention_out: part(&["attn_output"], &[c.hidden], c.q_width())?,
                ffn_norm: part(&["ffn_norm"], &[1], c.hidden)?,
                gate_up: part(&["ffn_gate", "ffn_up"], &[c.ffn, c.ffn], c.hidden)?,
                down: part(&["ffn_down"], &[c.hidden], c.ffn)?,
            });
        }
        let final_norm = part("", &["output_norm"], &[1], c.hidden)?;
        let output = if c.tied { None } else { Some(part("", &["output"], &[c.vocab], c.hidden)?) };
        Ok(Self { embedding, layers, final_norm, output, rope_factors: None })
    }

    /// Reads all tensors, decoded to f32 and then put where `place` puts them. `progress` gets (tensors read, tensors
    /// in all). A tensor that this loop does not know is refused: leaving it out would silently compute something else.
    pub fn load(
        file: &mut dyn Source,
        config: &Config,
        progress: &mut dyn FnMut(usize, usize),
        place: &mut dyn FnMut(Matrix) -> Result<T>,
    ) -> Result<Self> {
        let mut unread: BTreeSet<String> = file.tensor_names().into_iter().collect();
        let total = unread.len();
        let mut weights = Self::build(config, &mut |part| {
            let matrix = stacked(file, &part)?;
            for name in &part.names {
                unread.remove(name);
            }
            progress(total - unread.len(), total);
            place(matrix)
        })?;
        // Not every file has it; when it is there it must be applied.
        let factors = "rope_freqs.weight".to_string();
        if unread.remove(&factors) {
            let part = Part { names: vec![factors.clone()], rows: &[1], cols: config.rope_dim / 2 };
            let data = stacked(file, &part)?.data;
            if data.iter().any(|f| !(f.is_finite() && *f > 0.0)) {
                return Err(Error::damaged(format!("tensor {factors}"), "a factor is not a positive number"));
            }
            weights.rope_factors = Some(data);
            progress(total - unread.len(), total);
        }
        if let Some(name) = unread.first() {
            return Err(Error::unsupported(
                "model",
                format!("one with tensor {name}"),
                "the tensors of plain Llama blocks, without biases",
            ));
        }
        Ok(weights)
    }
}

impl Weights {
    /// Normally distributed weights, the same for the same seed.
    pub fn random(config: &Config, seed: u64) -> Result<Self> {
        let mut rng = Rng::new(seed);
        Self::build(config, &mut |part| {
            let (rows, cols) = (part.total_rows(), part.cols);
            let deviation = 1.0 / (cols as f64).sqrt();
            // Norms are centred on 1, as trained ones are.
            let centre = if part.is_norm() { 1.0 } else { 0.0 };
            let data = (0..rows * cols).map(|_| centre + (rng.normal() * deviation) as f32).collect();
            Ok(Matrix { rows, cols, data })
        })
    }
}

/// The tensors of a part on top of each other.
fn stacked(file: &mut dyn Source, part: &Part<'_>) -> Result<Matrix> {
    let (rows, cols) = (part.total_rows(), part.cols);
    let mut data = vec![0.0; 0];
    for (name, &rows) in part.names.iter().zip(part.rows) {
        let dims = if rows == 1 { vec![cols] } else { vec![cols, rows] };
        let (kind, bytes) = file.read_tensor(name, &dims)?;
        let start = data.len();
        data.resize(start + rows * cols, 0.0);
        kind.decode(&bytes, &mut data[start..]);
    }
    Ok(Matrix { rows, cols, data })
}
