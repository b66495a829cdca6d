//! The decode loop on a GPU: the same models, tokenizers, policies and sampling as on the CPU; products by cuBLAS, the
//! library's attention and [`mustafar::Cache`], and a few kernels of its own ([`kernels`]). Needs a driver, and cuBLAS
//! and NVRTC of CUDA 13, all found at run time.
//!
//! Weights, keys, values and activations have one 16-bit type, f16 or bf16; sums, norms, softmax and the residual
//! stream are f32. Reading order: [`gpu`] (memory, stream), [`weights`], [`model`] (a layer), [`prompt`] and
//! [`causal`] (prefill), [`store`] and [`step`] (where K and V go, and a decode step as a CUDA graph).

pub mod blas;
pub mod causal;
pub mod gpu;
pub mod graph;
pub mod kernels;
pub mod model;
pub mod prompt;
pub mod step;
pub mod store;
pub mod weights;
