//! Weights: from a file, or random for tests.

use super::config::Config;
use super::error::{Error, Result};
use super::matmul::Matrix;
use super::sample::Rng;
use super::source::Source;
use std::collections::BTreeSet;

/// One transformer block. Matrices that are applied to the same input are stacked, so that each is one product.
#[derive(Debug)]
pub struct Layer {
    pub attention_norm: Vec<f32>,
    /// Query, key and value projections: q_width + 2 * kv_width rows.
    pub qkv: Matrix,
    pub attention_out: Matrix,
    pub ffn_norm: Vec<f32>,
    /// Gate and up projections: 2 * ffn rows.
    pub gate_up: Matrix,
    pub down: Matrix,
}

#[derive(Debug)]
pub struct Weights {
    /// `[vocab, hidden]`.
    pub embedding: Matrix,
    pub layers: Vec<Layer>,
    pub final_norm: Vec<f32>,
    /// `[vocab, hidden]`; `None`: the embedding.
    pub output: Option<Matrix>,
    /// Divisors of the RoPE frequencies, one per pair (Llama 3.1 and later).
    pub rope_factors: Option<Vec<f32>>,
}

impl Weights {
    pub fn output(&self) -> &Matrix {
        self.output.as_ref().unwrap_or(&self.embedding)
    }

    /// Reads all tensors, decoded to f32. `progress` gets (tensors read, tensors in all). A tensor that this loop
    /// does not know is refused: leaving it out would silently compute something else.
    pub fn load(
        file: &mut dyn Source,
        config: &Config,
        progress: &mut dyn FnMut(usize, usize),
    ) -> Result<Self> {
        let mut unread: BTreeSet<String> = file.tensor_names().into_iter().collect();
        let total = unread.len();
        let mut read = |name: &str, rows: &[usize], cols: usize| -> Result<Matrix> {
            let matrix = stacked(file, name, rows, cols)?;
            for name in name.split('+') {
                unread.remove(name);
            }
            progress(total - unread.len(), total);
            Ok(matrix)
        };
        let c = config;
        let embedding = read("token_embd.weight", &[c.vocab], c.hidden)?;
        let mut layers = Vec::new();
        for i in 0..c.layers {
            let name = |parts: &[&str]| {
                let names: Vec<String> = parts.iter().map(|p| format!("blk.{i}.{p}.weight")).collect();
                names.join("+")
            };
            layers.push(Layer {
                attention_norm: read(&name(&["attn_norm"]), &[1], c.hidden)?.data,
                qkv: read(
                    &name(&["attn_q", "attn_k", "attn_v"]),
                    &[c.q_width(), c.kv_width(), c.kv_width()],
                    c.hidden,
                )?,
                attention_out: read(&name(&["attn_output"]), &[c.hidden], c.q_width())?,
                ffn_norm: read(&name(&["ffn_norm"]), &[1], c.hidden)?.data,
                gate_up: read(&name(&["ffn_gate", "ffn_up"]), &[c.ffn, c.ffn], c.hidden)?,
                down: read(&name(&["ffn_down"]), &[c.hidden], c.ffn)?,
            });
        }
        let final_norm = read("output_norm.weight", &[1], c.hidden)?.data;
        let output = if c.tied { None } else { Some(read("output.weight", &[c.vocab], c.hidden)?) };
        // Not every file has it; when it is there it must be applied.
        let factors = "rope_freqs.weight";
        let rope_factors = match file_has(&unread, factors) {
            true => {
                let data = stacked(file, factors, &[1], c.rope_dim / 2)?.data;
                unread.remove(factors);
                if data.iter().any(|f| !(f.is_finite() && *f > 0.0)) {
                    return Err(Error::damaged(
                        format!("tensor {factors}"),
                        "a factor is not a positive number",
                    ));
                }
                Some(data)
            }
            false => None,
        };
        if let Some(name) = unread.first() {
            return Err(Error::unsupported(
                "model",
                format!("one with tensor {name}"),
                "the tensors of plain Llama blocks, without biases",
            ));
        }
        Ok(Self { embedding, layers, final_norm, output, rope_factors })
    }

    /// Normally distributed weights, the same for the same seed.
    pub fn random(config: &Config, seed: u64) -> Self {
        let c = config;
        let mut rng = Rng::new(seed);
        let mut matrix = |rows: usize, cols: usize| {
            let deviation = 1.0 / (cols as f64).sqrt();
            let data = (0..rows * cols).map(|_| (rng.normal() * deviation) as f32).collect();
            Matrix { rows, cols, data }
        };
        // Centred on 1, as trained ones are.
        let norm = |noise: Matrix| -> Vec<f32> { noise.data.iter().map(|x| 1.0 + x).collect() };
        let embedding = matrix(c.vocab, c.hidden);
        let layers = (0..c.layers)
            .map(|_| Layer {
                attention_norm: norm(matrix(1, c.hidden)),
                qkv: matrix(c.q_width() + 2 * c.kv_width(), c.hidden),
                attention_out: matrix(c.hidden, c.q_width()),
                ffn_norm: norm(matrix(1, c.hidden)),
                gate_up: matrix(2 * c.ffn, c.hidden),
                down: matrix(c.hidden, c.ffn),
            })
            .collect();
        let final_norm = norm(matrix(1, c.hidden));
        let output = (!c.tied).then(|| matrix(c.vocab, c.hidden));
        Self { embedding, layers, final_norm, output, rope_factors: None }
    }
}

fn file_has(names: &BTreeSet<String>, name: &str) -> bool {
    names.contains(name)
}

/// The tensors named `a+b+c` on top of each other; each is `rows[i]` by `cols`, or a vector where rows is 1.
fn stacked(file: &mut dyn Source, names: &str, rows: &[usize], cols: usize) -> Result<Matrix> {
    let total: usize = rows.iter().sum();
    let mut data = vec![0.0; 0];
    for (name, &rows) in names.split('+').zip(rows) {
        let dims = if rows == 1 { vec![cols] } else { vec![cols, rows] };
        let (kind, bytes) = file.read_tensor(name, &dims)?;
        let start = data.len();
        data.resize(start + rows * cols, 0.0);
        kind.decode(&bytes, &mut data[start..]);
    }
    Ok(Matrix { rows: total, cols, data })
}
