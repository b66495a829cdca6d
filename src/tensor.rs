//! Strided dense tensors `[batch, tokens, heads, dim]` over caller memory. The innermost dimension is contiguous;
//! strides are in elements, so `[B, T, H, D]`, `[B, H, T, D]` and slices of either need no copy.
#![allow(unsafe_code)]

use crate::dtype::DType;
use crate::error::{Error, Result};
use crate::mem::{self, Element, Mem, MemMut, Place};
use std::marker::PhantomData;
use std::ops::Range;

/// Sizes and strides shared by [`Tensor`] and [`TensorMut`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Shape {
    /// Sequences.
    pub batch: usize,
    /// Tokens per sequence.
    pub tokens: usize,
    /// Heads.
    pub heads: usize,
    /// Elements per head (head_dim).
    pub dim: usize,
    /// Elements from one sequence to the next.
    pub batch_stride: usize,
    /// Elements from one token to the next.
    pub token_stride: usize,
    /// Elements from one head to the next.
    pub head_stride: usize,
}

impl Shape {
    /// Contiguous `[batch, tokens, heads, dim]`.
    pub fn contiguous(batch: usize, tokens: usize, heads: usize, dim: usize) -> Result<Self> {
        let overflow = || Error::Overflow { argument: "tensor size" };
        let token_stride = heads.checked_mul(dim).ok_or_else(overflow)?;
        let batch_stride = tokens.checked_mul(token_stride).ok_or_else(overflow)?;
        batch.checked_mul(batch_stride).ok_or_else(overflow)?;
        Ok(Self { batch, tokens, heads, dim, batch_stride, token_stride, head_stride: dim })
    }

    /// Contiguous `[batch, heads, tokens, dim]`, the layout of Hugging Face caches.
    pub fn heads_first(batch: usize, heads: usize, tokens: usize, dim: usize) -> Result<Self> {
        let s = Self::contiguous(batch, heads, tokens, dim)?;
        Ok(Self { tokens, heads, head_stride: s.token_stride, token_stride: dim, ..s })
    }

    /// Number of elements from the first to one past the last; 0 when a dimension is 0.
    pub fn extent(&self, argument: &'static str) -> Result<usize> {
        if self.batch == 0 || self.tokens == 0 || self.heads == 0 || self.dim == 0 {
            return Ok(0);
        }
        let part = |n: usize, stride: usize| (n - 1).checked_mul(stride);
        part(self.batch, self.batch_stride)
            .and_then(|a| a.checked_add(part(self.tokens, self.token_stride)?))
            .and_then(|a| a.checked_add(part(self.heads, self.head_stride)?))
            .and_then(|a| a.checked_add(self.dim))
            .ok_or(Error::Overflow { argument })
    }

    /// Element offset of `[b, t, h, 0]`.
    #[must_use]
    pub fn offset(&self, b: usize, t: usize, h: usize) -> usize {
        b * self.batch_stride + t * self.token_stride + h * self.head_stride
    }

    /// True when two different rows never share an element, which writable tensors need.
    #[must_use]
    pub fn rows_are_disjoint(&self) -> bool {
        let mut dims = [
            (self.batch_stride, self.batch),
            (self.token_stride, self.tokens),
            (self.head_stride, self.heads),
        ];
        dims.sort_unstable();
        let mut reach = self.dim;
        for (stride, n) in dims {
            if n > 1 {
                if stride < reach {
                    return false;
                }
                reach = match (n - 1).checked_mul(stride).and_then(|x| x.checked_add(reach)) {
                    Some(r) => r,
                    None => return false,
                };
            }
        }
        true
    }

    pub(crate) fn check_disjoint(&self, argument: &'static str) -> Result<()> {
        if self.extent(argument)? > 0 && !self.rows_are_disjoint() {
            return Err(Error::invalid(
                argument,
                format!("strided {}/{}/{}", self.batch_stride, self.token_stride, self.head_stride),
                "strides under which no two rows overlap",
            ));
        }
        Ok(())
    }

