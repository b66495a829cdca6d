//! Backends and the context that every op takes.

use crate::cpu::Level;
use crate::error::{Error, Result};
use std::ffi::c_void;

/// Where ops run.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Backend {
    /// Host memory, SIMD chosen at run time.
    Cpu,
}

/// A backend ready to run ops. Immutable after creation: share it between threads freely.
#[derive(Debug, Clone)]
pub struct Context {
    threads: usize,
    level: Level,
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
        Ok(Self { threads, level })
    }

    /// The backend that ops given this context run on.
    #[must_use]
    pub fn backend(&self) -> Backend {
        Backend::Cpu
    }

    /// Threads an op may use on the CPU backend.
    #[must_use]
    pub fn threads(&self) -> usize {
        self.threads
    }

    /// Instruction level of the CPU backend.
    #[must_use]
    pub fn level(&self) -> Level {
        self.level
    }
}

/// The queue an op is submitted to: a CUDA stream (`cudaStream_t`, `CUstream`), null on the CPU backend, where
/// ops have finished when they return.
#[derive(Debug, Clone, Copy)]
pub struct Stream(*mut c_void);

impl Stream {
    /// No stream: the CPU backend.
    pub const NONE: Self = Self(std::ptr::null_mut());

    /// A stream handle of the caller's. It is passed on, never dereferenced here.
    #[must_use]
    pub fn from_raw(stream: *mut c_void) -> Self {
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
            Backend::Cpu => Ok(()),
        }
    }
}
