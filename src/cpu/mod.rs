//! CPU backend: the ops over host slices. Arguments were validated by `ops`.

mod level;
pub(crate) mod parallel;
pub(crate) mod simd_rows;

pub use level::Level;