    fn check(&self, argument: &'static str, dtype: DType, address: u64, bytes: usize) -> Result<()> {
        let needed = self.extent(argument)?.checked_mul(dtype.bytes()).ok_or(Error::Overflow { argument })?;
        if needed > 0 && address == 0 {
            return Err(Error::NullPointer { argument });
        }
        if needed > bytes {
            return Err(Error::BufferTooSmall { argument, bytes, needed });
        }
        if needed > 0 && !address.is_multiple_of(dtype.bytes() as u64) {
            return Err(Error::Misaligned { argument, value: address, required: dtype.bytes() });
        }
        Ok(())
    }
}

/// Read-only dense tensor.
#[derive(Debug, Clone, Copy)]
pub struct Tensor<'a> {
    pub(crate) mem: Mem<'a>,
    /// Element type.
    pub dtype: DType,
    /// Sizes and strides.
    pub shape: Shape,
}

/// Writable dense tensor.
#[derive(Debug)]
pub struct TensorMut<'a> {
    pub(crate) mem: MemMut<'a>,
    /// Element type.
    pub dtype: DType,
    /// Sizes and strides.
    pub shape: Shape,
}

impl<'a> Tensor<'a> {
    /// A tensor over `mem`. Errors (naming `argument`) if `mem` is null, misaligned for `dtype` or shorter than
    /// `shape` reaches.
    pub fn new(argument: &'static str, mem: Mem<'a>, dtype: DType, shape: Shape) -> Result<Self> {
        shape.check(argument, dtype, mem.address(), mem.bytes())?;
        Ok(Self { mem, dtype, shape })
    }

    /// The memory it lies in.
    #[must_use]
    pub fn mem(&self) -> Mem<'a> {
        self.mem
    }
}

impl<'a> TensorMut<'a> {
    /// As [`Tensor::new`]; also refuses strides that make rows overlap.
    pub fn new(argument: &'static str, mem: MemMut<'a>, dtype: DType, shape: Shape) -> Result<Self> {
        shape.check(argument, dtype, mem.address(), mem.bytes())?;
        shape.check_disjoint(argument)?;
        Ok(Self { mem, dtype, shape })
    }

    /// The memory it lies in.
    #[must_use]
    pub fn mem_mut(&mut self) -> MemMut<'_> {
        self.mem.reborrow()
    }
}

impl Shape {
    /// The shape of tokens `from .. to` of sequence `b`, and the elements in front of them.
    fn tokens(&self, b: usize, from: usize, to: usize) -> (Self, usize) {
        assert!(b < self.batch && from <= to && to <= self.tokens, "tokens out of range");
        let offset = if from == to { 0 } else { self.offset(b, from, 0) };
        (Self { batch: 1, tokens: to - from, ..*self }, offset)
    }
}

impl Tensor<'_> {
    /// Tokens `from .. to` of sequence `b` as a tensor of batch 1. Panics outside the shape.
    pub(crate) fn tokens(&self, argument: &'static str, b: usize, from: usize, to: usize) -> Result<Self> {
        let (shape, offset) = self.shape.tokens(b, from, to);
        Ok(Self { mem: self.mem.skip(argument, offset * self.dtype.bytes())?, shape, ..*self })
    }
}

impl Shape {
    /// The shape of some heads, and the elements in front of them.
    fn heads(&self, heads: &Range<usize>) -> (Self, usize) {
        assert!(heads.start <= heads.end && heads.end <= self.heads, "heads out of range");
        let empty = self.batch == 0 || self.tokens == 0 || heads.is_empty();
        let offset = if empty { 0 } else { heads.start * self.head_stride };
        (Self { heads: heads.len(), ..*self }, offset)
    }
}

impl<'a> Tensor<'a> {
    /// Some heads of every token. Panics outside the shape.
    pub(crate) fn heads(&self, argument: &'static str, heads: &Range<usize>) -> Result<Self> {
        let (shape, offset) = self.shape.heads(heads);
        Ok(Self { mem: self.mem.skip(argument, offset * self.dtype.bytes())?, shape, ..*self })
    }
}

impl TensorMut<'_> {
    /// As [`Tensor::heads`].
    pub(crate) fn heads(&mut self, argument: &'static str, heads: &Range<usize>) -> Result<TensorMut<'_>> {
        let (shape, offset) = self.shape.heads(heads);
        let mem = self.mem.reborrow().skip(argument, offset * self.dtype.bytes())?;
        Ok(TensorMut { mem, shape, dtype: self.dtype })
    }
}

