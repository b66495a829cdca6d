//! Decode attention on a pruned, bitmap-compressed KV cache.
//!
//! An LLM that decodes reads its whole KV cache for every token. mustafar keeps only the largest values of each
//! row, stores them as a bitmap plus values ([`format`](mod@format)), and computes attention straight from that
//! ([`ops::attend()`]).
//!
//! - [`Cache`] manages pages, dense window and sinks for many layers and sequences. Most Rust callers start here.
//! - [`ops`] are the same operations over memory that an engine owns: pools, block tables, slots.
//! - [`reference`](mod@reference) says in plain float64 loops what every op computes: the place to start reading.
//!
//! Everything works on host memory with [`Context::cpu`] and on device memory with [`Context::cuda`].

pub mod backend;
pub mod cache;
#[doc(hidden)]
pub mod capi;
mod cpu;
mod cuda;
pub mod dtype;
pub mod error;
pub mod format;
pub mod mem;
pub mod ops;
pub mod pool;
pub mod reference;
pub mod sparsity;
pub mod strategy;
pub mod tensor;
#[doc = "What kernels exist for: head dimensions, page sizes, value types."]
pub mod variants;

pub use backend::{Backend, Context, DeviceErrors, Stream};
pub use cache::{
    Cache, CacheAttend, CacheBytes, CacheConfig, CacheQueries, CenterMode, HeadFormats, SequenceId,
};
pub use cpu::Level;
pub use dtype::{DType, ValueType};
pub use error::{Error, Result};
pub use format::{PageFormat, Rows};
pub use mem::{Mem, MemMut, Place};
pub use pool::{PagePool, PagePoolMut, PoolLayout, Sequences};
pub use sparsity::{keep_for_sparsity, reference_keep};
pub use strategy::{Side, Strategy};
pub use tensor::{Shape, Tensor, TensorMut};

/// Runs the Rust of the README as a doctest.
#[cfg(doctest)]
#[doc = include_str!("../README.md")]
struct Readme;
