//! `compress`: store any sparsity pattern into ragged pages.

use crate::backend::{Context, Run, Stream};
use crate::cpu::compress::{self as on_cpu, Source};
use crate::cuda;
use crate::error::{Error, Result};
use crate::mem::{Mem, MemMut};
use crate::ops::check;
use crate::ops::prune::mask_bytes;
use crate::pool::PagePoolMut;
use crate::tensor::Tensor;

/// Arguments of [`compress`].
#[derive(Debug)]
pub struct Compress<'a> {
    /// Dense tokens `[1, tokens, kv_heads, head_dim]` in the type of the pages' values; f16 or bf16 for pages of 8-bit
    /// values.
    pub x: Tensor<'a>,
    /// What to keep, contiguous `[tokens, kv_heads, head_dim / 8]` bytes as [`super::Prune::mask`] writes them.
    /// `None`: everything but +0 and -0.
    pub mask: Option<Mem<'a>>,
    /// Destination; ragged pages.
    pub pool: PagePoolMut<'a>,
    /// Page that receives tokens `i * page_tokens ..`, i32 `[ceil(tokens / page_tokens)]`, no page twice (checked on
    /// the CPU only).
    /// Rows of the last page past the last token become empty.
    pub pages: Mem<'a>,
    /// Receives how many values each page holds, u32 `[pages, kv_heads]`; more than its capacity where it cannot hold
    /// them and was not written.
    pub needed: Option<MemMut<'a>>,
}

/// Writes whole pages: equal rows give equal pages, since bytes that no row uses become zero.
///
/// # Errors
/// Shapes, dtypes, uniform pages, each by name; on the CPU page numbers out of range or repeated, and
/// [`crate::Error::PageOverflow`] for the first page whose rows do not fit, before any page is written (only `needed`
/// is). CUDA leaves a page that is too full or out of range as it was and counts it
/// ([`Context::take_device_errors`]); it writes the others.
pub fn compress(context: &Context, stream: Stream, mut args: Compress<'_>) -> Result<()> {
    stream.check(context)?;
    check_shapes(&args)?;
    match context.run() {
        Run::Cpu(cpu) => {
            let (shape, layout) = (args.x.shape, args.pool.layout);
            let pages = host_pages(&args)?;
            let mask_bytes = mask_bytes(&shape)?;
            let source = Source {
                x: args.x.rows("x")?,
                dtype: args.x.dtype,
                mask: args.mask.map(|mask| mask.slice("mask", mask_bytes)).transpose()?,
                page_tokens: layout.format.page_tokens(),
            };
            let pool = args.pool.pages_mut("pool")?;
            let needed_len = pages.len().checked_mul(layout.kv_heads);
            let needed_len = needed_len.ok_or(Error::Overflow { argument: "needed" })?;
            let needed =
                args.needed.as_mut().map(|needed| needed.slice_mut("needed", needed_len)).transpose()?;

            let capacity = layout.format.capacity();
            if let Some((page, head, needed)) = on_cpu::count(cpu, source, needed, capacity) {
                return Err(Error::PageOverflow { page, head, needed, capacity });
            }
            on_cpu::compress(cpu, source, pages, pool);
            Ok(())
        }
        Run::Cuda(device) => cuda::compress(device, stream, &mut args),
    }
}

fn check_shapes(args: &Compress<'_>) -> Result<()> {
    let (shape, layout) = (args.x.shape, args.pool.layout);
    if layout.format.keep().is_some() {
        return Err(Error::invalid("pool", "uniform", "ragged pages"));
    }
    check::page_dtype("x.dtype", args.x.dtype, layout.format.value_type())?;
    check::same("x.batch", shape.batch, 1, "pages hold the tokens of one sequence")?;
    check::same("x.heads", shape.heads, layout.kv_heads, "kv_heads of the pool")?;
    check::same("x.dim", shape.dim, layout.format.head_dim(), "head_dim of the pages")
}

/// The page numbers: in range and no page twice.
fn host_pages<'a>(args: &Compress<'a>) -> Result<&'a [i32]> {
    let (argument, layout) = ("pages", args.pool.layout);
    let count = args.x.shape.tokens.div_ceil(layout.format.page_tokens());
    let pages = args.pages.slice::<i32>(argument, count)?;
    for (index, &page) in pages.iter().enumerate() {
        if usize::try_from(page).map_or(true, |page| page >= layout.num_pages) {
            let (value, allowed) = (i64::from(page), (0, layout.num_pages as i64 - 1));
            return Err(Error::OutOfRange { argument, index, value, allowed });
        }
    }
    let mut sorted: Vec<(i32, usize)> = pages.iter().copied().zip(0..).collect();
    sorted.sort_unstable();
    match sorted.windows(2).find(|pair| pair[0].0 == pair[1].0) {
        Some(pair) => {
            let value = format!("page {} at {} and {}", pair[0].0, pair[0].1, pair[1].1);
            Err(Error::invalid(argument, value, "no page twice"))
        }
        None => Ok(pages),
    }
}
