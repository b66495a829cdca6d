//! Tensor types of GGUF and their decoding to f32.

use half::{bf16, f16};
use rayon::prelude::*;

/// The types that can be read.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum TensorType {
    F32,
    F16,
    Bf16,
    Q4_0,
    Q4_1,
    Q8_0,
    Q6K,
}

/// Code, name, elements per block, bytes per block.
const READABLE: [(TensorType, u32, &str, usize, usize); 7] = [
    (TensorType::F32, 0, "F32", 1, 4),
    (TensorType::F16, 1, "F16", 1, 2),
    (TensorType::Bf16, 30, "BF16", 1, 2),
    (TensorType::Q4_0, 2, "Q4_0", 32, 18),
    (TensorType::Q4_1, 3, "Q4_1", 32, 20),
    (TensorType::Q8_0, 8, "Q8_0", 32, 34),
    (TensorType::Q6K, 14, "Q6_K", 256, 210),
];

/// Names of codes that are known but not read, for messages.
const UNREADABLE: [(u32, &str); 8] = [
    (6, "Q5_0"),
    (7, "Q5_1"),
    (9, "Q8_1"),
    (10, "Q2_K"),
    (11, "Q3_K"),
    (12, "Q4_K"),
    (13, "Q5_K"),
    (15, "Q8_K"),
];

/// What to call a type code in a message.
pub fn code_name(code: u32) -> String {
    UNREADABLE
        .iter()
        .find(|(c, _)| *c == code)
        .map_or_else(|| format!("code {code}"), |(_, name)| (*name).to_string())
}

impl TensorType {
    pub fn from_code(code: u32) -> Option<Self> {
        READABLE.iter().find(|row| row.1 == code).map(|row| row.0)
    }

    /// "F32, F16, ..." for messages.
    pub fn names() -> String {
        READABLE.map(|row| row.2).join(", ")
    }

    /// (elements, bytes) of a block.
    pub fn block(self) -> (usize, usize) {
        let row = READABLE.iter().find(|row| row.0 == self).expect("every type has a row");
        (row.3, row.4)
    }

    /// Bytes of a tensor; `None` if its rows are no whole blocks or the size overflows.
    pub fn bytes_of(self, dims: &[usize]) -> Option<u64> {
        let (elements, bytes) = self.block();
        if !dims.first()?.is_multiple_of(elements) {
            return None;
        }
        let n = dims.iter().try_fold(1u64, |a, &d| a.checked_mul(d as u64))?;
        (n / elements as u64).checked_mul(bytes as u64)
    }

    /// Decodes whole blocks: `data` holds exactly `out.len()` elements.
    pub fn decode(self, data: &[u8], out: &mut [f32]) {
        let (elements, bytes) = self.block();
        assert_eq!(out.len() / elements * bytes, data.len(), "whole blocks");
        // 4096 elements are whole blocks of every type and enough work for a task.
        const CHUNK: usize = 4096;
        out.par_chunks_mut(CHUNK).zip(data.par_chunks(CHUNK / elements * bytes)).for_each(|(out, data)| {
            let blocks = data.chunks_exact(bytes).zip(out.chunks_exact_mut(elements));
            match self {
                Self::F32 => {
                    for (b, y) in blocks {
                        y[0] = f32::from_le_bytes([b[0], b[1], b[2], b[3]]);
                    }
                }
                Self::F16 => {
                    for (b, y) in blocks {
                        y[0] = half_at(b, 0);
                    }
                }
                Self::Bf16 => {
                    for (b, y) in blocks {
                        y[0] = bf16::from_le_bytes([b[0], b[1]]).to_f32();
                    }
                }
                Self::Q4_0 => blocks.for_each(|(b, y)| q4(half_at(b, 0), -8.0 * half_at(b, 0), &b[2..], y)),
                Self::Q4_1 => blocks.for_each(|(b, y)| q4(half_at(b, 0), half_at(b, 2), &b[4..], y)),
                Self::Q8_0 => {
                    for (b, y) in blocks {
                        let d = half_at(b, 0);
                        for (y, &q) in y.iter_mut().zip(&b[2..]) {
                            *y = d * f32::from(q as i8);
                        }
                    }
                }
                Self::Q6K => blocks.for_each(|(b, y)| q6k(b, y)),
            }
        });
    }
}

fn half_at(b: &[u8], at: usize) -> f32 {
    f16::from_le_bytes([b[at], b[at + 1]]).to_f32()
}

/// 32 codes of 4 bits, `d * code + m`: low nibbles are elements 0 to 15, high nibbles 16 to 31.
fn q4(d: f32, m: f32, codes: &[u8], y: &mut [f32]) {
    let (low, high) = y.split_at_mut(16);
    for ((&q, low), high) in codes.iter().zip(low).zip(high) {
        *low = d * f32::from(q & 15) + m;
        *high = d * f32::from(q >> 4) + m;
    }
}

/// 256 codes of 6 bits minus 32, times `d` times an i8 scale per 16 elements. Block: 128 bytes of low nibbles,
/// 64 bytes of upper bit pairs, 16 scales, d. Each half of the block (128 elements) is four runs of 32 that
/// interleave their bits: runs 0 and 1 take the low nibbles of 64 bytes, runs 2 and 3 the high ones; run r takes
/// bits 2r and 2r + 1 of the 32 bytes of upper bits.
fn q6k(b: &[u8], y: &mut [f32]) {
    let (low, rest) = b.split_at(128);
    let (upper, rest) = rest.split_at(64);
    let (scales, d) = rest.split_at(16);
    let d = half_at(d, 0);
    for (i, y) in y.iter_mut().enumerate() {
        let (half, run, j) = (i / 128, i / 32 % 4, i % 32);
        let nibble = low[half * 64 + run % 2 * 32 + j] >> (run / 2 * 4) & 15;
        let pair = upper[half * 32 + j] >> (2 * run) & 3;
        *y = d * f32::from(scales[i / 16] as i8) * (f32::from(nibble | pair << 4) - 32.0);
    }
}
