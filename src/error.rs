//! The one error type. Every variant corresponds to one status of the C ABI, and every message names the
//! argument, the value found and what is allowed.

use std::fmt;

/// `Result` with [`Error`].
pub type Result<T> = std::result::Result<T, Error>;

/// Why a call was refused. A call that returns an error has written nothing to its outputs.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub enum Error {
    /// An argument has a value that is never valid, or that contradicts another argument.
    InvalidArgument {
        /// Name of the argument, as the API spells it (`keep`, `q.head_dim`, ...).
        argument: &'static str,
        /// The value found.
        value: String,
        /// What would have been accepted.
        allowed: String,
    },
    /// A pointer that must point somewhere is null.
    NullPointer {
        /// Name of the argument.
        argument: &'static str,
    },
    /// A pointer, stride or offset is not a multiple of what the format or the element type requires.
    Misaligned {
        /// Name of the argument.
        argument: &'static str,
        /// The address or stride found.
        value: u64,
        /// The required alignment in bytes.
        required: usize,
    },
    /// A product or sum of sizes does not fit in 64 bits.
    Overflow {
        /// The quantity that overflowed.
        argument: &'static str,
    },
    /// An index (slot, page, sequence, layer, length) lies outside what it indexes.
    OutOfRange {
        /// Name of the argument.
        argument: &'static str,
        /// Position inside the argument, 0 for a scalar.
        index: usize,
        /// The value found.
        value: i64,
        /// Smallest and largest valid value.
        allowed: (i64, i64),
    },
    /// A buffer or workspace is smaller than the call needs.
    BufferTooSmall {
        /// Name of the argument.
        argument: &'static str,
        /// Size found, in bytes.
        bytes: usize,
        /// Size needed, in bytes.
        needed: usize,
    },
    /// The request is well formed but no kernel serves it.
    Unsupported {
        /// Name of the argument.
        argument: &'static str,
        /// The value found.
        value: String,
        /// What is supported.
        supported: String,
    },
    /// A ragged page cannot hold the values its rows keep.
    PageOverflow {
        /// Index of the page in the call's page list.
        page: usize,
        /// KV head.
        head: usize,
        /// Values that the page would have to hold.
        needed: usize,
        /// Values that the page can hold.
        capacity: usize,
    },
    /// The cache has no free page or sequence left.
    CacheFull {
        /// What ran out (`pages` or `sequences`).
        what: &'static str,
        /// How many the call needs.
        needed: usize,
        /// How many are free.
        free: usize,
    },
    /// The allocator refused.
    OutOfMemory {
        /// Bytes asked for.
        bytes: usize,
    },
    /// Page or snapshot bytes violate the format.
    CorruptData {
        /// What was read (`page`, `snapshot`, ...).
        what: &'static str,
        /// The rule that is violated, with position and values.
        reason: String,
    },
    /// Data or a structure was written by an incompatible version, or for another configuration.
    VersionMismatch {
        /// What was read.
        what: &'static str,
        /// The version or configuration found.
        found: String,
        /// The version or configuration that is supported.
        supported: String,
    },
    /// The backend cannot run here: no driver, no device, or built without kernels.
    Unavailable {
        /// Why.
        reason: String,
    },
    /// The CUDA driver refused a call; the context stays usable unless the code says otherwise (a sticky error).
    Cuda {
        /// What was being done.
        during: &'static str,
        /// The `CUresult`.
        code: i32,
        /// The driver's name and text for it.
        text: String,
    },
    /// A defect of this library; the call had no effect that can be relied on.
    Internal {
        /// What happened.
        reason: String,
    },
}

impl Error {
    /// [`Error::InvalidArgument`] from anything printable.
    pub(crate) fn invalid(
        argument: &'static str,
        value: impl fmt::Display,
        allowed: impl fmt::Display,
    ) -> Self {
        Self::InvalidArgument { argument, value: value.to_string(), allowed: allowed.to_string() }
    }

