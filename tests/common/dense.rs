//! Dense tensors with any strides, poison between their rows.

use super::bytes::POISON;
use super::{Bytes, Dist, Rng, to_f64};
use mustafar::{DType, Mem, MemMut, Shape, Tensor, TensorMut};

/// How rows lie in memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Layout {
    /// `[batch, tokens, heads, dim]`.
    TokensFirst,
    /// `[batch, heads, tokens, dim]`.
    HeadsFirst,
    /// `[batch, tokens, heads, dim]` with gaps after every row, token and sequence; strides are odd, so rows of
    /// 16-bit elements are aligned to 2 bytes only.
    Gaps,
}

impl Layout {
    pub const ALL: [Self; 3] = [Self::TokensFirst, Self::HeadsFirst, Self::Gaps];

    pub fn shape(self, batch: usize, tokens: usize, heads: usize, dim: usize) -> Shape {
        match self {
            Self::TokensFirst => Shape::contiguous(batch, tokens, heads, dim).unwrap(),
            Self::HeadsFirst => Shape::heads_first(batch, heads, tokens, dim).unwrap(),
            Self::Gaps => {
                let head_stride = dim + 3;
                let token_stride = heads * head_stride + 1 + heads % 2;
                let batch_stride = tokens * token_stride + 7;
                Shape { batch, tokens, heads, dim, batch_stride, token_stride, head_stride }
            }
        }
    }
}

/// A tensor that owns its memory.
#[derive(Debug, Clone)]
pub struct Dense {
    pub bytes: Bytes,
    pub dtype: DType,
    pub shape: Shape,
}

impl Dense {
    /// All poison: an output.
    pub fn poisoned(dtype: DType, shape: Shape) -> Self {
        let bytes = Bytes::poisoned(shape.extent("test tensor").unwrap() * dtype.bytes());
        Self { bytes, dtype, shape }
    }

    /// Rows from `dist` (f32: from a normal distribution), gaps poisoned.
    pub fn random(rng: &mut Rng, dist: Dist, dtype: DType, shape: Shape) -> Self {
        let mut new = Self::poisoned(dtype, shape);
        for (b, t, h) in new.indices() {
            if dtype == DType::F32 {
                let row: Vec<f64> = (0..shape.dim).map(|_| rng.normal()).collect();
                new.set_row(b, t, h, &row);
            } else {
                let row = rng.row(dist, dtype, shape.dim);
                new.set_row_bits(b, t, h, &row);
            }
        }
        new
    }

    /// With every element [`super::coarse`].
    pub fn coarse(mut self) -> Self {
        for (b, t, h) in self.indices() {
            let row: Vec<f64> = self.row(b, t, h).into_iter().map(super::coarse).collect();
            self.set_row(b, t, h, &row);
        }
        self
    }

    /// Every (batch, token, head).
    pub fn indices(&self) -> Vec<(usize, usize, usize)> {
        let Shape { batch, tokens, heads, .. } = self.shape;
        (0..batch).flat_map(|b| (0..tokens).flat_map(move |t| (0..heads).map(move |h| (b, t, h)))).collect()
    }

    fn range(&self, b: usize, t: usize, h: usize) -> std::ops::Range<usize> {
        if self.shape.dim == 0 {
            return 0..0; // nothing is allocated for rows without elements
        }
        let start = self.shape.offset(b, t, h) * self.dtype.bytes();
        start..start + self.shape.dim * self.dtype.bytes()
    }

    /// A row as numbers.
    pub fn row(&self, b: usize, t: usize, h: usize) -> Vec<f64> {
        let row = &self.bytes[self.range(b, t, h)];
        row.chunks(self.dtype.bytes()).map(|x| to_f64(self.dtype, x)).collect()
    }

    /// A row of a 16-bit tensor as bit patterns.
    pub fn row_bits(&self, b: usize, t: usize, h: usize) -> Vec<u16> {
        assert_eq!(self.dtype.bytes(), 2);
        self.bytes[self.range(b, t, h)].chunks(2).map(|x| u16::from_le_bytes([x[0], x[1]])).collect()
    }

    /// Writes a row, rounding to the dtype.
    pub fn set_row(&mut self, b: usize, t: usize, h: usize, row: &[f64]) {
        let dtype = self.dtype;
        let encode = |x: &f64| match dtype {
            DType::F32 => (*x as f32).to_le_bytes().to_vec(),
            _ => mustafar::reference::round(dtype, *x as f32).to_le_bytes().to_vec(),
        };
        let range = self.range(b, t, h);
        self.bytes[range].copy_from_slice(&row.iter().flat_map(encode).collect::<Vec<_>>());
    }

    /// Writes a row of a 16-bit tensor.
    pub fn set_row_bits(&mut self, b: usize, t: usize, h: usize, row: &[u16]) {
        assert_eq!(self.dtype.bytes(), 2);
        let range = self.range(b, t, h);
        self.bytes[range].copy_from_slice(&row.iter().flat_map(|x| x.to_le_bytes()).collect::<Vec<_>>());
    }

    /// True while a row is untouched poison.
    pub fn is_poisoned(&self, b: usize, t: usize, h: usize) -> bool {
        self.bytes[self.range(b, t, h)].iter().all(|&x| x == POISON)
    }

    /// Fails if anything between the rows was written.
    pub fn assert_gaps_untouched(&self) {
        let mut inside = vec![false; self.bytes.len()];
        for (b, t, h) in self.indices() {
            inside[self.range(b, t, h)].fill(true);
        }
        let touched = inside.iter().zip(self.bytes.iter()).position(|(inside, &x)| !inside && x != POISON);
        assert_eq!(touched, None, "byte between the rows of the tensor was written");
    }

    pub fn view(&self) -> Tensor<'_> {
        Tensor::new("test tensor", Mem::host(&self.bytes[..]), self.dtype, self.shape).unwrap()
    }

    pub fn view_mut(&mut self) -> TensorMut<'_> {
        TensorMut::new("test tensor", MemMut::host(&mut self.bytes[..]), self.dtype, self.shape).unwrap()
    }
}
