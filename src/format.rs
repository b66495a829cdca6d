//! The page format, version 1. Mirrors `docs/format.md`, which is normative.
//!
//! A page holds `page_tokens` consecutive tokens of one KV head, K or V:
//! bitmap, row offsets (ragged pages only), values. Every section starts on 16 bytes.

use crate::dtype::DType;
use crate::error::{Error, Result};
use crate::variants::{HEAD_DIMS, PAGE_TOKENS};

/// Version of the page format that this library writes and reads.
pub const FORMAT_VERSION: u32 = 1;

/// Alignment of a page and of each of its sections, in bytes.
pub const PAGE_ALIGN: usize = 16;

/// How many values the rows of a page keep.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Rows {
    /// Every row keeps the same number of values.
    Uniform {
        /// Values per row, 1 to head_dim.
        keep: usize,
    },
    /// Counts differ; row offsets say where each row starts.
    Ragged {
        /// Values the page has room for, 0 to page_tokens * head_dim.
        capacity: usize,
    },
}

/// Layout of one page. Two equal formats have byte-compatible pages.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct PageFormat {
    dtype: DType,
    head_dim: usize,
    page_tokens: usize,
    rows: Rows,
}

impl PageFormat {
    /// A page whose rows all keep `keep` values.
    ///
    /// # Errors
    /// Names the first of `dtype` (f16, bf16), `head_dim` (64, 96, 128, 256), `page_tokens` (16, 32, 64, 128) and
    /// `keep` (1 to head_dim) that is outside what is given here.
    pub fn uniform(dtype: DType, head_dim: usize, page_tokens: usize, keep: usize) -> Result<Self> {
        let format = Self { dtype, head_dim, page_tokens, rows: Rows::Uniform { keep } };
        format.check_common()?;
        if keep == 0 || keep > head_dim {
            return Err(Error::invalid("keep", keep, format!("1 to head_dim ({head_dim})")));
        }
        Ok(format)
    }

    /// A page with room for `capacity` values, however its rows share them.
    ///
    /// # Errors
    /// As [`PageFormat::uniform`]; `capacity` may be 0 to page_tokens * head_dim.
    pub fn ragged(dtype: DType, head_dim: usize, page_tokens: usize, capacity: usize) -> Result<Self> {
        let format = Self { dtype, head_dim, page_tokens, rows: Rows::Ragged { capacity } };
        format.check_common()?;
        if capacity > page_tokens * head_dim {
            return Err(Error::invalid(
                "capacity",
                capacity,
                format!("0 to page_tokens * head_dim ({})", page_tokens * head_dim),
            ));
        }
        Ok(format)
    }

    fn check_common(&self) -> Result<()> {
        if !matches!(self.dtype, DType::F16 | DType::Bf16) {
            return Err(Error::unsupported("dtype", self.dtype, "f16, bf16"));
        }
        if !HEAD_DIMS.contains(&self.head_dim) {
            return Err(Error::unsupported("head_dim", self.head_dim, list(&HEAD_DIMS)));
        }
        if !PAGE_TOKENS.contains(&self.page_tokens) {
            return Err(Error::unsupported("page_tokens", self.page_tokens, list(&PAGE_TOKENS)));
        }
        Ok(())
    }

    /// Element type of the values.
    #[must_use]
    pub fn dtype(&self) -> DType {
        self.dtype
    }

    /// Channels per row.
    #[must_use]
    pub fn head_dim(&self) -> usize {
        self.head_dim
    }

    /// Rows per page.
    #[must_use]
    pub fn page_tokens(&self) -> usize {
        self.page_tokens
    }

    /// Uniform with its keep, or ragged with its capacity.
    #[must_use]
    pub fn rows(&self) -> Rows {
        self.rows
    }

    /// Values per row of a uniform page.
    #[must_use]
    pub fn keep(&self) -> Option<usize> {
        match self.rows {
            Rows::Uniform { keep } => Some(keep),
            Rows::Ragged { .. } => None,
        }
    }

