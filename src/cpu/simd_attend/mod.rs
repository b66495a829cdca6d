//! The inner loops of attention over blocks of rows, in one version per instruction level.
//!
//! A row is one token's K or V of one head, either packed (bitmap and kept values, as pages store it) or dense.
//! The loops expand packed rows in registers; no dense copy of a page is ever made.
#![allow(unsafe_code)]

mod ahead;
#[cfg(target_arch = "x86_64")]
mod avx2;
#[cfg(target_arch = "x86_64")]
mod avx512;
mod portable;

pub(crate) use ahead::Ahead;

use crate::backend::Cpu;
use crate::cpu::level::Level;
use crate::dtype::DType;
use crate::mem::Element;
use std::marker::PhantomData;
use std::mem::MaybeUninit;

/// Rows in a block at most. Enough to spread the softmax and the reload of accumulators over many tokens; the
/// packed bytes of a block (about 10 KB of K and V at head_dim 128, keep 39) stay in the L1 cache.
pub(crate) const BLOCK: usize = 64;

/// Largest head_dim.
pub(crate) const MAX_DIM: usize = 256;

/// Readable values behind the last kept value of a packed row: more than any load takes at once (32 bytes).
pub(crate) const PAD: usize = 16;

/// How the rows of a block store their elements.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Encoding {
    /// Bitmap and kept values.
    Packed(DType),
    /// Every element.
    Dense(DType),
}

impl Encoding {
    fn is_packed(&self) -> bool {
        matches!(self, Self::Packed(_))
    }
}

/// Where a row lies. Of a packed row, `bits` points at `dim / 8` bytes and `values` at as many values as they have
/// bits, and `PAD` more; of a dense row, `values` points at `dim` elements.
#[derive(Debug, Clone, Copy)]
struct Row {
    bits: *const u8,
    values: *const u8,
}

/// Up to [`BLOCK`] rows of one encoding.
///
/// Invariant: rows below `len` are initialised and as [`Row`] says, for `'a`.
#[derive(Debug)]
pub(crate) struct Block<'a> {
    encoding: Encoding,
    dim: usize,
    len: usize,
    rows: [MaybeUninit<Row>; BLOCK],
    _life: PhantomData<&'a [u8]>,
}

impl<'a> Block<'a> {
    /// No rows yet. `dim` is a multiple of 32 up to [`MAX_DIM`].
    pub(crate) fn new(encoding: Encoding, dim: usize) -> Self {
        assert!(dim.is_multiple_of(32) && dim <= MAX_DIM, "head_dim {dim}");
        Self { encoding, dim, len: 0, rows: [MaybeUninit::uninit(); BLOCK], _life: PhantomData }
    }

    /// Adds a packed row: its bitmap, and its values with at least [`PAD`] more behind them.
    pub(crate) fn push_packed(&mut self, bits: &'a [u8], values: &'a [u8]) {
        let bits = &bits[..self.dim / 8];
        let count: u32 = bits.iter().map(|byte| byte.count_ones()).sum();
        assert!(values.len() >= (count as usize + PAD) * 2, "short row");
        self.push(Encoding::is_packed, bits.as_ptr(), values.as_ptr(), (0, 0), 1);
    }

    /// Adds `n` packed rows whose bitmaps lie back to back and whose values start every `stride` bytes. Whatever
    /// its bits, each must have `dim + PAD` values behind its start.
    pub(crate) fn push_packed_run(&mut self, bits: &'a [u8], values: &'a [u8], stride: usize, n: usize) {
        if n > 0 {
            let reach = (n - 1) * stride + (self.dim + PAD) * 2;
            assert!(bits.len() >= n * self.dim / 8 && values.len() >= reach, "short rows");
            self.push(Encoding::is_packed, bits.as_ptr(), values.as_ptr(), (self.dim / 8, stride), n);
        }
    }

    /// Adds `n` dense rows, `stride` elements apart; `T` must be the element type of the block's dtype.
    pub(crate) fn push_dense_run<T: Element>(&mut self, rows: &'a [T], stride: usize, n: usize) {
        if n > 0 {
            let size = size_of::<T>();
            assert!(matches!(self.encoding, Encoding::Dense(dtype) if dtype.bytes() == size), "element type");
            assert!(rows.len() >= (n - 1) * stride + self.dim, "short rows");
            self.push(
                |encoding| !encoding.is_packed(),
                std::ptr::null(),
                rows.as_ptr().cast(),
                (0, stride * size),
                n,
            );
        }
    }

