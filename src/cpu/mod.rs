//! CPU backend: the ops over host slices. Arguments were validated by `ops`.

mod level;
mod parallel;

pub use level::Level;
