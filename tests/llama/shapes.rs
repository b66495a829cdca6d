//! Models by name, for random weights of their shape.

use super::config::Config;
use super::error::{Error, Result};

const LLAMA_2_7B: Config = Config {
    layers: 32,
    hidden: 4096,
    ffn: 11008,
    heads: 32,
    kv_heads: 32,
    head_dim: 128,
    vocab: 32000,
    context: 4096,
    rms_eps: 1e-5,
    rope_base: 10_000.0,
    rope_dim: 128,
    tied: false,
};
const LLAMA_3_8B: Config =
    Config { ffn: 14336, kv_heads: 8, vocab: 128_256, context: 8192, rope_base: 500_000.0, ..LLAMA_2_7B };
const MISTRAL_7B_INSTRUCT_V0_2: Config =
    Config { ffn: 14336, kv_heads: 8, context: 32768, rope_base: 1e6, ..LLAMA_2_7B };

/// Of no published model: for trying things out, and for tests.
const TINY: Config = Config {
    layers: 2,
    hidden: 128,
    ffn: 256,
    heads: 4,
    kv_heads: 2,
    head_dim: 64,
    vocab: 512,
    rope_dim: 64,
    ..LLAMA_2_7B
};

/// Models that [`named`] knows.
pub const SHAPES: [(&str, Config); 4] = [
    ("llama-2-7b", LLAMA_2_7B),
    ("llama-3-8b", LLAMA_3_8B),
    ("mistral-7b-instruct-v0.2", MISTRAL_7B_INSTRUCT_V0_2),
    ("tiny", TINY),
];

/// The shape of a model.
pub fn named(name: &str) -> Result<Config> {
    SHAPES.iter().find(|(known, _)| *known == name).map(|(_, config)| config.clone()).ok_or_else(|| {
        let all: Vec<&str> = SHAPES.iter().map(|(name, _)| *name).collect();
        Error::Invalid(format!("model shape is {name:?}; allowed: {}", all.join(", ")))
    })
}
