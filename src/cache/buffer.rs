//! The memory a cache owns. The one place that knows where it lies: another backend adds its own kind here.

use crate::backend::{Backend, Context};
use crate::error::Result;
use crate::mem::{HostBuffer, Mem, MemMut};

/// Zeroed bytes of fixed length, readable and writable by the ops of the context they were made for.
#[derive(Debug)]
pub(super) struct Buffer {
    memory: HostBuffer,
}

impl Buffer {
    pub(super) fn zeroed(context: &Context, bytes: usize) -> Result<Self> {
        match context.backend() {
            Backend::Cpu => Ok(Self { memory: HostBuffer::zeroed(bytes)? }),
            Backend::Cuda => Err(crate::Error::unsupported("context", context, "the CPU backend")),
        }
    }

    pub(super) fn len(&self) -> usize {
        self.memory.len()
    }

    pub(super) fn mem(&self) -> Mem<'_> {
        Mem::host(self.memory.bytes())
    }

    pub(super) fn mem_mut(&mut self) -> MemMut<'_> {
        MemMut::host(self.memory.bytes_mut())
    }

    /// Moves `bytes` bytes inside the buffer; the ranges may overlap.
    pub(super) fn copy_within(&mut self, from: usize, to: usize, bytes: usize) {
        self.memory.bytes_mut().copy_within(from..from + bytes, to);
    }

    /// Appends bytes of the buffer to a host vector.
    pub(super) fn read(&self, at: usize, bytes: usize, out: &mut Vec<u8>) {
        out.extend_from_slice(&self.memory.bytes()[at..at + bytes]);
    }

    pub(super) fn write(&mut self, at: usize, bytes: &[u8]) {
        self.memory.bytes_mut()[at..at + bytes.len()].copy_from_slice(bytes);
    }
}
