//! The context: which backend runs the ops, and how.

use crate::backend::{Backend, Context};
use crate::capi::error::boundary;
use crate::capi::handle::{borrow, destroy, put, store};
use crate::capi::status::mustafar_status;
use crate::capi::structs::{extensible, read_optional};
use crate::capi::views::reserved;
use crate::error::Error;

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
}

/// How to make a context.
#[derive(Debug, Clone, Copy)]
#[repr(C)]
pub struct mustafar_context_config {
    /// sizeof(mustafar_context_config).
    pub struct_size: usize,
    /// A mustafar_backend.
    pub backend: u32,
    /// CPU: threads one op may use, 1 to 1024; 0 is 1, which keeps every op on the calling thread.
    pub threads: u32,
    /// Index of the device; 0 on the CPU backend.
    pub device: u32,
    /// Must be 0.
    pub reserved: u32,
}

extensible!(mustafar_context_config, first_release_ends_with reserved, {
    struct_size, backend, threads, device, reserved,
});

/// Makes a context. The environment variable MUSTAFAR_CPU (portable, avx2, avx512) caps the instructions that the
/// CPU backend uses; it is read here and nowhere else.
///
/// @param config   What to make; NULL is the CPU backend on the calling thread.
/// @param context  Receives the handle; mustafar_context_destroy ends it.
/// @return SUCCESS; INVALID_ARGUMENT for a field or MUSTAFAR_CPU; UNAVAILABLE when the backend cannot run here;
///         NULL_POINTER, MISALIGNED or VERSION_MISMATCH for the pointers.
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
        if backend != mustafar_backend::Cpu as u32 {
            return Err(Error::invalid("config.backend", backend, "0 (CPU)"));
        }
        if device != 0 {
            return Err(Error::invalid("config.device", device, "0 on the CPU backend"));
        }
        let made = Context::cpu(threads.max(1) as usize)?;
        // SAFETY: the contract of this module.
        unsafe { store("context", context, mustafar_context { context: made }) }
    })
}

/// Ends a context. Caches made with it stay usable.
///
/// @param context  The context; NULL is nothing to do. No call may be using it.
/// @return SUCCESS; MISALIGNED for a pointer that cannot be a handle.
///
/// Async: no. Graph capture: no. Workspace: none. Deterministic: yes. Thread-safe: yes, but for this context.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn mustafar_context_destroy(context: *mut mustafar_context) -> mustafar_status {
    // SAFETY: the contract of this module.
    boundary(|| unsafe { destroy("context", context) })
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
        };
        // SAFETY: the contract of this module.
        unsafe { put("backend", backend, code as u32) }
    })
}
