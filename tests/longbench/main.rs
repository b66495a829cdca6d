//! LongBench: metrics against golden values of the published packages, and predict and score on a tiny model.
#![allow(clippy::unwrap_used, clippy::panic)]

#[path = "../gguf_writer/mod.rs"]
mod gguf_writer;
#[path = "../llama/mod.rs"]
mod llama;
#[path = "../../ffi-examples/rust/longbench/mod.rs"]
mod longbench;

mod files;
mod predict;
mod prompts;
mod scores;
mod tiny;
