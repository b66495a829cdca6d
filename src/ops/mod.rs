//! The operations. Each module holds an argument struct, all validation of it, and the call of the backend.
//!
//! Every op takes a [`Context`](crate::Context) and a [`Stream`](crate::Stream). On the CPU backend memory is host
//! memory, the stream is [`Stream::NONE`](crate::Stream::NONE) and the op has finished when it returns. An op that
//! refuses its arguments has written nothing.
//!
//! On the CUDA backend memory is device memory, and an op returns when its kernels are in the stream: it allocates,
//! waits for and copies nothing, its launches follow from shapes and upper bounds alone, and a CUDA graph may capture
//! it and replay it with other contents. What device arrays hold (lengths, page numbers, slots, weights) cannot be
//! checked before it returns; the documentation of each op says what wrong contents do, and
//! [`Context::take_device_errors`](crate::Context::take_device_errors) what was left undone. A view must stay valid
//! until the stream has run the op.

pub mod append;
pub mod attend;
pub(crate) mod check;
pub mod compress;
pub mod decompress;
pub mod merge;
pub mod prune;
pub mod score;
pub mod spmv;
pub mod validate;

pub use append::{Append, AppendSide, append};
pub use attend::{Advice, Attend, Center, Compressed, Dense, Speed, attend, attend_advice, attend_workspace};
pub use compress::{Compress, compress};
pub use decompress::{Decompress, decompress};
pub use merge::{Merge, merge};
pub use prune::{Prune, Selection, prune};
pub use score::{
    QueryWeights, RECENT_QUERIES, StructuredWeights, TokenWeights, query_weights, structured_weights,
    token_weights,
};
pub use spmv::{SpmvKey, SpmvValue, spmv_key, spmv_value};
pub use validate::{NO_VIOLATION, Validate, check_record, validate};
