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
#[cfg(target_arch = "x86_64")]
mod avx512_int8;
mod portable;

pub(crate) use ahead::Ahead;

use crate::backend::Cpu;
use crate::cpu::level::Level;
use crate::cpu::packed::scale;
use crate::dtype::{DType, ValueType};
use crate::mem::Element;
use std::marker::PhantomData;
use std::mem::MaybeUninit;

/// Rows in a block at most. Enough to spread the softmax and the reload of accumulators over many tokens; the
/// packed bytes of a block (about 10 KB of K and V at head_dim 128, keep 39) stay in the L1 cache.
pub(crate) const BLOCK: usize = 64;

/// Largest head_dim.
pub(crate) const MAX_DIM: usize = 256;

/// Readable bytes behind the last kept value of a packed row: as many as any load takes at once.
pub(crate) const PAD_BYTES: usize = 64;

/// How the rows of a block store their elements.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Encoding {
    /// Bitmap and kept values.
    Packed(ValueType),
    /// Every element.
    Dense(DType),
}

impl Encoding {
    fn is_packed(&self) -> bool {
        matches!(self, Self::Packed(_))
    }

    /// Bytes of a value or element.
    fn bytes(&self) -> usize {
        match self {
            Self::Packed(values) => values.bytes(),
            Self::Dense(dtype) => dtype.bytes(),
        }
    }

    /// What the loops make of a value, times this, is the value: they read e4m3 codes as f16 of another bias.
    fn unit(&self) -> f32 {
        if *self == Self::Packed(ValueType::E4m3) { 256.0 } else { 1.0 }
    }
}

/// Where a row lies. Of a packed row, `bits` points at `dim / 8` bytes and `values` at as many values as they have
/// bits, and `PAD_BYTES` more; of a dense row, `values` points at `dim` elements. Every value counts `scale` times:
/// that is 1 but for types with a scale.
#[derive(Debug, Clone, Copy)]
struct Row {
    bits: *const u8,
    values: *const u8,
    scale: f32,
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

    /// Adds a packed row: its bitmap, its scale (1 if there is none), and its values with at least [`PAD_BYTES`] more
    /// behind them. If `values` is shorter, nothing is added, and the error is how many bytes it takes.
    pub(crate) fn push_packed(&mut self, bits: &'a [u8], scale: f32, values: &'a [u8]) -> Result<(), usize> {
        let words = bits[..self.dim / 8].as_chunks::<4>().0;
        let kept: u32 = words.iter().map(|word| u32::from_le_bytes(*word).count_ones()).sum();
        let needed = kept as usize * self.encoding.bytes() + PAD_BYTES;
        if values.len() < needed {
            return Err(needed);
        }
        self.push(Encoding::is_packed, (bits.as_ptr(), 0), (values.as_ptr(), 0), |_| scale, 1);
        Ok(())
    }

    /// Adds `n` packed rows whose bitmaps and scales lie back to back and whose values start every `stride` bytes.
    /// Whatever its bits, each must have `dim` values and [`PAD_BYTES`] behind its start.
    pub(crate) fn push_packed_run(
        &mut self,
        bits: &'a [u8],
        scales: Option<&'a [u8]>,
        values: &'a [u8],
        stride: usize,
        n: usize,
    ) {
        if n > 0 {
            let reach = (n - 1) * stride + self.dim * self.encoding.bytes() + PAD_BYTES;
            assert!(bits.len() >= n * self.dim / 8 && values.len() >= reach, "short rows");
            let (bits, values) = ((bits.as_ptr(), self.dim / 8), (values.as_ptr(), stride));
            match scales {
                None => self.push(Encoding::is_packed, bits, values, |_| 1.0, n),
                Some(scales) => self.push(Encoding::is_packed, bits, values, |i| scale(&scales[2 * i..]), n),
            }
        }
    }

    /// Adds `n` dense rows, `stride` elements apart; `T` must be the element type of the block's dtype.
    pub(crate) fn push_dense_run<T: Element>(&mut self, rows: &'a [T], stride: usize, n: usize) {
        if n > 0 {
            let size = size_of::<T>();
            assert!(matches!(self.encoding, Encoding::Dense(dtype) if dtype.bytes() == size), "element type");
            assert!(rows.len() >= (n - 1) * stride + self.dim, "short rows");
            let values = (rows.as_ptr().cast(), stride * size);
            self.push(|encoding| !encoding.is_packed(), (std::ptr::null(), 0), values, |_| 1.0, n);
        }
    }

    /// The one place that writes rows, from starts and strides; callers have checked the memory.
    fn push(
        &mut self,
        fits: impl Fn(&Encoding) -> bool,
        bits: (*const u8, usize),
        values: (*const u8, usize),
        scale: impl Fn(usize) -> f32,
        n: usize,
    ) {
        assert!(fits(&self.encoding), "rows of another encoding");
        let unit = self.encoding.unit();
        for (i, row) in self.rows[self.len..][..n].iter_mut().enumerate() {
            row.write(Row {
                bits: bits.0.wrapping_add(i * bits.1),
                values: values.0.wrapping_add(i * values.1),
                scale: unit * scale(i),
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
///
/// Sums are of float32 products, but that AVX-512 may round what meets int8 values to 16 bits: queries to half of 2^-15
/// of the largest of their row, weights (times scales) to half of 2^-16 of the largest of their row in a block.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Simd(Level);

impl Simd {
    /// The level of a target, which the constructor of its context found available.
    pub(crate) fn of(cpu: Cpu) -> Self {
        Self(cpu.level)
    }

    /// Whether rows of this encoding are so cheap to read that it never pays to write them in float32 first.
    pub(crate) fn is_direct(self, encoding: Encoding) -> bool {
        let cheap = matches!(encoding, Encoding::Dense(_) | Encoding::Packed(ValueType::Int8));
        self.0 == Level::Avx512 && cheap
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
