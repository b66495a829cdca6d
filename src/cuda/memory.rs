//! Device memory that a cache owns, and the way of its small arrays there.
#![allow(unsafe_code)]

use super::Device;
use super::driver::error;
use crate::backend::Stream;
use crate::error::{Error, Result};
use crate::mem::{Element, Mem, MemMut, Place};
use cudarc::driver::{result, sys};
use std::collections::VecDeque;
use std::sync::Arc;

/// Zeroed device memory of the library's own.
#[derive(Debug)]
pub(crate) struct DeviceBuffer {
    device: Arc<Device>,
    address: sys::CUdeviceptr,
    bytes: usize,
}

impl DeviceBuffer {
    /// `bytes` zero bytes, aligned to at least 256, or [`Error::OutOfMemory`]. Waits for the default stream.
    pub(crate) fn zeroed(device: &Arc<Device>, bytes: usize) -> Result<Self> {
        let _entered = device.context.enter()?;
        let mut buffer = Self { device: Arc::clone(device), address: 0, bytes };
        if bytes > 0 {
            // SAFETY: the size is not 0; freed by `drop`.
            buffer.address =
                unsafe { result::malloc_sync(bytes) }.map_err(|_| Error::OutOfMemory { bytes })?;
            // SAFETY: the allocation has that many bytes.
            unsafe { result::memset_d8_sync(buffer.address, 0, bytes) }.map_err(error("cuMemsetD8"))?;
            // Setting memory is asynchronous to the host, and streams of the caller's need not wait for it.
            synchronize()?;
        }
        Ok(buffer)
    }

    pub(crate) fn len(&self) -> usize {
        self.bytes
    }

    pub(crate) fn mem(&self) -> Mem<'_> {
        // SAFETY: an allocation that lives as long as the borrow; freeing it waits for what the device is doing.
        unsafe { Mem::from_raw(self.address, self.bytes, Place::Device) }
    }

    pub(crate) fn mem_mut(&mut self) -> MemMut<'_> {
        // SAFETY: as in `mem`, borrowed mutably.
        unsafe { MemMut::from_raw(self.address, self.bytes, Place::Device) }
    }

    /// Moves `bytes` bytes inside the buffer, in the order of the stream; the ranges may overlap where `to` is below
    /// `from`.
    pub(crate) fn copy_within(&mut self, stream: Stream, from: usize, to: usize, bytes: usize) -> Result<()> {
        self.check(from, bytes);
        self.check(to, bytes);
        assert!(to <= from || to >= from + bytes, "moved upwards into itself");
        let _entered = self.device.context.enter()?;
        // A copy must not overlap itself; pieces as long as the way they move do not.
        let piece = if from > to { (from - to).min(bytes) } else { bytes };
        for at in (0..bytes).step_by(piece.max(1)) {
            let n = piece.min(bytes - at);
            let (source, target) = (self.address + (from + at) as u64, self.address + (to + at) as u64);
            // SAFETY: both ranges lie inside the allocation and are disjoint.
            unsafe { result::memcpy_dtod_async(target, source, n, stream.as_raw().cast()) }
                .map_err(error("cuMemcpyDtoDAsync"))?;
        }
        Ok(())
    }

    /// Appends bytes of the buffer to a host vector, once the device has done all it was given.
    pub(crate) fn read(&self, at: usize, bytes: usize, out: &mut Vec<u8>) -> Result<()> {
        self.check(at, bytes);
        if bytes == 0 {
            return Ok(());
        }
        let _entered = self.device.context.enter()?;
        synchronize()?;
        let start = out.len();
        out.resize(start + bytes, 0);
        // SAFETY: the range lies inside the allocation.
        unsafe { result::memcpy_dtoh_sync(&mut out[start..], self.address + at as u64) }
            .map_err(error("cuMemcpyDtoH"))
    }

    /// Writes bytes once the device has done all it was given; done when it returns.
    pub(crate) fn write(&mut self, at: usize, bytes: &[u8]) -> Result<()> {
        self.check(at, bytes.len());
        if bytes.is_empty() {
            return Ok(());
        }
        let _entered = self.device.context.enter()?;
        synchronize()?;
        // SAFETY: the range lies inside the allocation.
        unsafe { result::memcpy_htod_sync(self.address + at as u64, bytes) }
            .map_err(error("cuMemcpyHtoD"))?;
        synchronize()
    }

    fn check(&self, at: usize, bytes: usize) {
        assert!(at.checked_add(bytes).is_some_and(|end| end <= self.bytes), "outside the buffer");
    }
}

impl Drop for DeviceBuffer {
    fn drop(&mut self) {
        if self.bytes > 0
            && let Ok(_entered) = self.device.context.enter()
        {
            // SAFETY: allocated by `zeroed`, freed once. An error cannot be dealt with.
            let _ = unsafe { result::free_sync(self.address) };
        }
    }
}

