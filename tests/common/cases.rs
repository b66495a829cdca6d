//! Tables of sizes. Every entry is there for a reason.

use mustafar::{DType, ValueType};

/// Types of what is pruned.
pub const DTYPES: [DType; 2] = [DType::F16, DType::Bf16];

/// Value types a page can hold.
pub const VALUE_TYPES: [ValueType; 4] = ValueType::all();

/// The type of values that are elements of `dtype` as they are.
pub fn values_of(dtype: DType) -> ValueType {
    VALUE_TYPES.into_iter().find(|values| values.dtype() == Some(dtype)).unwrap()
}

/// Every head dimension.
pub const DIMS: [usize; 4] = mustafar::variants::HEAD_DIMS;

/// Every page size.
pub const PAGE_SIZES: [usize; 4] = mustafar::variants::PAGE_TOKENS;

/// (query heads, KV heads).
pub const HEADS: [(usize, usize); 8] = [
    (1, 1),
    (2, 2),  // no grouping
    (3, 1),  // group of 3: not a power of two
    (9, 3),  // SmolLM2-135M
    (8, 2),  // group of 4, Llama-3
    (16, 2), // group of 8: one MMA tile
    (16, 1), // group of 16: two MMA tiles
    (34, 2), // group of 17: beyond every tile
];

/// Values per row: the extremes, around a bitmap byte and a SIMD register, odd counts (rows start unaligned), the
/// two counts of the paper.
pub fn keeps(dim: usize) -> Vec<usize> {
    let mut keeps = vec![
        1,
        7, // below, at and above one byte of values in a mask
        8,
        9,
        31, // around 32 lanes
        33,
        mustafar::keep_for_sparsity(dim, 0.7).unwrap(),
        dim / 2,
        dim - 1, // one dropped
        dim,     // lossless
    ];
    keeps.sort_unstable();
    keeps.dedup();
    keeps
}

/// Tokens of a sequence whose pages hold `page_tokens`.
pub fn lengths(page_tokens: usize) -> [usize; 8] {
    [
        0, // no pages at all
        1,
        page_tokens - 1, // last row unused
        page_tokens,     // full page, no second one
        page_tokens + 1, // one row in the last page
        2 * page_tokens,
        3 * page_tokens - 5,
        300, // several splits
    ]
}

/// Tokens per channel-direction group times a few.
pub const CHANNEL_GROUPS: [usize; 3] = [1, 2, 5];
