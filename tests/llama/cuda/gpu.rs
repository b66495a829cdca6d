//! A device: its stream and its memory.
#![allow(unsafe_code, reason = "the driver takes raw addresses")]

use crate::llama::error::{Error, Result};
use cudarc::driver::{DriverError, result, sys};
use mustafar::mem::Element;
use mustafar::{Context, Mem, MemMut, Place, Stream};
use std::rc::Rc;

/// [`mustafar::Error::Cuda`] from what the driver says.
pub fn driver_error(during: &'static str) -> impl Fn(DriverError) -> Error {
    move |e| mustafar::Error::Cuda { during, code: e.0 as i32, text: e.to_string() }.into()
}

/// A device of the CUDA backend with a stream, on which everything runs. Its primary context becomes current on the
/// thread that opens it, and must stay so.
#[derive(Debug)]
pub struct Gpu {
    context: Context,
    device: sys::CUdevice,
    stream: sys::CUstream,
    name: String,
}

impl Gpu {
    /// Opens device `ordinal`.
    ///
    /// # Errors
    /// [`mustafar::Error::Unavailable`] where there is no driver, device, cuBLAS or NVRTC.
    pub fn open(ordinal: usize) -> Result<Rc<Self>> {
        let context = Context::cuda(ordinal)?;
        // SAFETY: only tries to open libraries, whose initialisers are NVIDIA's own.
        let found = unsafe {
            [
                ("cuBLAS (libcublas.so)", cudarc::cublas::sys::is_culib_present()),
                ("NVRTC (libnvrtc.so)", cudarc::nvrtc::sys::is_culib_present()),
            ]
        };
        if let Some((name, _)) = found.iter().find(|(_, present)| !present) {
            let reason = format!("no {name} of CUDA 13 was found; LD_LIBRARY_PATH may say where it is");
            return Err(mustafar::Error::Unavailable { reason }.into());
        }
        let device = result::device::get(ordinal as i32).map_err(driver_error("cuDeviceGet"))?;
        // SAFETY: the device exists; the context stays retained until the process ends.
        unsafe {
            let primary =
                result::primary_ctx::retain(device).map_err(driver_error("cuDevicePrimaryCtxRetain"))?;
            result::ctx::set_current(primary).map_err(driver_error("cuCtxSetCurrent"))?;
        }
        // Ordered with the default stream, on which the driver fills memory.
        let stream = result::stream::create(result::stream::StreamKind::Default)
            .map_err(driver_error("cuStreamCreate"))?;
        let name = result::device::get_name(device).map_err(driver_error("cuDeviceGetName"))?;
        Ok(Rc::new(Self { context, device, stream, name }))
    }

    /// What caches and ops run with.
    pub fn context(&self) -> &Context {
        &self.context
    }

    pub fn name(&self) -> &str {
        &self.name
    }

    /// Compute capability as NVRTC writes it, such as 90.
    pub fn capability(&self) -> Result<i32> {
        use sys::CUdevice_attribute_enum as Attribute;
        let attribute = |attribute| {
            // SAFETY: the driver gave the device.
            unsafe { result::device::get_attribute(self.device, attribute) }
                .map_err(driver_error("cuDeviceGetAttribute"))
        };
        Ok(10 * attribute(Attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR)?
            + attribute(Attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR)?)
    }

    pub fn stream(&self) -> Stream {
        // SAFETY: the stream lives as long as `self`, which everything on it borrows or holds.
        unsafe { Stream::from_raw(self.stream.cast()) }
    }

    pub fn raw_stream(&self) -> sys::CUstream {
        self.stream
    }

    /// Waits for everything that was submitted.
    pub fn synchronize(&self) -> Result<()> {
        // SAFETY: the stream is alive.
        unsafe { result::stream::synchronize(self.stream) }.map_err(driver_error("cuStreamSynchronize"))
    }

    /// Bytes of device memory that nobody uses, and that there are.
    pub fn memory(&self) -> Result<(usize, usize)> {
        result::mem_get_info().map_err(driver_error("cuMemGetInfo"))
    }
}