/// Waits for everything the current context was given.
fn synchronize() -> Result<()> {
    result::ctx::synchronize().map_err(error("cuCtxSynchronize"))
}

impl Device {
    /// Waits for everything the device was given.
    pub(crate) fn synchronize(&self) -> Result<()> {
        let _entered = self.context.enter()?;
        synchronize()
    }
}

/// Bytes that [`Uploads`] starts with.
const FIRST_CAPACITY: usize = 1 << 20;
const ALIGN: usize = 16;

/// Page-locked memory, and device memory of the same size.
#[derive(Debug)]
struct Ring {
    locked: *mut u8,
    target: sys::CUdeviceptr,
}

/// Sends small host arrays to the device in the order of a stream, without waiting: a ring of page-locked memory
/// and one of device memory. A piece is used again once the calls it was sent for have run.
#[derive(Debug)]
pub(crate) struct Uploads {
    device: Arc<Device>,
    /// The last one is in use.
    rings: Vec<Ring>,
    /// Bytes of the ring in use.
    capacity: usize,
    /// Where the next array goes.
    head: usize,
    /// Bytes in use, which lie behind `head`, round the end.
    used: usize,
    /// Of these, bytes sent since the last `finish`.
    open: usize,
    /// Bytes of each finished call, oldest first, and when it has run.
    calls: VecDeque<(usize, sys::CUevent)>,
    /// Events not in use.
    events: Vec<sys::CUevent>,
    kept: [KeptArray; Kept::COUNT],
}

/// Arrays that hardly change from call to call, which stay on the device.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Kept {
    /// What attention reads: lengths, rows and pages of a batch.
    Batch,
    /// Where tokens are copied from and to.
    Places,
    /// Where queries are.
    Queries,
}

impl Kept {
    const COUNT: usize = 3;
}

#[derive(Debug, Default)]
struct KeptArray {
    buffer: Option<DeviceBuffer>,
    /// What it holds after everything that has been submitted.
    contents: Vec<u8>,
}

// SAFETY: the memory and the events belong to this value alone, and the driver takes handles on every thread.
unsafe impl Send for Uploads {}
// SAFETY: without `&mut` nothing is reachable.
unsafe impl Sync for Uploads {}

impl Uploads {
    pub(crate) fn new(device: &Arc<Device>) -> Self {
        Self {
            device: Arc::clone(device),
            rings: Vec::new(),
            capacity: 0,
            head: 0,
            used: 0,
            open: 0,
            calls: VecDeque::new(),
            events: Vec::new(),
            kept: Default::default(),
        }
    }

