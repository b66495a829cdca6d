//! Memory of the backend that is measured.
#![allow(unsafe_code)]

use cudarc::driver::{DriverError, result};
use mustafar::mem::Element;
use mustafar::{Backend, Context, Error, Mem, MemMut, Place};

/// [`Error::Cuda`] from what the driver says.
pub(crate) fn error(during: &'static str) -> impl Fn(DriverError) -> Error {
    move |e| Error::Cuda { during, code: e.0 as i32, text: e.to_string() }
}

/// Bytes that start as zeros, on a boundary of at least 64 bytes.
pub(crate) enum Buffer {
    Host { raw: Vec<u8>, start: usize, bytes: usize },
    Device { address: u64, bytes: usize },
}

impl Buffer {
    pub(crate) fn zeroed(context: &Context, bytes: usize) -> Result<Self, Error> {
        match context.backend() {
            Backend::Cuda => Self::on_device(bytes),
            _ => Self::on_host(bytes),
        }
    }

    /// A copy of `values`.
    pub(crate) fn holding<T: Element>(context: &Context, values: &[T]) -> Result<Self, Error> {
        let mut new = Self::zeroed(context, size_of_val(values))?;
        new.write(0, values)?;
        Ok(new)
    }

    fn on_host(bytes: usize) -> Result<Self, Error> {
        let room = bytes.saturating_add(63);
        let mut raw = Vec::new();
        raw.try_reserve_exact(room).map_err(|_| Error::OutOfMemory { bytes })?;
        raw.resize(room, 0);
        Ok(Self::Host { start: raw.as_ptr().align_offset(64), raw, bytes })
    }

    /// In the CUDA context that is current, which the caller sees to.
    pub(crate) fn on_device(bytes: usize) -> Result<Self, Error> {
        // SAFETY: the size is not 0; `drop` frees it.
        let address = unsafe { result::malloc_sync(bytes.max(1)) };
        let address = address.map_err(|_| Error::OutOfMemory { bytes })?;
        let new = Self::Device { address, bytes };
        // SAFETY: the allocation has as many bytes.
        unsafe { result::memset_d8_sync(address, 0, bytes.max(1)) }.map_err(error("cuMemsetD8"))?;
        Ok(new)
    }

    /// Overwrites the bytes from `at` on.
    pub(crate) fn write<T: Element>(&mut self, at: usize, values: &[T]) -> Result<(), Error> {
        let count = size_of_val(values);
        assert!(at + count <= self.bytes(), "write past the end");
        match self {
            Self::Host { raw, start, .. } => {
                // SAFETY: elements have no padding, so that all their bytes can be read.
                let values = unsafe { std::slice::from_raw_parts(values.as_ptr().cast::<u8>(), count) };
                raw[*start + at..][..count].copy_from_slice(values);
                Ok(())
            }
            Self::Device { address, .. } => {
                // SAFETY: inside the allocation, as was just checked.
                unsafe { result::memcpy_htod_sync(*address + at as u64, values) }
                    .map_err(error("cuMemcpyHtoD"))
            }
        }
    }

    pub(crate) fn bytes(&self) -> usize {
        let (Self::Host { bytes, .. } | Self::Device { bytes, .. }) = self;
        *bytes
    }

    pub(crate) fn mem(&self) -> Mem<'_> {
        match self {
            Self::Host { raw, start, bytes } => Mem::host(&raw[*start..][..*bytes]),
            // SAFETY: an allocation of this size. It is freed by a call that waits for the device.
            Self::Device { address, bytes } => unsafe { Mem::from_raw(*address, *bytes, Place::Device) },
        }
    }

    pub(crate) fn mem_mut(&mut self) -> MemMut<'_> {
        match self {
            Self::Host { raw, start, bytes } => MemMut::host(&mut raw[*start..][..*bytes]),
            // SAFETY: as in `mem`; `&mut self` makes this the only view.
            Self::Device { address, bytes } => unsafe { MemMut::from_raw(*address, *bytes, Place::Device) },
        }
    }
}

/// Nothing, on the host.
impl Default for Buffer {
    fn default() -> Self {
        Self::Host { raw: Vec::new(), start: 0, bytes: 0 }
    }
}

impl Drop for Buffer {
    fn drop(&mut self) {
        if let Self::Device { address, .. } = self {
            // SAFETY: allocated by `on_device`, freed once. Nothing can be done about an error.
            let _ = unsafe { result::free_sync(*address) };
        }
    }
}
