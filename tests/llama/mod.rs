//! A decode loop for models of the Llama family: from a GGUF file or a Hugging Face checkpoint to text, with the KV cache either dense f16 or a
//! [`mustafar::Cache`]. Tests and examples share it through `#[path]`.
//!
//! Reading order: [`gguf`] with [`quant`], [`checkpoint`] with [`hf_config`] (the files), [`config`] and [`weights`] (what is in it), [`model`] (the
//! forward pass), [`store`] and [`attention`] (where K and V go and how they are attended to), [`tokenizer`],
//! [`sample`], [`evaluate`] (perplexity and agreement with dense), [`passkey`] (finding a fact in a long text). [`cuda`] is the same on a
//! GPU, and [`engine`] what both can do.
#![allow(dead_code, unreachable_pub, reason = "each test and example uses its own part of this module")]

pub mod attention;
pub mod checkpoint;
pub mod config;
pub mod cuda;
pub mod engine;
pub mod error;
pub mod evaluate;
pub mod fetch;
pub mod gguf;
pub mod hf_config;
pub mod matmul;
pub mod model;
pub mod passkey;
pub mod quant;
pub mod rope;
pub mod sample;
pub mod shapes;
pub mod source;
pub mod store;
pub mod tiny;
pub mod tokenizer;
pub mod vector;
pub mod weights;