    /// The one place that writes rows; callers have checked the memory.
    fn push(
        &mut self,
        fits: impl Fn(&Encoding) -> bool,
        bits: *const u8,
        values: *const u8,
        (bits_stride, values_stride): (usize, usize),
        n: usize,
    ) {
        assert!(fits(&self.encoding), "rows of another encoding");
        for (i, row) in self.rows[self.len..][..n].iter_mut().enumerate() {
            row.write(Row {
                bits: bits.wrapping_add(i * bits_stride),
                values: values.wrapping_add(i * values_stride),
            });
        }
        self.len += n;
    }

    /// How the rows store their elements.
    pub(crate) fn encoding(&self) -> Encoding {
        self.encoding
    }

    /// head_dim.
    pub(crate) fn dim(&self) -> usize {
        self.dim
    }

    /// Rows added.
    pub(crate) fn len(&self) -> usize {
        self.len
    }

    fn rows(&self) -> &[Row] {
        let rows = &self.rows[..self.len];
        // SAFETY: by the invariant these are initialised, and `MaybeUninit<Row>` is laid out as `Row`.
        unsafe { std::slice::from_raw_parts(rows.as_ptr().cast(), rows.len()) }
    }
}

/// Calls the same function of the module of `$level`.
macro_rules! dispatch {
    ($level:expr, $name:ident($($arg:expr),*)) => {
        match $level {
            #[cfg(target_arch = "x86_64")]
            // SAFETY: `Simd` only holds a level whose instructions this processor has.
            Level::Avx512 => unsafe { avx512::$name($($arg),*) },
            #[cfg(target_arch = "x86_64")]
            // SAFETY: as above.
            Level::Avx2 => unsafe { avx2::$name($($arg),*) },
            _ => portable::$name($($arg),*),
        }
    };
}

/// The loops at one instruction level. Exists only for levels that the processor has.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Simd(Level);

impl Simd {
    /// The level of a target, which the constructor of its context found available.
    pub(crate) fn of(cpu: Cpu) -> Self {
        Self(cpu.level)
    }

    /// `scores[h * BLOCK + t] = q[h] . row[t]`. `q` is `[heads, dim]`, `scores` `[heads, BLOCK]`; elements past
    /// `block.len()` are left in any state. Meanwhile `ahead` is brought into the cache, as in the loops below.
    pub(crate) fn dot(self, block: &Block<'_>, q: &[f32], scores: &mut [f32], ahead: &mut Ahead<'_>) {
        let heads = q.len() / block.dim;
        assert!(q.len() == heads * block.dim && scores.len() >= heads * BLOCK, "dot shapes");
        dispatch!(self.0, dot(block, q, scores, ahead))
    }

    /// `sums[h] += sum over t of weights[h * BLOCK + t] * row[t]`. `sums` is `[heads, dim]`, `weights`
    /// `[heads, BLOCK]`.
    pub(crate) fn weighted_sum(
        self,
        block: &Block<'_>,
        weights: &[f32],
        sums: &mut [f32],
        ahead: &mut Ahead<'_>,
    ) {
        let heads = sums.len() / block.dim;
        assert!(sums.len() == heads * block.dim && weights.len() >= heads * BLOCK, "weighted sum shapes");
        dispatch!(self.0, weighted_sum(block, weights, sums, ahead))
    }

    /// Writes the rows of the block as float32 `[len, dim]`.
    pub(crate) fn expand(self, block: &Block<'_>, out: &mut [f32], ahead: &mut Ahead<'_>) {
        assert!(out.len() >= block.len * block.dim, "expand shapes");
        dispatch!(self.0, expand(block, out, ahead))
    }

    /// One row of scores becomes weights: see [`Softmax`]. Returns the new running maximum and the sum of the
    /// weights.
    pub(crate) fn softmax(self, scores: &mut [f32], softmax: &Softmax) -> (f32, f32) {
        dispatch!(self.0, softmax(scores, softmax))
    }
}

/// A step of the online softmax: each score s becomes `x = scale * (s + bias)`, softcapped if asked, then
/// `exp(x - max)` where max is the largest x so far.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Softmax {
    /// Factor of the scores.
    pub(crate) scale: f32,
    /// Added to each score before scaling: q . c for centred keys.
    pub(crate) bias: f32,
    /// c of `c * tanh(x / c)`.
    pub(crate) softcap: Option<f32>,
    /// Running maximum before this step; -inf at the start.
    pub(crate) max: f32,
}
