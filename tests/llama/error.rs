//! The error type of the decode loop.

use std::fmt;

pub type Result<T> = std::result::Result<T, Error>;

/// Why something was refused. Messages name what was read, what was found and what is accepted.
#[derive(Debug)]
pub enum Error {
    /// The operating system said no.
    Io { what: String, source: std::io::Error },
    /// A file breaks the rules of its format.
    Damaged { what: String, reason: String },
    /// A well-formed file that this loop cannot run.
    Unsupported { what: String, found: String, supported: String },
    /// An argument out of range.
    Invalid(String),
    /// The device has not that much memory left, in bytes.
    DeviceMemory { asked: usize, free: usize, total: usize, fits: Option<String> },
    /// From the library.
    Mustafar(mustafar::Error),
}

impl Error {
    pub fn damaged(what: impl fmt::Display, reason: impl fmt::Display) -> Self {
        Self::Damaged { what: what.to_string(), reason: reason.to_string() }
    }

    pub fn unsupported(
        what: impl fmt::Display,
        found: impl fmt::Display,
        supported: impl fmt::Display,
    ) -> Self {
        Self::Unsupported {
            what: what.to_string(),
            found: found.to_string(),
            supported: supported.to_string(),
        }
    }

    pub fn io(what: impl fmt::Display, source: std::io::Error) -> Self {
        Self::Io { what: what.to_string(), source }
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Io { what, source } => write!(f, "{what}: {source}"),
            Self::Damaged { what, reason } => write!(f, "{what} is damaged: {reason}"),
            Self::Unsupported { what, found, supported } => {
                write!(f, "{what} is {found}; supported: {supported}")
            }
            Self::Invalid(message) => f.write_str(message),
            Self::DeviceMemory { asked, free, total, fits } => {
                write!(f, "{asked} bytes of device memory were asked for; {free} of {total} were free")?;
                fits.as_ref().map_or(Ok(()), |fits| write!(f, ": {fits}"))
            }
            Self::Mustafar(error) => error.fmt(f),
        }
    }
}

impl std::error::Error for Error {}

impl From<mustafar::Error> for Error {
    fn from(error: mustafar::Error) -> Self {
        Self::Mustafar(error)
    }
}