    /// [`Error::Unsupported`] from anything printable.
    pub(crate) fn unsupported(
        argument: &'static str,
        value: impl fmt::Display,
        supported: impl fmt::Display,
    ) -> Self {
        Self::Unsupported { argument, value: value.to_string(), supported: supported.to_string() }
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::InvalidArgument { argument, value, allowed } => {
                write!(f, "{argument} is {value}; allowed: {allowed}")
            }
            Self::NullPointer { argument } => write!(f, "{argument} is null; it must point to valid memory"),
            Self::Misaligned { argument, value, required } => {
                write!(f, "{argument} is {value:#x}; it must be a multiple of {required} bytes")
            }
            Self::Overflow { argument } => write!(f, "{argument} does not fit in 64 bits"),
            Self::OutOfRange { argument, index, value, allowed: (low, high) } => {
                write!(f, "{argument}[{index}] is {value}; allowed: {low} to {high}")
            }
            Self::BufferTooSmall { argument, bytes, needed } => {
                write!(f, "{argument} has {bytes} bytes; needed: {needed}")
            }
            Self::Unsupported { argument, value, supported } => {
                write!(f, "{argument} is {value}; supported: {supported}")
            }
            Self::PageOverflow { page, head, needed, capacity } => write!(
                f,
                "page {page} of head {head} keeps {needed} values; its capacity is {capacity}, {} too few",
                needed.saturating_sub(*capacity)
            ),
            Self::CacheFull { what, needed, free } => {
                write!(f, "cache needs {needed} more {what}; free: {free}")
            }
            Self::OutOfMemory { bytes } => write!(f, "allocation of {bytes} bytes failed"),
            Self::CorruptData { what, reason } => write!(f, "{what} is damaged: {reason}"),
            Self::VersionMismatch { what, found, supported } => {
                write!(f, "{what} is {found}; supported: {supported}")
            }
            Self::Unavailable { reason } => write!(f, "backend unavailable: {reason}"),
            Self::Cuda { during, code, text } => write!(f, "CUDA error {code} during {during}: {text}"),
            Self::Internal { reason } => write!(f, "internal error: {reason}"),
        }
    }
}

impl std::error::Error for Error {}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn messages_name_argument_value_and_what_is_allowed() {
        let cases = [
            (Error::invalid("keep", 129, "1 to 128"), "keep is 129; allowed: 1 to 128"),
            (Error::NullPointer { argument: "slots" }, "slots is null; it must point to valid memory"),
            (
                Error::Misaligned { argument: "pool", value: 0x1008, required: 16 },
                "pool is 0x1008; it must be a multiple of 16 bytes",
            ),
            (Error::Overflow { argument: "page_stride" }, "page_stride does not fit in 64 bits"),
            (
                Error::OutOfRange { argument: "slots", index: 3, value: -2, allowed: (-1, 63) },
                "slots[3] is -2; allowed: -1 to 63",
            ),
            (
                Error::BufferTooSmall { argument: "workspace", bytes: 10, needed: 64 },
                "workspace has 10 bytes; needed: 64",
            ),
            (Error::unsupported("head_dim", 80, "64, 96"), "head_dim is 80; supported: 64, 96"),
            (
                Error::PageOverflow { page: 2, head: 1, needed: 70, capacity: 64 },
                "page 2 of head 1 keeps 70 values; its capacity is 64, 6 too few",
            ),
            (Error::CacheFull { what: "pages", needed: 4, free: 1 }, "cache needs 4 more pages; free: 1"),
            (Error::OutOfMemory { bytes: 4096 }, "allocation of 4096 bytes failed"),
            (Error::CorruptData { what: "page", reason: "row 0".into() }, "page is damaged: row 0"),
            (
                Error::VersionMismatch { what: "snapshot", found: "9".into(), supported: "1".into() },
                "snapshot is 9; supported: 1",
            ),
            (Error::Unavailable { reason: "no driver".into() }, "backend unavailable: no driver"),
            (Error::Internal { reason: "x".into() }, "internal error: x"),
        ];
        for (error, message) in cases {
            assert_eq!(error.to_string(), message);
        }
    }
}
