//! `validate`: check untrusted pages of a pool.

use crate::backend::{Backend, Context, Stream};
use crate::error::Result;
use crate::ops::check::{self, HostSequences};
use crate::pool::{PagePool, Sequences};

/// Arguments of [`validate`].
#[derive(Debug)]
pub struct Validate<'a> {
    /// Pages, uniform or ragged.
    pub pool: PagePool<'a>,
    /// Which pages, and how many rows of them count.
    pub sequences: Sequences<'a>,
}

/// Checks every row that the sequences reach, as [`crate::PageFormat::validate`] does for one page.
///
/// # Errors
/// [`crate::Error::CorruptData`] naming sequence, head, page and row of the first violation; shapes, lengths and
/// page numbers by name.
pub fn validate(context: &Context, stream: Stream, args: Validate<'_>) -> Result<()> {
    stream.check(context)?;
    let layout = args.pool.layout;
    check::sequences(&args.sequences, &layout)?;
    match context.backend() {
        Backend::Cpu => {
            let pages = args.pool.pages("pool")?;
            let sequences = HostSequences::new(&args.sequences, &layout)?;
            check::pages(&pages, &sequences)
        }
    }
}
