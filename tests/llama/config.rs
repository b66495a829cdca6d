//! The shape of a model, from GGUF metadata.

use super::error::{Error, Result};
use super::gguf::{Gguf, Value};
use std::io::{Read, Seek};

/// Shape and constants of a Llama-family model.
#[derive(Debug, Clone, PartialEq)]
pub struct Config {
    pub layers: usize,
    /// Width of the residual stream.
    pub hidden: usize,
    /// Width inside the feed-forward block.
    pub ffn: usize,
    /// Query heads, a multiple of `kv_heads`.
    pub heads: usize,
    pub kv_heads: usize,
    pub head_dim: usize,
    pub vocab: usize,
    /// Positions the model was trained for.
    pub context: usize,
    pub rms_eps: f32,
    pub rope_base: f64,
    /// Channels of a head that rotate, from the first; even.
    pub rope_dim: usize,
    /// Whether the output projection is the embedding matrix.
    pub tied: bool,
}

impl Config {
    /// Width of the keys (or values) of all KV heads of a token.
    pub fn kv_width(&self) -> usize {
        self.kv_heads * self.head_dim
    }

    /// Width of the queries of a token.
    pub fn q_width(&self) -> usize {
        self.heads * self.head_dim
    }

    /// Query heads per KV head.
    pub fn group(&self) -> usize {
        self.heads / self.kv_heads
    }

    /// Reads and checks the metadata. Whatever would change the computation and is not implemented is refused.
    pub fn from_gguf<R: Read + Seek>(file: &Gguf<R>) -> Result<Self> {
        let architecture = file.str("general.architecture")?;
        if architecture != "llama" {
            return Err(Error::unsupported("general.architecture", architecture, "llama"));
        }
        let scaling = "llama.rope.scaling.type";
        match file.get(scaling) {
            None => {}
            Some(Value::Str(kind)) if kind == "none" => {}
            Some(other) => {
                return Err(Error::unsupported(
                    scaling,
                    format!("{other:?}"),
                    "none, or a rope_freqs.weight tensor",
                ));
            }
        }
        if let Some(experts) = file.int("llama.expert_count", 0, 1 << 16)?
            && experts > 0
        {
            return Err(Error::unsupported("llama.expert_count", experts, "0 (dense feed-forward blocks)"));
        }
        let context = file.required_int("llama.context_length", 1, 1 << 30)?;
        if let Some(window) = file.int("llama.attention.sliding_window", 0, 1 << 30)?
            && window > 0
            && window < context
        {
            return Err(Error::unsupported(
                "llama.attention.sliding_window",
                window,
                "none (full attention)",
            ));
        }

        let heads = file.required_int("llama.attention.head_count", 1, 1024)?;
        let hidden = file.required_int("llama.embedding_length", 1, 1 << 16)?;
        let head_dim = match file.int("llama.attention.key_length", 1, 1024)? {
            Some(n) => n,
            None if hidden % heads == 0 => hidden / heads,
            None => {
                return Err(Error::damaged(
                    "GGUF file",
                    format!(
                        "llama.embedding_length {hidden} is no multiple of llama.attention.head_count {heads}"
                    ),
                ));
            }
        };
        if let Some(n) = file.int("llama.attention.value_length", 1, 1024)?
            && n != head_dim
        {
            return Err(Error::unsupported(
                "llama.attention.value_length",
                n,
                format!("the key length, {head_dim}"),
            ));
        }
        let embedding = file
            .tensor("token_embd.weight")
            .ok_or_else(|| Error::damaged("GGUF file", "tensor token_embd.weight is missing"))?;
        // The innermost dimension is checked against `hidden` when the tensor is read.
        let rows = embedding.dims.get(1).copied().unwrap_or(1);
        let config = Self {
            layers: file.required_int("llama.block_count", 1, 1024)?,
            hidden,
            ffn: file.required_int("llama.feed_forward_length", 1, 1 << 20)?,
            heads,
            kv_heads: file.int("llama.attention.head_count_kv", 1, heads)?.unwrap_or(heads),
            head_dim,
            vocab: file.int("llama.vocab_size", 1, 1 << 24)?.unwrap_or(rows),
            context,
            rms_eps: file.float("llama.attention.layer_norm_rms_epsilon", 0.0, 1.0)?.ok_or_else(|| {
                Error::damaged("GGUF file", "llama.attention.layer_norm_rms_epsilon is missing")
            })? as f32,
            rope_base: file.float("llama.rope.freq_base", 1.0, 1e12)?.unwrap_or(10_000.0),
            rope_dim: file.int("llama.rope.dimension_count", 2, head_dim)?.unwrap_or(head_dim),
            tied: file.tensor("output.weight").is_none(),
        };
        config.check()?;
        Ok(config)
    }

    /// Checks tokens of a forward pass after which some sequence has `len` tokens.
    pub fn check_input(&self, tokens: &[u32], len: usize) -> Result<()> {
        if tokens.is_empty() {
            return Err(Error::Invalid("the prompt has no tokens".to_string()));
        }
        if let Some(token) = tokens.iter().find(|&&t| t as usize >= self.vocab) {
            return Err(Error::Invalid(format!("token {token} is not in the vocabulary of {}", self.vocab)));
        }
        if len > self.context {
            return Err(Error::Invalid(format!(
                "position {} is beyond the model's context of {} tokens",
                self.context, self.context
            )));
        }
        Ok(())
    }

    /// Checks what the forward pass relies on.
    pub fn check(&self) -> Result<()> {
        if !self.heads.is_multiple_of(self.kv_heads) {
            return Err(Error::Invalid(format!(
                "{} query heads are no multiple of {} KV heads",
                self.heads, self.kv_heads
            )));
        }
        if !self.rope_dim.is_multiple_of(2) || self.rope_dim > self.head_dim {
            return Err(Error::Invalid(format!(
                "RoPE over {} channels; allowed: an even number up to {}",
                self.rope_dim, self.head_dim
            )));
        }
        Ok(())
    }
}
