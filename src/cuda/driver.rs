//! The CUDA driver, opened when a context is first asked for: contexts, attributes, what a pointer points at.
#![allow(unsafe_code)]

use crate::error::{Error, Result};
use cudarc::driver::{DriverError, result, sys};
use std::ffi::{c_int, c_void};
use std::sync::OnceLock;

/// Kernels are compiled by nvcc 13, whose code no older driver loads.
const MIN_DRIVER: c_int = 13000;

/// Tensor core and asynchronous copy instructions of the kernels need at least this compute capability.
const MIN_CAPABILITY: (u32, u32) = (8, 0);

/// Turns what the driver says into [`Error::Cuda`].
pub(super) fn error(during: &'static str) -> impl Fn(DriverError) -> Error {
    move |e| {
        let text = |s: std::result::Result<&std::ffi::CStr, DriverError>| {
            s.map_or_else(|_| "unknown".to_owned(), |s| s.to_string_lossy().into_owned())
        };
        let text = format!("{}: {}", text(e.error_name()), text(e.error_string()));
        Error::Cuda { during, code: e.0 as i32, text }
    }
}

/// Opens the driver, once per process.
fn open_driver() -> Result<()> {
    static STATE: OnceLock<std::result::Result<(), String>> = OnceLock::new();
    STATE.get_or_init(try_open_driver).clone().map_err(|reason| Error::Unavailable { reason })
}

fn try_open_driver() -> std::result::Result<(), String> {
    // SAFETY: only tries to open the library. Its initialisers are the driver's own.
    if !unsafe { sys::is_culib_present() } {
        return Err("no CUDA driver (libcuda.so.1) was found".to_owned());
    }
    let mut version = 0;
    // SAFETY: writes one int; every driver has the function, and it may be called before cuInit.
    unsafe { sys::cuDriverGetVersion(&raw mut version) }
        .result()
        .map_err(|e| format!("the CUDA driver does not tell its version: {e}"))?;
    if version < MIN_DRIVER {
        let name = |v: c_int| format!("{}.{}", v / 1000, v % 1000 / 10);
        return Err(format!(
            "the CUDA driver supports CUDA {}; needed: {} or newer (driver 580 or newer)",
            name(version),
            name(MIN_DRIVER)
        ));
    }
    match result::init() {
        Ok(()) => Ok(()),
        Err(DriverError(sys::CUresult::CUDA_ERROR_NO_DEVICE)) => Err("no CUDA device".to_owned()),
        Err(e) => Err(format!("the CUDA driver does not start: {e}")),
    }
}

/// A CUDA context on one device.
#[derive(Debug)]
pub(super) struct DeviceContext {
    handle: sys::CUcontext,
    device: sys::CUdevice,
    /// The primary context, which this value has retained; else one of the caller's.
    primary: bool,
    pub(super) ordinal: usize,
    pub(super) capability: (u32, u32),
    pub(super) multiprocessors: u32,
    /// Shared memory a block can ask for.
    pub(super) shared_bytes: u32,
}

// SAFETY: the handles are names that the driver accepts on every thread; nothing behind them is touched here.
unsafe impl Send for DeviceContext {}
// SAFETY: as above.
unsafe impl Sync for DeviceContext {}

impl DeviceContext {
    /// The calling thread's context if it is one of device `ordinal`, else the device's primary context.
    pub(super) fn open(ordinal: usize) -> Result<Self> {
        open_driver()?;
        let count = result::device::get_count().map_err(error("cuDeviceGetCount"))?;
        let index = c_int::try_from(ordinal).ok().filter(|index| *index < count);
        let index = index.ok_or_else(|| {
            Error::invalid("device", ordinal, format!("0 to {} ({count} CUDA devices)", count - 1))
        })?;
        let device = result::device::get(index).map_err(error("cuDeviceGet"))?;
        use sys::CUdevice_attribute_enum as Attribute;
        let attribute = |attribute| {
            // SAFETY: `device` comes from the driver.
            let value = unsafe { result::device::get_attribute(device, attribute) };
            value.map(|v| v.max(0) as u32).map_err(error("cuDeviceGetAttribute"))
        };
        let capability = (
            attribute(Attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR)?,
            attribute(Attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR)?,
        );
        if capability < MIN_CAPABILITY {
            let name = |(major, minor)| format!("{major}.{minor}");
            let reason = format!(
                "device {ordinal} has compute capability {}; needed: {} or higher",
                name(capability),
                name(MIN_CAPABILITY)
            );
            return Err(Error::Unavailable { reason });
        }
        let multiprocessors = attribute(Attribute::CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT)?;
        let shared_bytes = attribute(Attribute::CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN)?;
        let callers = current()?.filter(|_| device_of_current().is_ok_and(|d| d == device));
        // SAFETY: `device` comes from the driver; `release` pairs with it, in `drop` or below.
        let retained =
            unsafe { result::primary_ctx::retain(device) }.map_err(error("cuDevicePrimaryCtxRetain"))?;
        let (handle, primary) = match callers {
            Some(handle) if handle != retained => {
                release(device);
                (handle, false)
            }
            _ => (retained, true),
        };
        Ok(Self { handle, device, primary, ordinal, capability, multiprocessors, shared_bytes })
    }