impl<'a> Tensor<'a> {
    /// The elements for reading on the host; `T` must be the dtype's element type.
    pub(crate) fn rows<T: Element>(&self, argument: &'static str) -> Result<Rows<'a, T>> {
        debug_assert_eq!(size_of::<T>(), self.dtype.bytes());
        let elements = self.mem.slice(argument, self.shape.extent(argument)?)?;
        Ok(Rows { elements, shape: self.shape })
    }
}

impl TensorMut<'_> {
    /// The rows for writing on the host; `T` must be the dtype's element type.
    pub(crate) fn rows_mut<T: Element>(&mut self, argument: &'static str) -> Result<RowsMut<'_, T>> {
        debug_assert_eq!(size_of::<T>(), self.dtype.bytes());
        let (address, bytes, place) = (self.mem.address(), self.mem.bytes(), self.mem.place());
        mem::check::<T>(address, bytes, place, Place::Host, argument, self.shape.extent(argument)?)?;
        // Again, since `shape` is a public field.
        self.shape.check_disjoint(argument)?;
        Ok(RowsMut { first: address as *mut T, shape: self.shape, _life: PhantomData })
    }
}

/// Typed rows of a host tensor.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Rows<'a, T> {
    elements: &'a [T],
    pub(crate) shape: Shape,
}

impl<'a, T: Element> Rows<'a, T> {
    /// The elements from the start of one row to the end of the tensor.
    pub(crate) fn from(&self, b: usize, t: usize, h: usize) -> &'a [T] {
        &self.elements[self.shape.offset(b, t, h)..]
    }

    /// The `dim` elements of one row.
    pub(crate) fn row(&self, b: usize, t: usize, h: usize) -> &'a [T] {
        &self.elements[self.shape.offset(b, t, h)..][..self.shape.dim]
    }
}

/// Typed rows of a writable host tensor, splittable so that threads can write different rows.
///
/// Invariant: `shape` lies in memory that this value alone may write for `'a`, and its rows are disjoint.
#[derive(Debug)]
pub(crate) struct RowsMut<'a, T> {
    first: *mut T,
    pub(crate) shape: Shape,
    _life: PhantomData<&'a mut [T]>,
}

// SAFETY: a `RowsMut` is a `&mut` to the rows it describes, and `T: Element` is `Send`.
unsafe impl<T: Element> Send for RowsMut<'_, T> {}

impl<'a, T: Element> RowsMut<'a, T> {
    /// The `dim` elements of one row. Panics outside the shape.
    pub(crate) fn row_mut(&mut self, b: usize, t: usize, h: usize) -> &mut [T] {
        assert!(b < self.shape.batch && t < self.shape.tokens && h < self.shape.heads, "row out of range");
        // SAFETY: the index is inside `shape`, which the invariant says is ours to write; `&mut self` makes this
        // the only live slice of it.
        unsafe { std::slice::from_raw_parts_mut(self.first.add(self.shape.offset(b, t, h)), self.shape.dim) }
    }

    /// Sequences before `b`, and those from `b` on.
    pub(crate) fn split_batch(self, b: usize) -> (Self, Self) {
        assert!(b <= self.shape.batch, "split out of range");
        let (low, high) =
            (Shape { batch: b, ..self.shape }, Shape { batch: self.shape.batch - b, ..self.shape });
        let offset = b * self.shape.batch_stride;
        self.split(low, high, offset)
    }

    /// Tokens before `t`, and those from `t` on, of every sequence.
    pub(crate) fn split_tokens(self, t: usize) -> (Self, Self) {
        assert!(t <= self.shape.tokens, "split out of range");
        let (low, high) =
            (Shape { tokens: t, ..self.shape }, Shape { tokens: self.shape.tokens - t, ..self.shape });
        let offset = t * self.shape.token_stride;
        self.split(low, high, offset)
    }

    /// Heads before `h`, and those from `h` on, of every token.
    pub(crate) fn split_heads(self, h: usize) -> (Self, Self) {
        assert!(h <= self.shape.heads, "split out of range");
        let (low, high) =
            (Shape { heads: h, ..self.shape }, Shape { heads: self.shape.heads - h, ..self.shape });
        let offset = h * self.shape.head_stride;
        self.split(low, high, offset)
    }

