//! Dense host tensors of any element type, read and written as float32.

use crate::cpu::math::{bf16_to_f32, f16_to_f32};
use crate::cpu::simd_attend::{Ahead, Block};
use crate::dtype::DType;
use crate::error::Result;
use crate::mem::Element;
use crate::tensor::{Rows, RowsMut, Shape, Tensor, TensorMut};
use half::{bf16, f16};
use std::ops::Range;

/// Rows of a tensor on the host.
#[derive(Debug, Clone, Copy)]
pub(crate) enum AnyRows<'a> {
    F16(Rows<'a, f16>),
    Bf16(Rows<'a, bf16>),
    F32(Rows<'a, f32>),
}

impl<'a> AnyRows<'a> {
    /// The rows of `tensor`; errors name `argument`.
    pub(crate) fn new(argument: &'static str, tensor: &Tensor<'a>) -> Result<Self> {
        Ok(match tensor.dtype {
            DType::F16 => Self::F16(tensor.rows(argument)?),
            DType::Bf16 => Self::Bf16(tensor.rows(argument)?),
            DType::F32 => Self::F32(tensor.rows(argument)?),
        })
    }

    /// Element type.
    pub(crate) fn dtype(&self) -> DType {
        match self {
            Self::F16(_) => DType::F16,
            Self::Bf16(_) => DType::Bf16,
            Self::F32(_) => DType::F32,
        }
    }

    /// Copies one row into `out`, which has the tensor's `dim` elements.
    pub(crate) fn load(&self, b: usize, t: usize, h: usize, out: &mut [f32]) {
        match self {
            Self::F16(rows) => convert(rows.row(b, t, h), out, |x| f16_to_f32(x.to_bits())),
            Self::Bf16(rows) => convert(rows.row(b, t, h), out, |x| bf16_to_f32(x.to_bits())),
            Self::F32(rows) => out.copy_from_slice(rows.row(b, t, h)),
        }
    }

    /// Adds what the rows of `tokens` occupy.
    pub(crate) fn look_ahead(&self, b: usize, tokens: Range<usize>, h: usize, ahead: &mut Ahead<'a>) {
        let shape = self.shape();
        let (dim, stride, n) = (shape.dim, shape.token_stride, tokens.len());
        if n == 0 {
            return;
        }
        match self {
            Self::F16(rows) => look_ahead(rows.from(b, tokens.start, h), dim, stride, n, ahead),
            Self::Bf16(rows) => look_ahead(rows.from(b, tokens.start, h), dim, stride, n, ahead),
            Self::F32(rows) => look_ahead(rows.from(b, tokens.start, h), dim, stride, n, ahead),
        }
    }

    /// Sizes and strides.
    pub(crate) fn shape(&self) -> Shape {
        match self {
            Self::F16(rows) => rows.shape,
            Self::Bf16(rows) => rows.shape,
            Self::F32(rows) => rows.shape,
        }
    }

    /// Adds the rows of `tokens` to a dense block of the same dtype.
    pub(crate) fn push(&self, b: usize, tokens: Range<usize>, h: usize, block: &mut Block<'a>) {
        let (t, n) = (tokens.start, tokens.len());
        match self {
            Self::F16(rows) => block.push_dense_run(rows.from(b, t, h), rows.shape.token_stride, n),
            Self::Bf16(rows) => block.push_dense_run(rows.from(b, t, h), rows.shape.token_stride, n),
            Self::F32(rows) => block.push_dense_run(rows.from(b, t, h), rows.shape.token_stride, n),
        }
    }
}

/// Adds `n` rows of `dim` elements, `stride` apart.
fn look_ahead<'a, T>(rows: &'a [T], dim: usize, stride: usize, n: usize, ahead: &mut Ahead<'a>) {
    if stride == dim {
        ahead.push(&rows[..n * dim]);
    } else {
        rows.chunks(stride).take(n).for_each(|row| ahead.push(&row[..dim]));
    }
}

fn convert<T: Copy, U>(from: &[T], to: &mut [U], f: impl Fn(T) -> U) {
    for (to, from) in to.iter_mut().zip(from) {
        *to = f(*from);
    }
}

/// Rows of a writable tensor on the host.
#[derive(Debug)]
pub(crate) enum AnyRowsMut<'a> {
    F16(RowsMut<'a, f16>),
    Bf16(RowsMut<'a, bf16>),
    F32(RowsMut<'a, f32>),
}

/// Calls one method on whichever rows there are.
macro_rules! split {
    ($self:ident, $method:ident, $at:expr) => {
        match $self {
            Self::F16(rows) => {
                let (low, high) = rows.$method($at);
                (Self::F16(low), Self::F16(high))
            }
            Self::Bf16(rows) => {
                let (low, high) = rows.$method($at);
                (Self::Bf16(low), Self::Bf16(high))
            }
            Self::F32(rows) => {
                let (low, high) = rows.$method($at);
                (Self::F32(low), Self::F32(high))
            }
        }
    };
}

impl<'a> AnyRowsMut<'a> {
    /// The rows of `tensor`; errors name `argument`.
    pub(crate) fn new(argument: &'static str, tensor: &'a mut TensorMut<'_>) -> Result<Self> {
        Ok(match tensor.dtype {
            DType::F16 => Self::F16(tensor.rows_mut(argument)?),
            DType::Bf16 => Self::Bf16(tensor.rows_mut(argument)?),
            DType::F32 => Self::F32(tensor.rows_mut(argument)?),
        })
    }

    /// Writes one row, rounded to the tensor's dtype.
    pub(crate) fn store(&mut self, b: usize, t: usize, h: usize, row: &[f32]) {
        match self {
            Self::F16(rows) => convert(row, rows.row_mut(b, t, h), f16::from_f32),
            Self::Bf16(rows) => convert(row, rows.row_mut(b, t, h), bf16::from_f32),
            Self::F32(rows) => rows.row_mut(b, t, h).copy_from_slice(row),
        }
    }

    /// Tokens before `t`, and those from `t` on, of every sequence.
    pub(crate) fn split_tokens(self, t: usize) -> (Self, Self) {
        split!(self, split_tokens, t)
    }

    /// Sequences before `b`, and those from `b` on.
    pub(crate) fn split_batch(self, b: usize) -> (Self, Self) {
        split!(self, split_batch, b)
    }

    /// Heads before `h`, and those from `h` on, of every token.
    pub(crate) fn split_heads(self, h: usize) -> (Self, Self) {
        split!(self, split_heads, h)
    }
}

/// Rows that can be cut up for threads.
pub(crate) trait SplitRows: Sized {
    /// Sequences before `b`, and those from `b` on.
    fn batches(self, b: usize) -> (Self, Self);
    /// Heads before `h`, and those from `h` on, of every token.
    fn heads(self, h: usize) -> (Self, Self);
}

impl SplitRows for AnyRowsMut<'_> {
    fn batches(self, b: usize) -> (Self, Self) {
        self.split_batch(b)
    }

    fn heads(self, h: usize) -> (Self, Self) {
        self.split_heads(h)
    }
}

impl<T: Element> SplitRows for RowsMut<'_, T> {
    fn batches(self, b: usize) -> (Self, Self) {
        self.split_batch(b)
    }

    fn heads(self, h: usize) -> (Self, Self) {
        self.split_heads(h)
    }
}

/// The rows of `[batch, tokens, kv_heads * group, dim]` by sequence and KV head.
pub(crate) fn by_head<R: SplitRows>(
    rows: R,
    batch: usize,
    kv_heads: usize,
    group: usize,
) -> impl Iterator<Item = ((usize, usize), R)> {
    let (mut sequences, mut heads) = (Some(rows), None);
    (0..batch).flat_map(move |b| (0..kv_heads).map(move |head| (b, head))).filter_map(move |(b, head)| {
        if head == 0 {
            let (sequence, rest) = sequences.take()?.batches(1);
            (heads, sequences) = (Some(sequence), Some(rest));
        }
        let (piece, rest) = heads.take()?.heads(group);
        heads = Some(rest);
        Some(((b, head), piece))
    })
}