    /// A device copy of `values` for the calls up to the next [`Uploads::finish`].
    pub(crate) fn send<T: Element>(&mut self, stream: Stream, values: &[T]) -> Result<Mem<'static>> {
        let (locked, address) = self.piece(size_of_val(values))?;
        self.copy(stream, values, locked, address)?;
        // SAFETY: device memory that keeps its contents until the calls of this round have run.
        Ok(unsafe { Mem::from_raw(address, size_of_val(values), Place::Device) })
    }

    /// As [`Uploads::send`], for an array that is likely to be what it was at the last call: then nothing is sent. Up to
    /// the next call with the same `kept`.
    pub(crate) fn send_kept<T: Element>(
        &mut self,
        stream: Stream,
        kept: Kept,
        values: &[T],
    ) -> Result<Mem<'static>> {
        let bytes = size_of_val(values);
        let array = &mut self.kept[kept as usize];
        if array.buffer.as_ref().is_none_or(|buffer| buffer.len() < bytes) {
            array.contents.clear();
            // Freeing the old one waits for the calls that read it.
            array.buffer = Some(DeviceBuffer::zeroed(&self.device, bytes.next_power_of_two())?);
        }
        let address = array.buffer.as_ref().map_or(0, |buffer| buffer.address);
        // SAFETY: plain elements, whose bytes may all be read.
        let contents = unsafe { std::slice::from_raw_parts(values.as_ptr().cast::<u8>(), bytes) };
        if array.contents != contents {
            // Calls of a cache are ordered: those that read the old contents run before the copy.
            array.contents.clear();
            let (locked, _) = self.piece(bytes)?;
            self.copy(stream, values, locked, address)?;
            self.kept[kept as usize].contents.extend_from_slice(contents);
        }
        // SAFETY: an allocation of at least as many bytes, freed by a call that waits for what reads it.
        Ok(unsafe { Mem::from_raw(address, bytes, Place::Device) })
    }

    /// `bytes` bytes of the ring, page-locked and on the device.
    fn piece(&mut self, bytes: usize) -> Result<(*mut u8, sys::CUdeviceptr)> {
        let device = Arc::clone(&self.device);
        let _entered = device.context.enter()?;
        let at = self.reserve(bytes.next_multiple_of(ALIGN))?;
        let ring = self.rings.last();
        Ok(ring.map_or((std::ptr::null_mut(), 0), |ring| {
            (ring.locked.wrapping_add(at), ring.target + at as u64)
        }))
    }

    /// Copies values to the device by way of a piece of the ring.
    fn copy<T: Element>(
        &self,
        stream: Stream,
        values: &[T],
        locked: *mut u8,
        to: sys::CUdeviceptr,
    ) -> Result<()> {
        let bytes = size_of_val(values);
        if bytes == 0 {
            return Ok(());
        }
        let _entered = self.device.context.enter()?;
        // SAFETY: `piece` gave `bytes` bytes, which nothing else uses until the calls of this round have run; the source
        // is a slice of plain elements; `to` has room for them.
        unsafe {
            std::ptr::copy_nonoverlapping(values.as_ptr().cast::<u8>(), locked, bytes);
            let sent = std::slice::from_raw_parts(locked, bytes);
            result::memcpy_htod_async(to, sent, stream.as_raw().cast())
        }
        .map_err(error("cuMemcpyHtoDAsync"))
    }

    /// Everything sent since the last call may be overwritten once the stream has come this far.
    pub(crate) fn finish(&mut self, stream: Stream) -> Result<()> {
        if self.open == 0 {
            return Ok(());
        }
        let _entered = Arc::clone(&self.device);
        let _entered = _entered.context.enter()?;
        let event = match self.events.pop() {
            Some(event) => event,
            None => result::event::create(sys::CUevent_flags::CU_EVENT_DISABLE_TIMING)
                .map_err(error("cuEventCreate"))?,
        };
        // SAFETY: an event of this context; `stream` is the caller's.
        let recorded = unsafe { result::event::record(event, stream.as_raw().cast()) };
        if let Err(e) = recorded {
            self.events.push(event);
            return Err(error("cuEventRecord")(e));
        }
        self.calls.push_back((std::mem::take(&mut self.open), event));
        Ok(())
    }

    /// `bytes` contiguous bytes, waiting for old calls if the ring is full.
    fn reserve(&mut self, bytes: usize) -> Result<usize> {
        if bytes > self.capacity / 4 {
            self.grow(4 * bytes)?;
        }
        loop {
            // What is left before the end of the ring is skipped if it is too short.
            let skipped = if self.head + bytes > self.capacity { self.capacity - self.head } else { 0 };
            if self.used + skipped + bytes <= self.capacity {
                let at = (self.head + skipped) % self.capacity.max(1);
                self.head = at + bytes;
                self.used += skipped + bytes;
                self.open += skipped + bytes;
                return Ok(at);
            }
            if !self.retire()? {
                self.grow(2 * self.capacity)?;
            }
        }
    }

    /// Waits for the oldest call; false if there is none.
    fn retire(&mut self) -> Result<bool> {
        let Some((bytes, event)) = self.calls.pop_front() else { return Ok(false) };
        self.used -= bytes;
        self.events.push(event);
        // SAFETY: an event of this context that `finish` has recorded.
        unsafe { result::event::synchronize(event) }.map_err(error("cuEventSynchronize"))?;
        Ok(true)
    }

    /// Goes on with a new ring of at least `bytes` bytes. The old one stays until the end, since calls under way and
    /// the one being prepared read from it; rings grow to multiples, so this costs less than the new one.
    fn grow(&mut self, bytes: usize) -> Result<()> {
        let capacity = bytes.next_power_of_two().max(FIRST_CAPACITY);
        // SAFETY: the size is not 0; freed by `drop`.
        let locked = unsafe { result::malloc_host(capacity, 0) }
            .map_err(|_| Error::OutOfMemory { bytes: capacity })?;
        self.rings.push(Ring { locked: locked.cast(), target: 0 });
        // SAFETY: as above.
        let target =
            unsafe { result::malloc_sync(capacity) }.map_err(|_| Error::OutOfMemory { bytes: capacity })?;
        if let Some(ring) = self.rings.last_mut() {
            ring.target = target;
        }
        (self.capacity, self.head, self.used, self.open) = (capacity, 0, 0, 0);
        self.calls.iter_mut().for_each(|(bytes, _)| *bytes = 0);
        Ok(())
    }
}

impl Drop for Uploads {
    fn drop(&mut self) {
        let device = Arc::clone(&self.device);
        let Ok(_entered) = device.context.enter() else { return };
        let _ = synchronize();
        for ring in self.rings.drain(..) {
            // SAFETY: allocated by `grow`, freed once, with nothing under way. Errors cannot be dealt with.
            let _ = unsafe { (result::free_sync(ring.target), result::free_host(ring.locked.cast())) };
        }
        for event in self.events.drain(..).chain(self.calls.drain(..).map(|(_, event)| event)) {
            // SAFETY: created by `finish`, destroyed once. An error cannot be dealt with.
            let _ = unsafe { result::event::destroy(event) };
        }
    }
}
