//! `validate`: check untrusted pages of a pool.

use crate::backend::{Context, Run, Stream};
use crate::cuda;
use crate::error::{Error, Result};
use crate::mem::MemMut;
use crate::ops::check::{self, HostSequences};
use crate::pool::{PagePool, PoolLayout, Sequences};

/// Arguments of [`validate`].
#[derive(Debug)]
pub struct Validate<'a> {
    /// Pages, uniform or ragged.
    pub pool: PagePool<'a>,
    /// Which pages, and how many rows of them count.
    pub sequences: Sequences<'a>,
    /// CUDA: one u64 of device memory, 8-byte aligned, holding [`NO_VIOLATION`], which is lowered to the record of the
    /// first violation; [`check_record`] reads it. CPU: `None`.
    pub record: Option<MemMut<'a>>,
}

/// What a record holds where nothing is wrong, and before the check.
pub const NO_VIOLATION: u64 = u64::MAX;

/// Checks every row that the sequences reach, as [`crate::PageFormat::validate`] does for one page.
///
/// # Errors
/// Shapes by name. On the CPU [`crate::Error::CorruptData`] naming sequence, head, page and row of the first violation,
/// and lengths and page numbers out of range; on CUDA the record says this once the stream has run the check.
pub fn validate(context: &Context, stream: Stream, mut args: Validate<'_>) -> Result<()> {
    stream.check(context)?;
    let layout = args.pool.layout;
    check::sequences(&args.sequences, &layout)?;
    match context.run() {
        Run::Cpu(_) => {
            if args.record.is_some() {
                return Err(Error::invalid("record", "given", "absent on the CPU backend"));
            }
            let pages = args.pool.pages("pool")?;
            let sequences = HostSequences::new(&args.sequences, &layout)?;
            check::pages(&pages, &sequences)
        }
        Run::Cuda(device) => cuda::validate(device, stream, &mut args),
    }
}

/// Turns the record of a CUDA [`validate`] (copied to the host) into its result. `layout` and `max_len` are those of
/// the call.
///
/// # Errors
/// [`crate::Error::CorruptData`] naming sequence, head, page of the sequence and row of the first violation, in this
/// order; [`crate::Error::InvalidArgument`] for a number that is no record.
pub fn check_record(record: u64, layout: &PoolLayout, max_len: usize) -> Result<()> {
    if record == NO_VIOLATION {
        return Ok(());
    }
    let (index, rule) = (record / 8, record % 8);
    let page_tokens = layout.format.page_tokens();
    let pages = max_len.div_ceil(page_tokens).max(1) as u64;
    let (index, row) = (index / page_tokens as u64, index % page_tokens as u64);
    let (index, page) = (index / pages, index % pages);
    let heads = layout.kv_heads.max(1) as u64;
    let (sequence, head) = (index / heads, index % heads);
    let capacity = layout.format.capacity();
    let rule = match rule {
        1 => return Err(corrupt(format!("sequence {sequence}, head {head}: length outside 0 to {max_len}"))),
        2 => format!("page number outside 0 to {}", layout.num_pages.saturating_sub(1)),
        3 if layout.format.keep().is_some() => "bits set in the bitmap differ from keep".to_owned(),
        3 => "bits set in the bitmap differ from the row's span of values".to_owned(),
        4 => "the first offset is not 0".to_owned(),
        5 => format!("the row ends past the capacity of {capacity} values"),
        _ => return Err(Error::invalid("record", record, "what a validate has written")),
    };
    Err(corrupt(format!("sequence {sequence}, head {head}, its page {page}, row {row}: {rule}")))
}

fn corrupt(reason: String) -> Error {
    Error::CorruptData { what: "page", reason }
}