    /// Makes the context current until the result is dropped.
    pub(super) fn enter(&self) -> Result<Entered> {
        if current()? == Some(self.handle) {
            return Ok(Entered { pushed: false });
        }
        // SAFETY: the context is retained, or the caller's, who keeps it as `Context::cuda` asks.
        unsafe { sys::cuCtxPushCurrent_v2(self.handle) }.result().map_err(error("cuCtxPushCurrent"))?;
        Ok(Entered { pushed: true })
    }
}

impl Drop for DeviceContext {
    fn drop(&mut self) {
        if self.primary {
            release(self.device);
        }
    }
}

/// Gives a retained primary context back.
fn release(device: sys::CUdevice) {
    // SAFETY: pairs with a `retain`. Nothing can be done about an error, which a driver that shuts down gives.
    let _ = unsafe { result::primary_ctx::release(device) };
}

fn current() -> Result<Option<sys::CUcontext>> {
    result::ctx::get_current().map_err(error("cuCtxGetCurrent"))
}

/// Device of the calling thread's context, of which there is one.
fn device_of_current() -> Result<sys::CUdevice> {
    let mut device = 0;
    // SAFETY: writes one device handle.
    unsafe { sys::cuCtxGetDevice(&raw mut device) }.result().map_err(error("cuCtxGetDevice"))?;
    Ok(device)
}

/// While it lives, a [`DeviceContext`] is current on the thread that entered it.
#[derive(Debug)]
#[must_use]
pub(super) struct Entered {
    pushed: bool,
}

impl Drop for Entered {
    fn drop(&mut self) {
        if self.pushed {
            let mut popped = std::ptr::null_mut();
            // SAFETY: undoes the push of `enter` on the same thread (`CUcontext` in no field, but the value is only
            // ever held in a local variable of this module's callers).
            let _ = unsafe { sys::cuCtxPopCurrent_v2(&raw mut popped) };
        }
    }
}

/// What the driver knows of an address.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum AddressOf {
    /// Memory of the device with this ordinal, managed memory included.
    Device(usize),
    /// Host memory, or nothing the driver knows.
    Host,
}

/// What `address` points at. A context must be current.
pub(super) fn address_of(address: u64) -> Result<AddressOf> {
    use sys::CUpointer_attribute_enum as Attribute;
    let mut kind: u32 = 0;
    let mut ordinal: c_int = -1;
    let mut attributes =
        [Attribute::CU_POINTER_ATTRIBUTE_MEMORY_TYPE, Attribute::CU_POINTER_ATTRIBUTE_DEVICE_ORDINAL];
    let mut data: [*mut c_void; 2] = [(&raw mut kind).cast(), (&raw mut ordinal).cast()];
    // SAFETY: two attributes, and for each a place of its type. Unlike the query of one attribute, this succeeds for
    // addresses the driver does not know, and leaves zeros.
    unsafe {
        sys::cuPointerGetAttributes(data.len() as u32, attributes.as_mut_ptr(), data.as_mut_ptr(), address)
    }
    .result()
    .map_err(error("cuPointerGetAttributes"))?;
    Ok(match usize::try_from(ordinal) {
        Ok(ordinal) if kind == sys::CUmemorytype_enum::CU_MEMORYTYPE_DEVICE as u32 => {
            AddressOf::Device(ordinal)
        }
        _ => AddressOf::Host,
    })
}

/// A few 32-bit words of device memory, zero at first, that kernels count in.
#[derive(Debug)]
pub(super) struct Words<const N: usize> {
    address: sys::CUdeviceptr,
}

impl<const N: usize> Words<N> {
    /// Allocates them in the current context.
    pub(super) fn new() -> Result<Self> {
        // SAFETY: the size is not 0; `free` pairs with it.
        let address =
            unsafe { result::malloc_sync(4 * N) }.map_err(|_| Error::OutOfMemory { bytes: 4 * N })?;
        let words = Self { address };
        words.clear().inspect_err(|_| words.free())?;
        Ok(words)
    }

    /// Address of word `i`.
    pub(super) fn word(&self, i: usize) -> *mut u32 {
        (self.address as usize as *mut u32).wrapping_add(i)
    }

    /// Reads the words and sets them to zero.
    pub(super) fn take(&self) -> Result<[u32; N]> {
        let mut values = [0u32; N];
        // SAFETY: N words are readable at the address.
        unsafe { result::memcpy_dtoh_sync(&mut values, self.address) }.map_err(error("cuMemcpyDtoH"))?;
        if values != [0; N] {
            self.clear()?;
        }
        Ok(values)
    }

    fn clear(&self) -> Result<()> {
        // SAFETY: N words are writable at the address.
        unsafe { result::memset_d8_sync(self.address, 0, 4 * N) }.map_err(error("cuMemsetD8"))
    }

    /// Frees them; nothing may use them afterwards.
    pub(super) fn free(&self) {
        // SAFETY: allocated by `new` and freed once, by its owner's drop. An error cannot be dealt with.
        let _ = unsafe { result::free_sync(self.address) };
    }
}