    /// Each sequence, as a batch of 1.
    pub(crate) fn sequences(self) -> impl Iterator<Item = Self> + Send {
        self.pieces(1, |shape| shape.batch, Self::split_batch)
    }

    /// Each head of every sequence and token.
    pub(crate) fn heads(self) -> impl Iterator<Item = Self> + Send {
        self.pieces(1, |shape| shape.heads, Self::split_heads)
    }

    /// Consecutive tokens of every sequence, `tokens` at a time.
    pub(crate) fn chunks(self, tokens: usize) -> impl Iterator<Item = Self> + Send {
        self.pieces(tokens, |shape| shape.tokens, Self::split_tokens)
    }

    fn pieces(
        self,
        size: usize,
        left: fn(&Shape) -> usize,
        split: fn(Self, usize) -> (Self, Self),
    ) -> impl Iterator<Item = Self> + Send {
        let mut rest = Some(self);
        std::iter::from_fn(move || {
            let rows = rest.take()?;
            let left = left(&rows.shape);
            let (piece, after) = split(rows, size.min(left));
            rest = Some(after);
            (left > 0).then_some(piece)
        })
    }

    fn split(self, low: Shape, high: Shape, offset: usize) -> (Self, Self) {
        // `wrapping_add`: an empty high part may start past the end of the memory and is never dereferenced.
        let second = self.first.wrapping_add(offset);
        (
            Self { first: self.first, shape: low, _life: PhantomData },
            Self { first: second, shape: high, _life: PhantomData },
        )
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use crate::mem::Place;

    fn shape(sizes: [usize; 4], strides: [usize; 3]) -> Shape {
        let [batch, tokens, heads, dim] = sizes;
        let [batch_stride, token_stride, head_stride] = strides;
        Shape { batch, tokens, heads, dim, batch_stride, token_stride, head_stride }
    }

    /// A view whose address is checked but never dereferenced.
    fn view(address: u64, bytes: usize) -> Mem<'static> {
        // SAFETY: the tests below only check it.
        unsafe { Mem::from_raw(address, bytes, Place::Host) }
    }

    #[test]
    fn the_two_usual_layouts() {
        assert_eq!(Shape::contiguous(2, 5, 3, 64), Ok(shape([2, 5, 3, 64], [960, 192, 64])));
        assert_eq!(Shape::heads_first(2, 3, 5, 64), Ok(shape([2, 5, 3, 64], [960, 64, 320])));
        for s in [Shape::contiguous(2, 5, 3, 64).unwrap(), Shape::heads_first(2, 3, 5, 64).unwrap()] {
            assert_eq!(s.extent("x"), Ok(1920));
            assert_eq!(s.offset(1, 4, 2) + 64, 1920);
        }
    }

    #[test]
    fn extents() {
        // A slice of one head out of three: the last row ends before the last token does.
        assert_eq!(shape([1, 5, 1, 64], [0, 192, 0]).extent("x"), Ok(4 * 192 + 64));
        for empty in [[0, 5, 3, 64], [2, 0, 3, 64], [2, 5, 0, 64], [2, 5, 3, 0]] {
            assert_eq!(shape(empty, [usize::MAX; 3]).extent("x"), Ok(0));
        }
        // Strides of dimensions of one do not count.
        assert_eq!(shape([1, 1, 1, 64], [usize::MAX; 3]).extent("x"), Ok(64));
    }

    #[test]
    fn sizes_that_overflow_are_refused() {
        let overflow = Err(Error::Overflow { argument: "x" });
        assert_eq!(shape([3, 1, 1, 64], [usize::MAX / 2 + 1, 0, 0]).extent("x"), overflow);
        assert_eq!(shape([2, 2, 1, 64], [usize::MAX / 2, usize::MAX / 2 + 1, 0]).extent("x"), overflow);
        assert_eq!(shape([2, 1, 1, 64], [usize::MAX - 63, 0, 0]).extent("x"), overflow);
        assert!(Shape::contiguous(usize::MAX, 2, 1, 1).is_err());
        assert!(Shape::contiguous(1, usize::MAX, 2, 1).is_err());
        assert!(Shape::heads_first(1, usize::MAX, 1, 2).is_err());
        // Elements fit, bytes do not.
        let half = shape([2, 1, 1, 64], [usize::MAX / 2, 0, 0]);
        let result = Tensor::new("x", view(0x1000, usize::MAX), DType::F32, half);
        assert_eq!(result.map(|_| ()), Err(Error::Overflow { argument: "x" }));
    }

