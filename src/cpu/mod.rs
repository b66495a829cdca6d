//! CPU backend: the ops over host slices. Arguments were validated by `ops`.

mod level;

pub use level::Level;
