//! The memory a cache owns, and the way of its small arrays to the ops: the one place that knows where things lie.

use crate::backend::{Context, Run, Stream};
pub(super) use crate::cuda::Kept;
use crate::cuda::{DeviceBuffer, Uploads};
use crate::error::Result;
use crate::mem::{Element, HostBuffer, Mem, MemMut};

/// Zeroed bytes of fixed length, readable and writable by the ops of the context they were made for.
#[derive(Debug)]
pub(super) enum Buffer {
    Host(HostBuffer),
    Device(DeviceBuffer),
}

impl Buffer {
    pub(super) fn zeroed(context: &Context, bytes: usize) -> Result<Self> {
        Ok(match context.run() {
            Run::Cpu(_) => Self::Host(HostBuffer::zeroed(bytes)?),
            Run::Cuda(device) => Self::Device(DeviceBuffer::zeroed(device, bytes)?),
        })
    }

    pub(super) fn len(&self) -> usize {
        match self {
            Self::Host(memory) => memory.len(),
            Self::Device(memory) => memory.len(),
        }
    }

    pub(super) fn mem(&self) -> Mem<'_> {
        match self {
            Self::Host(memory) => Mem::host(memory.bytes()),
            Self::Device(memory) => memory.mem(),
        }
    }

    pub(super) fn mem_mut(&mut self) -> MemMut<'_> {
        match self {
            Self::Host(memory) => MemMut::host(memory.bytes_mut()),
            Self::Device(memory) => memory.mem_mut(),
        }
    }

    /// Moves `bytes` bytes inside the buffer, in the order of the stream. The ranges may overlap if `to` is below
    /// `from`.
    pub(super) fn copy_within(&mut self, stream: Stream, from: usize, to: usize, bytes: usize) -> Result<()> {
        match self {
            Self::Host(memory) => {
                memory.bytes_mut().copy_within(from..from + bytes, to);
                Ok(())
            }
            Self::Device(memory) => memory.copy_within(stream, from, to, bytes),
        }
    }

    /// Appends bytes of the buffer to a host vector; waits for the device.
    pub(super) fn read(&self, at: usize, bytes: usize, out: &mut Vec<u8>) -> Result<()> {
        match self {
            Self::Host(memory) => {
                out.extend_from_slice(&memory.bytes()[at..at + bytes]);
                Ok(())
            }
            Self::Device(memory) => memory.read(at, bytes, out),
        }
    }

    /// Waits for the device.
    pub(super) fn write(&mut self, at: usize, bytes: &[u8]) -> Result<()> {
        match self {
            Self::Host(memory) => {
                memory.bytes_mut()[at..at + bytes.len()].copy_from_slice(bytes);
                Ok(())
            }
            Self::Device(memory) => memory.write(at, bytes),
        }
    }
}

/// How arrays that a cache makes on the host reach the ops of a call.
#[derive(Debug)]
pub(super) enum Staging {
    /// They read them where they are.
    Host,
    Device(Box<Uploads>),
}

impl Staging {
    pub(super) fn new(context: &Context) -> Self {
        match context.run() {
            Run::Cpu(_) => Self::Host,
            Run::Cuda(device) => Self::Device(Box::new(Uploads::new(device))),
        }
    }

    /// A view for the ops up to the next [`Staging::finish`].
    pub(super) fn send<'a, T: Element>(&mut self, stream: Stream, values: &'a [T]) -> Result<Mem<'a>> {
        match self {
            Self::Host => Ok(Mem::host(values)),
            Self::Device(uploads) => uploads.send(stream, values),
        }
    }

    /// As [`Staging::send`], for an array that hardly changes from call to call.
    pub(super) fn send_kept<'a, T: Element>(
        &mut self,
        stream: Stream,
        kept: Kept,
        values: &'a [T],
    ) -> Result<Mem<'a>> {
        match self {
            Self::Host => Ok(Mem::host(values)),
            Self::Device(uploads) => uploads.send_kept(stream, kept, values),
        }
    }

    /// Ends a call, whose ops have been submitted.
    pub(super) fn finish(&mut self, stream: Stream) -> Result<()> {
        match self {
            Self::Host => Ok(()),
            Self::Device(uploads) => uploads.finish(stream),
        }
    }
}