    #[test]
    fn memory_must_hold_the_shape() {
        let s = Shape::contiguous(1, 2, 1, 64).unwrap();
        let new = |address, bytes, dtype| Tensor::new("q", view(address, bytes), dtype, s).map(|_| ());
        assert_eq!(new(0x1002, 256, DType::F16), Ok(()));
        assert_eq!(new(0, 256, DType::F16), Err(Error::NullPointer { argument: "q" }));
        let short = Error::BufferTooSmall { argument: "q", bytes: 511, needed: 512 };
        assert_eq!(new(0x1000, 511, DType::F32), Err(short));
        let misaligned = Error::Misaligned { argument: "q", value: 0x1002, required: 4 };
        assert_eq!(new(0x1002, 512, DType::F32), Err(misaligned));
        // An empty tensor needs no memory.
        assert!(Tensor::new("q", view(0, 0), DType::F32, Shape { tokens: 0, ..s }).is_ok());
    }

    #[test]
    fn writable_rows_must_be_disjoint() {
        for (sizes, strides, disjoint) in [
            ([2, 5, 3, 64], [960, 192, 64], true),
            ([2, 5, 3, 64], [960, 64, 320], true),
            ([2, 5, 3, 64], [192, 384, 64], true), // sequences interleaved
            ([1, 5, 3, 64], [0, 192, 64], true),   // stride of a dimension of one
            ([1, 5, 3, 64], [0, 191, 64], false),  // tokens overlap by one element
            ([1, 5, 3, 64], [0, 192, 63], false),
            ([2, 5, 3, 64], [0, 192, 64], false), // every sequence the same memory
            ([2, 5, 3, 64], [959, 192, 64], false),
            ([1, 3, 2, 64], [0, usize::MAX, 64], false), // overflows
        ] {
            assert_eq!(shape(sizes, strides).rows_are_disjoint(), disjoint, "{sizes:?} {strides:?}");
        }
        let mut memory = [0u16; 256];
        let overlapping = shape([1, 3, 1, 64], [0, 32, 0]);
        let error = TensorMut::new("out", MemMut::host(&mut memory), DType::F16, overlapping).map(|_| ());
        assert_eq!(
            error.unwrap_err().to_string(),
            "out is strided 0/32/0; allowed: strides under which no two rows overlap"
        );
    }

    #[test]
    fn splits_reach_every_row_once() {
        let s = shape([2, 3, 2, 4], [40, 12, 5]);
        let mut memory = vec![0u16; s.extent("x").unwrap()];
        let mut tensor = TensorMut::new("x", MemMut::host(&mut memory), DType::F16, s).unwrap();
        let (mut first, second) = tensor.rows_mut::<u16>("x").unwrap().split_batch(1);
        let (mut early, late) = second.split_tokens(2);
        let (mut low, mut high) = late.split_heads(1);
        first.row_mut(0, 2, 1).fill(1);
        early.row_mut(0, 1, 0).fill(2);
        low.row_mut(0, 0, 0).fill(3);
        high.row_mut(0, 0, 0).fill(4);
        let tensor = Tensor::new("x", Mem::host(&memory), DType::F16, s).unwrap();
        let rows = tensor.rows::<u16>("x").unwrap();
        assert_eq!([rows.row(0, 2, 1), rows.row(1, 1, 0)], [&[1; 4], &[2; 4]]);
        assert_eq!([rows.row(1, 2, 0), rows.row(1, 2, 1)], [&[3; 4], &[4; 4]]);
        assert_eq!(memory.iter().filter(|&&x| x != 0).count(), 16);
    }

    #[test]
    #[should_panic(expected = "row out of range")]
    fn rows_outside_the_shape_do_not_exist() {
        let mut memory = [0u16; 128];
        let s = Shape::contiguous(1, 2, 1, 64).unwrap();
        let mut tensor = TensorMut::new("x", MemMut::host(&mut memory), DType::F16, s).unwrap();
        let _ = tensor.rows_mut::<u16>("x").unwrap().row_mut(0, 2, 0);
    }
}
