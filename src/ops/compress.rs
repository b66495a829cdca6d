//! `compress`: store any sparsity pattern into ragged pages.

use crate::backend::{Context, Stream};
use crate::error::Result;
use crate::mem::{Mem, MemMut};
use crate::pool::PagePoolMut;
use crate::tensor::Tensor;

/// Arguments of [`compress`].
#[derive(Debug)]
pub struct Compress<'a> {
    /// Dense tokens `[1, tokens, kv_heads, head_dim]`, dtype of the pages.
    pub x: Tensor<'a>,
    /// What to keep, contiguous `[tokens, kv_heads, head_dim / 8]` bytes as [`super::Prune::mask`] writes them.
    /// `None`: everything but +0 and -0.
    pub mask: Option<Mem<'a>>,
    /// Destination; ragged pages.
    pub pool: PagePoolMut<'a>,
    /// Page that receives tokens `i * page_tokens ..`, i32 `[ceil(tokens / page_tokens)]`, no page twice.
    /// Rows of the last page past the last token become empty.
    pub pages: Mem<'a>,
    /// Receives how many values each page holds, u32 `[pages, kv_heads]`; on overflow, how many it would need.
    pub needed: Option<MemMut<'a>>,
}

/// Writes whole pages.
///
/// # Errors
/// [`crate::Error::PageOverflow`] for the first page whose rows do not fit, before any page is written (only `needed` is); shapes,
/// dtypes, uniform pages, page numbers out of range or repeated, each by name.
pub fn compress(context: &Context, stream: Stream, args: Compress<'_>) -> Result<()> {
    let _ = (context, stream, args);
    todo!()
}
