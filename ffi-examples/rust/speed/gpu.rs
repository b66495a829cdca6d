//! A GPU to measure on: a stream, two events, and something to fill the L2 cache with.
#![allow(unsafe_code)]

use super::memory::{Buffer, error};
use cudarc::driver::{result, sys};
use mustafar::{Error, Stream};

/// Twice the L2 cache would empty it. Writing more also gives the host time to submit what is measured, so that the
/// GPU never waits for it.
const FLUSH_L2S: usize = 4;
/// Bytes copied to measure bandwidth; far beyond the L2 cache.
const COPY_BYTES: usize = 512 << 20;
const COPY_ROUNDS: usize = 7;

pub(crate) struct Gpu {
    stream: sys::CUstream,
    start: sys::CUevent,
    stop: sys::CUevent,
    flush: Buffer,
}

impl Gpu {
    /// Device 0, whose primary context becomes current. `Context::cuda(0)` must have succeeded: it finds out whether
    /// there is a device.
    pub(crate) fn new() -> Result<Self, Error> {
        let device = result::device::get(0).map_err(error("cuDeviceGet"))?;
        // SAFETY: the device exists. The context stays retained until the process ends.
        let l2 = unsafe {
            let primary = result::primary_ctx::retain(device).map_err(error("cuDevicePrimaryCtxRetain"))?;
            result::ctx::set_current(primary).map_err(error("cuCtxSetCurrent"))?;
            let size = sys::CUdevice_attribute_enum::CU_DEVICE_ATTRIBUTE_L2_CACHE_SIZE;
            result::device::get_attribute(device, size).map_err(error("cuDeviceGetAttribute"))?
        };
        let event = || {
            result::event::create(sys::CUevent_flags_enum::CU_EVENT_DEFAULT).map_err(error("cuEventCreate"))
        };
        // A stream that waits for the default stream, on which buffers are filled.
        let stream = result::stream::create(result::stream::StreamKind::Default);
        Ok(Self {
            stream: stream.map_err(error("cuStreamCreate"))?,
            start: event()?,
            stop: event()?,
            flush: Buffer::on_device(FLUSH_L2S * l2.max(1) as usize)?,
        })
    }

    pub(crate) fn stream(&self) -> Stream {
        // SAFETY: the stream lives until the process ends.
        unsafe { Stream::from_raw(self.stream.cast()) }
    }

    /// Microseconds that the stream needs for `work`, which finds none of its data in the L2 cache.
    pub(crate) fn time(&self, work: impl FnOnce() -> Result<(), Error>) -> Result<f64, Error> {
        let flush = self.flush.mem();
        // SAFETY: the buffer has as many bytes; stream and events are alive.
        unsafe {
            result::memset_d8_async(flush.address(), 0, flush.bytes(), self.stream)
                .map_err(error("cuMemsetD8Async"))?;
            result::event::record(self.start, self.stream).map_err(error("cuEventRecord"))?;
        }
        work()?;
        // SAFETY: as above.
        let ms = unsafe {
            result::event::record(self.stop, self.stream).map_err(error("cuEventRecord"))?;
            result::event::synchronize(self.stop).map_err(error("cuEventSynchronize"))?;
            result::event::elapsed(self.start, self.stop).map_err(error("cuEventElapsedTime"))?
        };
        Ok(f64::from(ms) * 1e3)
    }

    /// Gigabytes read and written per second by a copy on the device, the best of a few.
    pub(crate) fn copy_bandwidth(&self) -> Result<f64, Error> {
        let (from, to) = (Buffer::on_device(COPY_BYTES)?, Buffer::on_device(COPY_BYTES)?);
        let (from, to) = (from.mem().address(), to.mem().address());
        let mut best = f64::INFINITY;
        for _ in 0..COPY_ROUNDS {
            let us = self.time(|| {
                // SAFETY: both buffers have as many bytes.
                unsafe { result::memcpy_dtod_async(to, from, COPY_BYTES, self.stream) }
                    .map_err(error("cuMemcpyDtoDAsync"))
            })?;
            best = best.min(us);
        }
        Ok(2.0 * COPY_BYTES as f64 / best / 1e3)
    }
}
