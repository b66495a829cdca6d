//! Memory of one size for each layer of each sequence.

use super::buffer::Buffer;
use super::config::CacheConfig;
use crate::backend::{Context, Stream};
use crate::error::Result;
use crate::mem::{Mem, MemMut};

/// `[layers][max_sequences][bytes]`.
#[derive(Debug)]
pub(super) struct Rows {
    argument: &'static str,
    buffer: Buffer,
    bytes: usize,
    sequences: usize,
}

impl Rows {
    pub(super) fn new(
        context: &Context,
        config: &CacheConfig,
        argument: &'static str,
        bytes: usize,
    ) -> Result<Self> {
        // `CacheConfig::check` has shown that all sizes together fit.
        let buffer = Buffer::zeroed(context, config.layers * config.max_sequences * bytes)?;
        Ok(Self { argument, buffer, bytes, sequences: config.max_sequences })
    }

    /// Bytes of a row.
    pub(super) fn bytes(&self) -> usize {
        self.bytes
    }

    /// Rows of a layer.
    pub(super) fn sequences(&self) -> usize {
        self.sequences
    }

    fn at(&self, layer: usize, row: usize) -> usize {
        (layer * self.sequences + row) * self.bytes
    }

    /// From a row to the end.
    pub(super) fn mem(&self, layer: usize, row: usize) -> Result<Mem<'_>> {
        self.buffer.mem().skip(self.argument, self.at(layer, row))
    }

    /// From a row to the end.
    pub(super) fn mem_mut(&mut self, layer: usize, row: usize) -> Result<MemMut<'_>> {
        let at = self.at(layer, row);
        self.buffer.mem_mut().skip(self.argument, at)
    }

    pub(super) fn copy_row(&mut self, stream: Stream, layer: usize, from: usize, to: usize) -> Result<()> {
        self.buffer.copy_within(stream, self.at(layer, from), self.at(layer, to), self.bytes)
    }

    /// Appends `bytes` bytes of a row from byte `first` on to a host vector; waits for the device.
    pub(super) fn read(
        &self,
        layer: usize,
        row: usize,
        first: usize,
        bytes: usize,
        out: &mut Vec<u8>,
    ) -> Result<()> {
        self.buffer.read(self.at(layer, row) + first, bytes, out)
    }

    /// Waits for the device.
    pub(super) fn write(&mut self, layer: usize, row: usize, first: usize, bytes: &[u8]) -> Result<()> {
        self.buffer.write(self.at(layer, row) + first, bytes)
    }
}
