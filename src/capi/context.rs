//! The context: which backend runs the ops, and how.

use crate::backend::{Backend, Context, DeviceErrors};
use crate::capi::error::boundary;
use crate::capi::handle::{borrow, destroy, put, store};
use crate::capi::status::mustafar_status;
use crate::capi::structs::{extensible, read_optional, write};
use crate::capi::views::reserved;
use crate::error::{Error, Result};

/// A backend that is ready to run ops. Immutable: any number of threads may use one at the same time. Not to be used
/// in a child process after fork.
#[derive(Debug)]
pub struct mustafar_context {
    pub(super) context: Context,
}

/// Where ops run, and in which memory data pointers point.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u32)]
pub enum mustafar_backend {
    /// On the calling process's processor; all pointers are host pointers.
    Cpu = 0,
    /// On a CUDA device; all data pointers are device pointers. Structures are host memory all the same.
    Cuda = 1,
}

/// The backend with this code.
pub(super) fn backend(argument: &'static str, code: u32) -> Result<Backend> {
    match code {
        0 => Ok(Backend::Cpu),
        1 => Ok(Backend::Cuda),
        _ => Err(Error::invalid(argument, code, "0 (CPU), 1 (CUDA)")),
    }
}

/// How to make a context.
#[derive(Debug, Clone, Copy)]
#[repr(C)]
pub struct mustafar_context_config {
    /// sizeof(mustafar_context_config).
    pub struct_size: usize,
    /// A mustafar_backend.
    pub backend: u32,
    /// CPU: threads one op may use, 1 to 1024; 0 is 1, which keeps every op on the calling thread. CUDA: 0.
    pub threads: u32,
    /// CUDA: index of the device, as the driver counts them. CPU: 0.
    pub device: u32,
    /// Must be 0.
    pub reserved: u32,
}

extensible!(mustafar_context_config, first_release_ends_with reserved, {
    struct_size, backend, threads, device, reserved,
});

/// Makes a context. The environment variable MUSTAFAR_CPU (portable, avx2, avx512) caps the instructions that the
/// CPU backend uses; it is read here and by mustafar_attend_advice.
///
/// CUDA: uses the CUDA context that is current on the calling thread if that belongs to the device (it must then
/// outlive this context), else the device's primary one, which the CUDA runtime and PyTorch use. Loads all kernels and
/// allocates 16 bytes of device memory, so that ops do neither. What is current on a calling thread never changes.
///
/// @param config   What to make; NULL is the CPU backend on the calling thread.
/// @param context  Receives the handle; mustafar_context_destroy ends it.
/// @return SUCCESS; INVALID_ARGUMENT for a field or MUSTAFAR_CPU; UNAVAILABLE when the backend cannot run here (no CUDA
///         driver, device or kernels, or too old ones); CUDA when the driver refuses; NULL_POINTER, MISALIGNED or
///         VERSION_MISMATCH for the pointers.
///
/// Async: no. Graph capture: no. Workspace: none, allocates. Deterministic: yes. Thread-safe: yes.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn mustafar_context_create(
    config: *const mustafar_context_config,
    context: *mut *mut mustafar_context,
) -> mustafar_status {
    boundary(|| {
        // SAFETY: the contract of this module.
        let config = unsafe { read_optional("config", config)? };
        let (backend, threads, device) = config.map_or((0, 0, 0), |c| (c.backend, c.threads, c.device));
        reserved("config.reserved", config.map_or(0, |c| c.reserved))?;
        let made = match self::backend("config.backend", backend)? {
            Backend::Cpu if device != 0 => {
                return Err(Error::invalid("config.device", device, "0 on the CPU backend"));
            }
            Backend::Cpu => Context::cpu(threads.max(1) as usize)?,
            Backend::Cuda if threads != 0 => {
                return Err(Error::invalid("config.threads", threads, "0 on the CUDA backend"));
            }
            Backend::Cuda => Context::cuda(device as usize)?,
        };
        // SAFETY: the contract of this module.
        unsafe { store("context", context, mustafar_context { context: made }) }
    })
}

/// Ends a context. Caches made with it stay usable.
///
/// @param context  The context; NULL is nothing to do. No call may be using it, and streams must have run its ops.
/// @return SUCCESS; MISALIGNED for a pointer that cannot be a handle.
///
/// Async: no. Graph capture: no. Workspace: none. Deterministic: yes. Thread-safe: yes, but for this context.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn mustafar_context_destroy(context: *mut mustafar_context) -> mustafar_status {
    // SAFETY: the contract of this module.
    boundary(|| unsafe { destroy("context", context) })
}

/// How often the CUDA ops of a context left something undone because of what device arrays held. Nothing else tells:
/// the calls have returned long before.
#[derive(Debug, Clone, Copy, Default)]
#[repr(C)]
pub struct mustafar_device_errors {
    /// sizeof(mustafar_device_errors).
    pub struct_size: usize,
    /// Tokens that append skipped: slot or sequence out of range.
    pub append: u32,
    /// Pages (of one head) that compress left unwritten: too full, or page number out of range.
    pub compress: u32,
    /// Lengths and page numbers that decompress, spmv_key or spmv_value found out of range, and rows whose bitmap does
    /// not fit their values.
    pub read: u32,
    /// Written as 0.
    pub reserved: u32,
}

extensible!(mustafar_device_errors, first_release_ends_with reserved, {
    struct_size, append, compress, read, reserved,
});

/// Reads and clears what went wrong in finished CUDA ops of a context. Always zeros on the CPU backend, where ops
/// return their errors.
///
/// @param context  The context.
/// @param errors   Receives the counts; set struct_size before.
/// @return SUCCESS; CUDA when the driver refuses, which is where a fault of an earlier kernel shows; NULL_POINTER,
///         MISALIGNED or INVALID_ARGUMENT for the pointers, before anything is cleared.
///
/// Async: no, but it waits for the default stream only: synchronise the streams of the ops first. Graph capture: no.
/// Workspace: none. Deterministic: yes. Thread-safe: yes.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn mustafar_context_take_device_errors(
    context: *const mustafar_context,
    errors: *mut mustafar_device_errors,
) -> mustafar_status {
    boundary(|| {
        // SAFETY: the contract of this module.
        let context = unsafe { borrow("context", context)? };
        let out = |e: DeviceErrors| mustafar_device_errors {
            struct_size: 0,
            append: e.append,
            compress: e.compress,
            read: e.read,
            reserved: 0,
        };
        // A pointer that cannot be written to is refused before the counts are cleared.
        // SAFETY: the contract of this module.
        unsafe { write("errors", errors, &out(DeviceErrors::default()))? };
        let taken = context.context.take_device_errors()?;
        // SAFETY: the contract of this module.
        unsafe { write("errors", errors, &out(taken)) }
    })
}

/// The backend of a context.
///
/// @param context  The context.
/// @param backend  Receives a mustafar_backend.
/// @return SUCCESS; NULL_POINTER or MISALIGNED.
///
/// Async: no. Graph capture: yes. Workspace: none. Deterministic: yes. Thread-safe: yes.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn mustafar_context_backend(
    context: *const mustafar_context,
    backend: *mut u32,
) -> mustafar_status {
    boundary(|| {
        // SAFETY: the contract of this module.
        let context = unsafe { borrow("context", context)? };
        let code = match context.context.backend() {
            Backend::Cpu => mustafar_backend::Cpu,
            Backend::Cuda => mustafar_backend::Cuda,
        };
        // SAFETY: the contract of this module.
        unsafe { put("backend", backend, code as u32) }
    })
}
