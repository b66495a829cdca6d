//! Status codes: one per variant of [`Error`].

use crate::error::Error;
use std::ffi::c_char;

/// What a call returns. Numbers never change their meaning and are never reused; new ones may be added.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(i32)]
pub enum mustafar_status {
    /// Done.
    Success = 0,
    /// An argument has a value that is never valid, or that contradicts another argument.
    InvalidArgument = 1,
    /// A pointer that must point somewhere is NULL.
    NullPointer = 2,
    /// An address, stride or offset is not a multiple of the alignment it needs.
    Misaligned = 3,
    /// A product or sum of sizes does not fit.
    Overflow = 4,
    /// A slot, page number, length or other index lies outside what it indexes.
    OutOfRange = 5,
    /// A buffer or workspace is smaller than the call needs.
    BufferTooSmall = 6,
    /// A valid request that no kernel serves.
    Unsupported = 7,
    /// A ragged page cannot hold the values its rows keep.
    PageOverflow = 8,
    /// The cache has no free page or sequence left.
    CacheFull = 9,
    /// The allocator refused.
    OutOfMemory = 10,
    /// Page or snapshot bytes violate the format.
    CorruptData = 11,
    /// Data or a structure belongs to an incompatible version or configuration.
    VersionMismatch = 12,
    /// The backend cannot run here.
    Unavailable = 13,
    /// The CUDA driver refused a call; the message has its code.
    Cuda = 14,
    /// A defect of this library. Outputs are undefined, the process and other objects are intact.
    Internal = 15,
}

impl mustafar_status {
    /// Every status with the name [`mustafar_status_name`] gives it.
    pub const ALL: [(Self, &'static std::ffi::CStr); 16] = [
        (Self::Success, c"SUCCESS"),
        (Self::InvalidArgument, c"INVALID_ARGUMENT"),
        (Self::NullPointer, c"NULL_POINTER"),
        (Self::Misaligned, c"MISALIGNED"),
        (Self::Overflow, c"OVERFLOW"),
        (Self::OutOfRange, c"OUT_OF_RANGE"),
        (Self::BufferTooSmall, c"BUFFER_TOO_SMALL"),
        (Self::Unsupported, c"UNSUPPORTED"),
        (Self::PageOverflow, c"PAGE_OVERFLOW"),
        (Self::CacheFull, c"CACHE_FULL"),
        (Self::OutOfMemory, c"OUT_OF_MEMORY"),
        (Self::CorruptData, c"CORRUPT_DATA"),
        (Self::VersionMismatch, c"VERSION_MISMATCH"),
        (Self::Unavailable, c"UNAVAILABLE"),
        (Self::Cuda, c"CUDA"),
        (Self::Internal, c"INTERNAL"),
    ];
}

impl From<&Error> for mustafar_status {
    fn from(error: &Error) -> Self {
        match error {
            Error::InvalidArgument { .. } => Self::InvalidArgument,
            Error::NullPointer { .. } => Self::NullPointer,
            Error::Misaligned { .. } => Self::Misaligned,
            Error::Overflow { .. } => Self::Overflow,
            Error::OutOfRange { .. } => Self::OutOfRange,
            Error::BufferTooSmall { .. } => Self::BufferTooSmall,
            Error::Unsupported { .. } => Self::Unsupported,
            Error::PageOverflow { .. } => Self::PageOverflow,
            Error::CacheFull { .. } => Self::CacheFull,
            Error::OutOfMemory { .. } => Self::OutOfMemory,
            Error::CorruptData { .. } => Self::CorruptData,
            Error::VersionMismatch { .. } => Self::VersionMismatch,
            Error::Unavailable { .. } => Self::Unavailable,
            Error::Cuda { .. } => Self::Cuda,
            Error::Internal { .. } => Self::Internal,
        }
    }
}

/// The name of a status without its prefix, such as "INVALID_ARGUMENT"; "UNKNOWN" for any other number.
///
/// @param status  A status of this or a newer version.
/// @return A string that is never freed and never NULL.
///
/// Async: no. Graph capture: yes. Workspace: none. Deterministic: yes. Thread-safe: yes.
#[unsafe(no_mangle)]
pub extern "C" fn mustafar_status_name(status: i32) -> *const c_char {
    let known = mustafar_status::ALL.iter().find(|(known, _)| *known as i32 == status);
    known.map_or(c"UNKNOWN", |(_, name)| name).as_ptr()
}
