//! The operations. Each module holds an argument struct, all validation of it, and the call of the backend.
//!
//! Every op takes a [`Context`](crate::Context) and a [`Stream`](crate::Stream). On the CPU backend memory is host
//! memory, the stream is [`Stream::NONE`](crate::Stream::NONE) and the op has finished when it returns. An op that
//! returns an error has written nothing.

pub mod append;
pub mod attend;
pub(crate) mod check;
pub mod compress;
pub mod decompress;
pub mod merge;
pub mod prune;
pub mod spmv;
pub mod validate;

pub use append::{Append, AppendSide, append};
pub use attend::{Attend, Center, Compressed, Dense, attend, attend_workspace};
pub use compress::{Compress, compress};
pub use decompress::{Decompress, decompress};
pub use merge::{Merge, merge};
pub use prune::{Prune, Selection, prune};
pub use spmv::{SpmvKey, SpmvValue, spmv_key, spmv_value};
pub use validate::{NO_VIOLATION, Validate, check_record, validate};