    /// Values a page holds at most.
    #[must_use]
    pub fn capacity(&self) -> usize {
        match self.rows {
            Rows::Uniform { keep } => self.page_tokens * keep,
            Rows::Ragged { capacity } => capacity,
        }
    }

    /// Bytes of one row of the bitmap.
    #[must_use]
    pub fn bitmap_row_bytes(&self) -> usize {
        self.head_dim / 8
    }

    /// Bytes of the bitmap section, which starts at 0.
    #[must_use]
    pub fn bitmap_bytes(&self) -> usize {
        self.page_tokens * self.bitmap_row_bytes()
    }

    /// Where the row offsets start (ragged pages): `page_tokens + 1` little-endian u16, in values.
    #[must_use]
    pub fn offsets_offset(&self) -> Option<usize> {
        matches!(self.rows, Rows::Ragged { .. }).then(|| self.bitmap_bytes())
    }

    /// Where the values start.
    #[must_use]
    pub fn values_offset(&self) -> usize {
        match self.rows {
            Rows::Uniform { .. } => self.bitmap_bytes(),
            Rows::Ragged { .. } => {
                self.bitmap_bytes() + ((self.page_tokens + 1) * 2).next_multiple_of(PAGE_ALIGN)
            }
        }
    }

    /// Bytes of a page: a multiple of [`PAGE_ALIGN`].
    #[must_use]
    pub fn page_bytes(&self) -> usize {
        (self.values_offset() + self.capacity() * self.dtype.bytes()).next_multiple_of(PAGE_ALIGN)
    }

    /// Bytes of the same tokens stored dense in the value type.
    #[must_use]
    pub fn dense_bytes(&self) -> usize {
        self.page_tokens * self.head_dim * self.dtype.bytes()
    }

    /// Checks the first `rows` rows of untrusted page bytes: lengths, bit counts and row offsets. Rows beyond may
    /// hold anything. Values are not inspected: every 16-bit pattern is a value.
    ///
    /// # Errors
    /// [`Error::BufferTooSmall`] for a short slice, [`Error::InvalidArgument`] for `rows` above page_tokens,
    /// [`Error::CorruptData`] naming the first row that violates the format.
    pub fn validate(&self, page: &[u8], rows: usize) -> Result<()> {
        if page.len() < self.page_bytes() {
            return Err(Error::BufferTooSmall {
                argument: "page",
                bytes: page.len(),
                needed: self.page_bytes(),
            });
        }
        if rows > self.page_tokens {
            return Err(Error::invalid("rows", rows, format!("0 to page_tokens ({})", self.page_tokens)));
        }
        let damaged = |reason| Err(Error::CorruptData { what: "page", reason });
        let row_bytes = self.bitmap_row_bytes();
        let count = |row: usize| -> usize {
            page[row * row_bytes..][..row_bytes].iter().map(|b| b.count_ones() as usize).sum()
        };
        match self.rows {
            Rows::Uniform { keep } => {
                for row in 0..rows {
                    if count(row) != keep {
                        return damaged(format!("row {row} has {} bits set, keep is {keep}", count(row)));
                    }
                }
            }
            Rows::Ragged { capacity } => {
                let at = self.bitmap_bytes();
                let offset =
                    |i: usize| usize::from(u16::from_le_bytes([page[at + 2 * i], page[at + 2 * i + 1]]));
                if rows > 0 && offset(0) != 0 {
                    return damaged(format!("row 0 starts at value {}, must be 0", offset(0)));
                }
                for row in 0..rows {
                    let (start, end) = (offset(row), offset(row + 1));
                    if end < start || end - start != count(row) {
                        return damaged(format!(
                            "row {row} spans values {start} to {end} but has {} bits set",
                            count(row)
                        ));
                    }
                    if end > capacity {
                        return damaged(format!("row {row} ends at value {end}, capacity is {capacity}"));
                    }
                }
            }
        }
        Ok(())
    }
}

/// "64, 96, 128" for messages.
pub(crate) fn list(values: &[usize]) -> String {
    values.iter().map(ToString::to_string).collect::<Vec<_>>().join(", ")
}
