//! CPU backend: the ops over host slices. Arguments were validated by `ops`.

pub(crate) mod append;
pub(crate) mod attend;
pub(crate) mod compress;
pub(crate) mod decompress;
pub(crate) mod dense;
mod lanes;
mod level;
mod math;
pub(crate) mod median;
pub(crate) mod merge;
mod packed;
pub(crate) mod parallel;
pub(crate) mod prune;
pub(crate) mod score;
mod select;
mod simd_attend;
pub(crate) mod simd_rows;
mod simd_weigh;
pub(crate) mod spmv;
mod store;

pub use level::Level;
