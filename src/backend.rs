//! Backends and the context that every op takes.
#![allow(unsafe_code)]

use crate::cpu::Level;
use crate::cuda::Device;
use crate::error::{Error, Result};
use std::ffi::c_void;
use std::fmt;
use std::sync::Arc;

/// Where ops run.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Backend {
    /// Host memory, SIMD chosen at run time.
    Cpu,
    /// Memory of one CUDA device; ops are submitted to a stream.
    Cuda,
}

/// How ops run on the CPU.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Cpu {
    /// Threads an op may use.
    pub(crate) threads: usize,
    /// Instructions, which this processor has.
    pub(crate) level: Level,
}

#[derive(Debug, Clone)]
enum Target {
    Cpu(Cpu),
    Cuda(Arc<Device>),
}

/// What an op hands its checked arguments to.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Run<'a> {
    Cpu(Cpu),
    Cuda(&'a Arc<Device>),
}

/// A backend ready to run ops. Immutable after creation: share it between threads freely.
#[derive(Debug, Clone)]
pub struct Context {
    target: Target,
}

impl Context {
    /// The CPU backend. `threads` is how many threads an op may use; 1 keeps every op on the calling thread.
    ///
    /// Instructions are those the processor offers; `MUSTAFAR_CPU=portable|avx2|avx512` in the environment caps
    /// them, for testing. Masks and pages do not depend on either setting; attention differs by rounding between
    /// instruction sets, never between thread counts.
    ///
    /// # Errors
    /// [`Error::InvalidArgument`] unless `1 <= threads <= 1024`, or when `MUSTAFAR_CPU` has another value.
    pub fn cpu(threads: usize) -> Result<Self> {
        Self::cpu_with_level(threads, Level::detect()?)
    }

    /// As [`Context::cpu`] at a given instruction level.
    ///
    /// # Errors
    /// As [`Context::cpu`]; [`Error::Unavailable`] when the processor lacks the level.
    pub fn cpu_with_level(threads: usize, level: Level) -> Result<Self> {
        if threads == 0 || threads > 1024 {
            return Err(Error::invalid("threads", threads, "1 to 1024"));
        }
        if !level.available() {
            return Err(Error::Unavailable { reason: format!("this processor has no {level}") });
        }
        Ok(Self { target: Target::Cpu(Cpu { threads, level }) })
    }

    /// The CUDA backend on device `ordinal` (as the driver counts them, `CUDA_VISIBLE_DEVICES` applied).
    ///
    /// Works in the CUDA context that is current on the calling thread if that belongs to the device (it must then
    /// outlive this context and its clones), else in the device's primary context, the one the CUDA runtime and
    /// PyTorch use. Loads every kernel, so that ops never do; allocates 16 bytes of device memory. What is current
    /// on the calling thread is the same afterwards, here and in every op.
    ///
    /// # Errors
    /// [`Error::Unavailable`] without a driver, a device or compiled kernels, or when driver or device are too old;
    /// [`Error::InvalidArgument`] for an ordinal past the last device; [`Error::Cuda`] when the driver refuses.
    pub fn cuda(ordinal: usize) -> Result<Self> {
        Ok(Self { target: Target::Cuda(Arc::new(Device::open(ordinal)?)) })
    }

    /// The backend that ops given this context run on.
    #[must_use]
    pub fn backend(&self) -> Backend {
        match self.target {
            Target::Cpu(_) => Backend::Cpu,
            Target::Cuda(_) => Backend::Cuda,
        }
    }

    /// Threads an op may use; `None` unless on the CPU backend.
    #[must_use]
    pub fn threads(&self) -> Option<usize> {
        match self.target {
            Target::Cpu(cpu) => Some(cpu.threads),
            Target::Cuda(_) => None,
        }
    }

    /// Instruction level; `None` unless on the CPU backend.
    #[must_use]
    pub fn level(&self) -> Option<Level> {
        match self.target {
            Target::Cpu(cpu) => Some(cpu.level),
            Target::Cuda(_) => None,
        }
    }

    /// What went wrong in finished ops of this context since the last call, which CUDA ops cannot return: they have
    /// returned long before. Always nothing on the CPU backend, where ops return their errors.
    ///
    /// Waits for the device's default stream only: synchronise the stream of the ops first. Not for graph capture.
    ///
    /// # Errors
    /// [`Error::Cuda`] when the driver refuses, which is where a fault of an earlier kernel shows.
    pub fn take_device_errors(&self) -> Result<DeviceErrors> {
        match &self.target {
            Target::Cpu(_) => Ok(DeviceErrors::default()),
            Target::Cuda(device) => device.take_errors(),
        }
    }

    pub(crate) fn run(&self) -> Run<'_> {
        match &self.target {
            Target::Cpu(cpu) => Run::Cpu(*cpu),
            Target::Cuda(device) => Run::Cuda(device),
        }
    }
}

/// Such as `cpu, avx2, 1 thread` or `cuda device 0`.
impl fmt::Display for Context {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.target {
            Target::Cpu(Cpu { threads: 1, level }) => write!(f, "cpu, {level}, 1 thread"),
            Target::Cpu(Cpu { threads, level }) => write!(f, "cpu, {level}, {threads} threads"),
            Target::Cuda(device) => write!(f, "cuda device {}", device.ordinal()),
        }
    }
}

/// Work that CUDA ops left undone because of what device arrays held; see [`Context::take_device_errors`].
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct DeviceErrors {
    /// Tokens that `append` skipped: slot or sequence out of range.
    pub append: u32,
    /// Pages (of one head) that `compress` left unwritten: too full, or page number out of range.
    pub compress: u32,
    /// Lengths and page numbers that `decompress` or spmv found out of range, and rows whose bitmap does not fit their
    /// values.
    pub read: u32,
}

impl DeviceErrors {
    /// Nothing went wrong.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        *self == Self::default()
    }
}

/// The queue an op is submitted to: a CUDA stream (`cudaStream_t`, `CUstream`), null on the CPU backend, where
/// ops have finished when they return.
#[derive(Debug, Clone, Copy)]
pub struct Stream(*mut c_void);

impl Stream {
    /// No stream: the CPU backend.
    pub const NONE: Self = Self(std::ptr::null_mut());

    /// A stream handle of the caller's.
    ///
    /// # Safety
    /// On the CUDA backend it is null (the default stream) or a live stream of the context that ops run in, until they
    /// have been submitted.
    #[must_use]
    pub unsafe fn from_raw(stream: *mut c_void) -> Self {
        Self(stream)
    }

    /// The handle.
    #[must_use]
    pub fn as_raw(self) -> *mut c_void {
        self.0
    }

    /// Refuses a stream where the backend has none.
    pub(crate) fn check(self, context: &Context) -> Result<()> {
        match context.backend() {
            Backend::Cpu if !self.0.is_null() => {
                Err(Error::invalid("stream", format!("{:p}", self.0), "null on the CPU backend"))
            }
            Backend::Cpu | Backend::Cuda => Ok(()),
        }
    }
}