impl Drop for Gpu {
    fn drop(&mut self) {
        // SAFETY: made in `open`, destroyed once. Nothing can be done about an error.
        let _ = unsafe { result::stream::destroy(self.stream) };
    }
}

/// Device memory.
#[derive(Debug)]
pub struct Buffer {
    gpu: Rc<Gpu>,
    address: u64,
    bytes: usize,
}

impl Buffer {
    /// `bytes` bytes of any contents.
    ///
    /// # Errors
    /// [`Error::DeviceMemory`].
    pub fn new(gpu: &Rc<Gpu>, bytes: usize) -> Result<Self> {
        // SAFETY: the size is not 0; freed in `drop`.
        let allocated = unsafe { result::malloc_sync(bytes.max(1)) };
        let Ok(address) = allocated else {
            let (free, total) = gpu.memory()?;
            return Err(Error::DeviceMemory { asked: bytes, free, total, fits: None });
        };
        Ok(Self { gpu: Rc::clone(gpu), address, bytes })
    }

    /// Room for `count` elements.
    pub fn elements<T>(gpu: &Rc<Gpu>, count: usize) -> Result<Self> {
        Self::new(gpu, count * size_of::<T>())
    }

    /// A copy of `values`.
    pub fn of<T: Element>(gpu: &Rc<Gpu>, values: &[T]) -> Result<Self> {
        let new = Self::new(gpu, size_of_val(values))?;
        new.write(values)?;
        Ok(new)
    }

    pub fn address(&self) -> u64 {
        self.address
    }

    /// Address of the `index`-th element.
    pub fn at<T>(&self, index: usize) -> u64 {
        assert!(index * size_of::<T>() <= self.bytes, "outside the buffer");
        self.address + (index * size_of::<T>()) as u64
    }

    pub fn bytes(&self) -> usize {
        self.bytes
    }

    /// Overwrites the first elements, after everything that was submitted. The values may change once this returns.
    pub fn write<T: Element>(&self, values: &[T]) -> Result<()> {
        assert!(size_of_val(values) <= self.bytes, "write past the end");
        if values.is_empty() {
            return Ok(());
        }
        // SAFETY: the allocation has as many bytes. The driver copies pageable memory before it returns.
        unsafe { result::memcpy_htod_async(self.address, values, self.gpu.stream) }
            .map_err(driver_error("cuMemcpyHtoDAsync"))
    }

    /// The first elements, once everything that was submitted has run.
    pub fn read<T: Element + Default>(&self, count: usize) -> Result<Vec<T>> {
        assert!(count * size_of::<T>() <= self.bytes, "read past the end");
        let mut values = vec![T::default(); count];
        if count > 0 {
            // SAFETY: the allocation has as many bytes, and the values stay until the stream has been waited for.
            unsafe { result::memcpy_dtoh_async(&mut values, self.address, self.gpu.stream) }
                .map_err(driver_error("cuMemcpyDtoHAsync"))?;
        }
        self.gpu.synchronize()?;
        Ok(values)
    }

    /// A view from the `first`-th byte on.
    pub fn mem(&self, first: usize) -> Mem<'_> {
        assert!(first <= self.bytes, "outside the buffer");
        // SAFETY: the allocation reaches that far; freeing it waits for the device.
        unsafe { Mem::from_raw(self.address + first as u64, self.bytes - first, Place::Device) }
    }

    /// As [`Buffer::mem`], for writing. What writes to it is ordered by the one stream.
    pub fn mem_mut(&self, first: usize) -> MemMut<'_> {
        assert!(first <= self.bytes, "outside the buffer");
        // SAFETY: as in `mem`.
        unsafe { MemMut::from_raw(self.address + first as u64, self.bytes - first, Place::Device) }
    }
}

impl Drop for Buffer {
    fn drop(&mut self) {
        // SAFETY: allocated by `new`, freed once. Nothing can be done about an error.
        let _ = unsafe { result::free_sync(self.address) };
    }
}
