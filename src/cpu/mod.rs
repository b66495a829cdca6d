//! CPU backend: the ops over host slices. Arguments were validated by `ops`.

pub(crate) mod append;
pub(crate) mod compress;
pub(crate) mod decompress;
mod level;
pub(crate) mod parallel;
pub(crate) mod prune;
mod select;
pub(crate) mod simd_rows;

pub use level::Level;
