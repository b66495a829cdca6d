//! The page format, version 2. Mirrors `docs/format.md`, which is normative.
//!
//! A page holds `page_tokens` consecutive tokens of one KV head, K or V:
//! bitmap, row offsets (ragged pages only), scales (8-bit values only), values. Every section starts on 16 bytes.

use crate::dtype::ValueType;
use crate::error::{Error, Result};
use crate::variants::{HEAD_DIMS, PAGE_TOKENS};

/// Version of the page format that this library writes and reads.
pub const FORMAT_VERSION: u32 = 2;

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
    value_type: ValueType,
    head_dim: usize,
    page_tokens: usize,
    rows: Rows,
}

impl PageFormat {
    /// A page whose rows all keep `keep` values.
    ///
    /// # Errors
    /// Names the first of `head_dim` (64, 96, 128, 256), `page_tokens` (16, 32, 64, 128) and `keep` (1 to head_dim)
    /// that is outside what is given here.
    pub fn uniform(value_type: ValueType, head_dim: usize, page_tokens: usize, keep: usize) -> Result<Self> {
        let format = Self { value_type, head_dim, page_tokens, rows: Rows::Uniform { keep } };
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
    pub fn ragged(
        value_type: ValueType,
        head_dim: usize,
        page_tokens: usize,
        capacity: usize,
    ) -> Result<Self> {
        let format = Self { value_type, head_dim, page_tokens, rows: Rows::Ragged { capacity } };
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
        if !HEAD_DIMS.contains(&self.head_dim) {
            return Err(Error::unsupported("head_dim", self.head_dim, list(&HEAD_DIMS)));
        }
        if !PAGE_TOKENS.contains(&self.page_tokens) {
            return Err(Error::unsupported("page_tokens", self.page_tokens, list(&PAGE_TOKENS)));
        }
        Ok(())
    }

    /// Type of the values.
    #[must_use]
    pub fn value_type(&self) -> ValueType {
        self.value_type
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

    /// Where the scales start (8-bit values): `page_tokens` little-endian bfloat16.
    #[must_use]
    pub fn scales_offset(&self) -> Option<usize> {
        self.value_type.is_scaled().then(|| self.offsets_end())
    }

    /// Where the values start.
    #[must_use]
    pub fn values_offset(&self) -> usize {
        self.offsets_end() + self.page_tokens * self.scale_bytes()
    }

    /// Where bitmap and row offsets end.
    fn offsets_end(&self) -> usize {
        match self.rows {
            Rows::Uniform { .. } => self.bitmap_bytes(),
            Rows::Ragged { .. } => {
                self.bitmap_bytes() + ((self.page_tokens + 1) * 2).next_multiple_of(PAGE_ALIGN)
            }
        }
    }

    /// Bytes of the scale of a row, 0 if there is none.
    pub(crate) fn scale_bytes(&self) -> usize {
        if self.value_type.is_scaled() { 2 } else { 0 }
    }

    /// Bytes of a page: a multiple of [`PAGE_ALIGN`].
    #[must_use]
    pub fn page_bytes(&self) -> usize {
        (self.values_offset() + self.capacity() * self.value_type.bytes()).next_multiple_of(PAGE_ALIGN)
    }

    /// Bytes of the same tokens stored dense in 16 bits.
    #[must_use]
    pub fn dense_bytes(&self) -> usize {
        self.page_tokens * self.head_dim * 2
    }

    /// Zeroes the rows of a uniform page from `rows` on.
    pub(crate) fn clear_rows(&self, page: &mut [u8], rows: usize) {
        let row_values = self.capacity() / self.page_tokens * self.value_type.bytes();
        page[rows * self.bitmap_row_bytes()..self.bitmap_bytes()].fill(0);
        page[self.bitmap_bytes() + rows * self.scale_bytes()..self.values_offset()].fill(0);
        page[self.values_offset() + rows * row_values..].fill(0);
    }

    /// Checks the first `rows` rows of untrusted page bytes: lengths, bit counts and row offsets. Rows beyond may
    /// hold anything. Scales and values are not inspected: every pattern of their bits is one.
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
            let words = page[row * row_bytes..][..row_bytes].chunks_exact(4);
            words.map(|b| u32::from_le_bytes([b[0], b[1], b[2], b[3]]).count_ones() as usize).sum()
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

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use crate::reference::{self, Row};

    /// head_dim, page_tokens, keep at 0.7; bytes of uniform pages that keep 1, that many, half, all; bytes of ragged
    /// pages with room for 0, 1, page_tokens * that many, all values.
    type Sizes = (usize, usize, usize, [usize; 4], [usize; 4]);

    /// Worked out by hand.
    const BYTES: [Sizes; 16] = [
        (64, 16, 20, [160, 768, 1152, 2176], [176, 192, 816, 2224]),
        (64, 32, 20, [320, 1536, 2304, 4352], [336, 352, 1616, 4432]),
        (64, 64, 20, [640, 3072, 4608, 8704], [656, 672, 3216, 8848]),
        (64, 128, 20, [1280, 6144, 9216, 17408], [1296, 1312, 6416, 17680]),
        (96, 16, 29, [224, 1120, 1728, 3264], [240, 256, 1168, 3312]),
        (96, 32, 29, [448, 2240, 3456, 6528], [464, 480, 2320, 6608]),
        (96, 64, 29, [896, 4480, 6912, 13056], [912, 928, 4624, 13200]),
        (96, 128, 29, [1792, 8960, 13824, 26112], [1808, 1824, 9232, 26384]),
        (128, 16, 39, [288, 1504, 2304, 4352], [304, 320, 1552, 4400]),
        (128, 32, 39, [576, 3008, 4608, 8704], [592, 608, 3088, 8784]),
        (128, 64, 39, [1152, 6016, 9216, 17408], [1168, 1184, 6160, 17552]),
        (128, 128, 39, [2304, 12032, 18432, 34816], [2320, 2336, 12304, 35088]),
        (256, 16, 77, [544, 2976, 4608, 8704], [560, 576, 3024, 8752]),
        (256, 32, 77, [1088, 5952, 9216, 17408], [1104, 1120, 6032, 17488]),
        (256, 64, 77, [2176, 11904, 18432, 34816], [2192, 2208, 12048, 34960]),
        (256, 128, 77, [4352, 23808, 36864, 69632], [4368, 4384, 24080, 69904]),
    ];

    #[test]
    fn page_bytes_are_exact() {
        for (dim, tokens, keep, uniform, ragged) in BYTES {
            for values in [ValueType::F16, ValueType::Bf16] {
                let bytes = |keep| PageFormat::uniform(values, dim, tokens, keep).unwrap().page_bytes();
                assert_eq!([1, keep, dim / 2, dim].map(bytes), uniform, "{dim} x {tokens}");
                let bytes = |room| PageFormat::ragged(values, dim, tokens, room).unwrap().page_bytes();
                let rooms = [0, 1, tokens * keep, tokens * dim];
                assert_eq!(rooms.map(bytes), ragged, "{dim} x {tokens}");
            }
            for values in [ValueType::E4m3, ValueType::Int8] {
                // Half the bytes per value, and 2 for each scale.
                let halved = |bytes: usize, kept: usize| (bytes - kept + 2 * tokens).next_multiple_of(16);
                let counts = [1, keep, dim / 2, dim];
                for (keep, bytes) in counts.into_iter().zip(uniform) {
                    let format = PageFormat::uniform(values, dim, tokens, keep).unwrap();
                    assert_eq!(format.page_bytes(), halved(bytes, tokens * keep), "{dim} x {tokens}");
                }
                let rooms = [0, 1, tokens * keep, tokens * dim];
                for (room, bytes) in rooms.into_iter().zip(ragged) {
                    let format = PageFormat::ragged(values, dim, tokens, room).unwrap();
                    let unpadded = bytes - (2 * room).next_multiple_of(16) + 2 * room;
                    assert_eq!(format.page_bytes(), halved(unpadded, room), "{dim} x {tokens}");
                }
            }
        }
        let page = |values, keep| PageFormat::uniform(values, 128, 64, keep).unwrap().page_bytes();
        assert_eq!((page(ValueType::Int8, 64), page(ValueType::E4m3, 39)), (64 * 82, 64 * 57));
        assert_eq!(BYTES.len(), HEAD_DIMS.len() * PAGE_TOKENS.len());
    }

    #[test]
    fn every_layout_agrees_with_a_page_built_in_order() {
        for dim in HEAD_DIMS {
            for tokens in PAGE_TOKENS {
                for keep in 1..=dim {
                    let uniform = PageFormat::uniform(ValueType::F16, dim, tokens, keep).unwrap();
                    let page = reference::page(&uniform, &[], 0xAA).unwrap();
                    assert_eq!(page.len(), uniform.page_bytes());
                    assert_eq!(uniform.values_offset() + 2 * uniform.capacity(), uniform.page_bytes());
                    assert_eq!(uniform.values_offset(), uniform.bitmap_bytes());
                    assert!(
                        uniform.offsets_offset().is_none() && uniform.page_bytes().is_multiple_of(PAGE_ALIGN)
                    );

                    let ragged = PageFormat::ragged(ValueType::Bf16, dim, tokens, keep).unwrap();
                    // One row of one value: its bits show where the value section starts.
                    let mut bits = vec![0; dim];
                    bits[0] = 0xBEEF;
                    let row = Row::new((0..dim).map(|c| c == 0).collect(), &bits);
                    let page = reference::page(&ragged, &[row], 0).unwrap();
                    assert_eq!(page.len(), ragged.page_bytes());
                    assert_eq!(page[ragged.values_offset()..][..2], 0xBEEFu16.to_le_bytes());
                    assert_eq!(page[ragged.offsets_offset().unwrap()..][..6], [0, 0, 1, 0, 1, 0]);
                    assert!(ragged.values_offset().is_multiple_of(PAGE_ALIGN));

                    let scaled = PageFormat::ragged(ValueType::E4m3, dim, tokens, keep).unwrap();
                    let mut row = Row::new((0..dim).map(|c| c == 0).collect(), &bits);
                    (row.bits[0], row.scale) = (0xEF, 0xBEAD);
                    let page = reference::page(&scaled, &[row], 0).unwrap();
                    assert_eq!(page.len(), scaled.page_bytes());
                    let scales = scaled.scales_offset().unwrap();
                    assert_eq!(page[scales..][..2], 0xBEADu16.to_le_bytes());
                    assert_eq!(page[scaled.values_offset()], 0xEF);
                    assert_eq!(scales + 2 * tokens, scaled.values_offset());
                    assert!(uniform.scales_offset().is_none() && scales.is_multiple_of(PAGE_ALIGN));
                }
            }
        }
    }

    #[test]
    fn shares_of_dense_are_the_documented_ones() {
        let share = |values, keep| {
            let format = PageFormat::uniform(values, 128, 64, keep).unwrap();
            format.page_bytes() as f64 / format.dense_bytes() as f64
        };
        assert_eq!((share(ValueType::F16, 64), share(ValueType::F16, 39)), (0.5625, 94.0 / 256.0));
        assert_eq!((share(ValueType::Int8, 64), share(ValueType::E4m3, 39)), (82.0 / 256.0, 57.0 / 256.0));
    }

    #[test]
    fn accessors_give_back_what_was_asked() {
        let uniform = PageFormat::uniform(ValueType::Bf16, 96, 32, 29).unwrap();
        assert_eq!(
            (uniform.value_type(), uniform.head_dim(), uniform.page_tokens()),
            (ValueType::Bf16, 96, 32)
        );
        assert_eq!((uniform.keep(), uniform.capacity()), (Some(29), 928));
        let ragged = PageFormat::ragged(ValueType::F16, 64, 16, 7).unwrap();
        assert_eq!((ragged.keep(), ragged.capacity()), (None, 7));
        assert_eq!(ragged.rows(), Rows::Ragged { capacity: 7 });
        assert_ne!(ragged, PageFormat::ragged(ValueType::F16, 64, 16, 8).unwrap());
    }

    #[test]
    fn every_single_bit_of_a_row_counts() {
        let format = PageFormat::uniform(ValueType::F16, 96, 16, 1).unwrap();
        for bit in 0..96 {
            let mut page = vec![0; format.page_bytes()];
            page[bit / 8] = 1 << (bit % 8);
            format.validate(&page, 1).unwrap();
            // The same bit one row later leaves row 0 empty.
            page.copy_within(0..12, 12);
            page[..12].fill(0);
            let error = format.validate(&page, 2).unwrap_err().to_string();
            assert_eq!(error, "page is damaged: row 0 has 0 bits set, keep is 1");
        }
    }
}
