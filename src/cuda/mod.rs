//! The CUDA backend: checked arguments become launches of the kernels in `csrc/`.
//!
//! An op allocates nothing, waits for nothing and copies nothing: what it needs is in its arguments, the kernels are
//! loaded when the context is made, and the grid follows from shapes and upper bounds. Array contents (lengths, page
//! numbers, slots) lie on the device and are not looked at here; the kernels say what they do with bad ones.

mod args;
mod attend;
mod cache;
mod driver;
mod kernels;
mod memory;
mod merge;
mod params;
mod plan;
mod score;
mod spmv;
mod store;

pub(crate) use attend::{attend, attend_formats, attend_split, attend_workspace};
pub(crate) use cache::{copy_tokens, flat_places, median};
pub(crate) use memory::{DeviceBuffer, Kept, Uploads};
pub(crate) use merge::merge;
pub(crate) use score::{query_weights, structured_weights, token_weights};
pub(crate) use spmv::{spmv_key, spmv_value};
pub(crate) use store::{append, compress, decompress, prune, validate};

use crate::backend::DeviceErrors;
use crate::error::Result;
use driver::{DeviceContext, Words};
use kernels::Kernels;

/// Index of the word that counts the errors of an op.
#[derive(Debug, Clone, Copy)]
enum Counter {
    Append,
    Compress,
    Read,
}

/// A device ready to run ops.
#[derive(Debug)]
pub(crate) struct Device {
    kernels: Kernels,
    counters: Words<4>,
    context: DeviceContext,
}

impl Device {
    /// As [`crate::Context::cuda`] says.
    pub(crate) fn open(ordinal: usize) -> Result<Self> {
        let context = DeviceContext::open(ordinal)?;
        let _entered = context.enter()?;
        let mut kernels = Kernels::load(context.shared_bytes)?;
        match Words::new() {
            Ok(counters) => Ok(Self { kernels, counters, context }),
            Err(e) => {
                kernels.unload();
                Err(e)
            }
        }
    }

    pub(crate) fn ordinal(&self) -> usize {
        self.context.ordinal
    }

    pub(crate) fn take_errors(&self) -> Result<DeviceErrors> {
        let _entered = self.context.enter()?;
        let [append, compress, read, _] = self.counters.take()?;
        Ok(DeviceErrors { append, compress, read })
    }

    fn counter(&self, counter: Counter) -> *mut u32 {
        self.counters.word(counter as usize)
    }

    /// Kernels may start before the one ahead of them has ended.
    fn overlaps(&self) -> bool {
        self.context.capability >= (9, 0)
    }
}

impl Drop for Device {
    fn drop(&mut self) {
        // Without the context there is nothing left to free.
        if let Ok(_entered) = self.context.enter() {
            self.kernels.unload();
            self.counters.free();
        }
    }
}
