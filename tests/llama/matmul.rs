//! Matrix products, all of them by the `gemm` crates, and the time they take.
//!
//! The f32 kernel crate is used without its `gemm` front, which would also compile the complex and f64 kernels.
#![allow(unsafe_code, reason = "the kernels take raw pointers")]

use rayon::prelude::*;

/// Right-hand sides up to this many are done as matrix-vector products: packing the matrix would cost more.
const FEW: usize = 8;
/// Matrix elements that stay in the L2 cache while several vectors are multiplied with them.
const BLOCK_ELEMENTS: usize = 1 << 16;

/// A strided matrix: element (r, c) is `data[r * row_stride + c * col_stride]`.
#[derive(Clone, Copy)]
pub struct View<'a> {
    pub data: &'a [f32],
    pub rows: usize,
    pub cols: usize,
    pub row_stride: usize,
    pub col_stride: usize,
}

impl<'a> View<'a> {
    /// Rows of `row_stride` elements, of which the first `cols` count.
    pub fn rows(data: &'a [f32], rows: usize, cols: usize, row_stride: usize) -> Self {
        Self { data, rows, cols, row_stride, col_stride: 1 }
    }

    pub fn transposed(self) -> Self {
        Self {
            rows: self.cols,
            cols: self.rows,
            row_stride: self.col_stride,
            col_stride: self.row_stride,
            ..self
        }
    }

    fn check(&self) {
        assert!(self.rows > 0 && self.cols > 0, "empty matrix");
        let last = (self.rows - 1) * self.row_stride + (self.cols - 1) * self.col_stride;
        assert!(last < self.data.len(), "matrix reaches past its data");
    }
}

/// `out = left . right`, `out` with contiguous rows; plus the old `out` if `accumulate`. `threads` of the current
/// rayon pool at most.
pub fn product(out: &mut [f32], left: View<'_>, right: View<'_>, accumulate: bool, threads: usize) {
    let (m, n, k) = (left.rows, right.cols, left.cols);
    left.check();
    right.check();
    assert_eq!(k, right.rows, "inner dimensions");
    assert_eq!(out.len(), m * n, "output size");
    let parallelism = match threads {
        1 => gemm_common::Parallelism::None,
        n => gemm_common::Parallelism::Rayon(n),
    };
    // SAFETY: `check` holds every index the strides can form inside `data`, `out` has m * n elements for row stride
    // n and column stride 1, and `&mut` keeps it apart from the inputs.
    unsafe {
        gemm_f32::gemm::f32::get_gemm_fn()(
            m,
            n,
            k,
            out.as_mut_ptr(),
            1,
            n as isize,
            accumulate,
            left.data.as_ptr(),
            left.col_stride as isize,
            left.row_stride as isize,
            right.data.as_ptr(),
            right.col_stride as isize,
            right.row_stride as isize,
            1.0,
            1.0,
            false,
            false,
            false,
            parallelism,
        );
    }
}

/// A weight matrix with contiguous rows.
#[derive(Debug, Clone)]
pub struct Matrix {
    pub rows: usize,
    pub cols: usize,
    pub data: Vec<f32>,
}

impl Matrix {
    pub fn view(&self) -> View<'_> {
        View::rows(&self.data, self.rows, self.cols, self.cols)
    }

    pub fn row(&self, r: usize) -> &[f32] {
        &self.data[r * self.cols..][..self.cols]
    }

    /// `y[i] = self . x[i]` for `n` vectors: `x` is `[n, cols]`, `y` is `[n, rows]`.
    pub fn apply(&self, x: &[f32], n: usize, y: &mut [f32], threads: usize) {
        assert_eq!(x.len(), n * self.cols, "input size");
        assert_eq!(y.len(), n * self.rows, "output size");
        if n > FEW {
            product(y, View::rows(x, n, self.cols, self.cols), self.view().transposed(), false, threads);
            return;
        }
        // Each task takes a band of rows for all vectors. Bands have a fixed size, so results do not depend on
        // the number of threads.
        let band = (BLOCK_ELEMENTS / self.cols).max(1);
        let mut tasks: Vec<(usize, Vec<&mut [f32]>)> =
            (0..self.rows).step_by(band).map(|first| (first, Vec::with_capacity(n))).collect();
        for y in y.chunks_exact_mut(self.rows) {
            for (task, part) in tasks.iter_mut().zip(y.chunks_mut(band)) {
                task.1.push(part);
            }
        }
        let run = |(first, parts): (usize, Vec<&mut [f32]>)| {
            for (part, x) in parts.into_iter().zip(x.chunks_exact(self.cols)) {
                let rows = View::rows(&self.data[first * self.cols..], part.len(), self.cols, self.cols);
                product(part, rows, View::rows(x, self.cols, 1, 1), false, 1);
            }
        };
        tasks.into_par_iter().for_each(run);
    }
}
