//! Matrix products by cuBLAS: 16-bit factors, sums in f32.
//!
//! cuBLAS has columns contiguous, this loop rows: what is a matrix with rows here is its transpose there.
#![allow(unsafe_code, reason = "cuBLAS takes raw addresses")]

use super::gpu::{Buffer, Gpu};
use super::weights::DeviceMatrix;
use crate::llama::error::{Error, Result};
use cudarc::cublas::result::CublasError;
use cudarc::cublas::{result, sys};
use mustafar::DType;
use std::rc::Rc;

/// What cuBLAS recommends for its largest kernels; its own allocation could not be made during a graph capture.
const WORKSPACE_BYTES: usize = 32 << 20;

const COMPUTE: sys::cublasComputeType_t = sys::cublasComputeType_t::CUBLAS_COMPUTE_32F;
const ALGORITHM: sys::cublasGemmAlgo_t = sys::cublasGemmAlgo_t::CUBLAS_GEMM_DEFAULT;

fn blas_error(during: &'static str) -> impl Fn(CublasError) -> Error {
    move |e| mustafar::Error::Cuda { during, code: e.0 as i32, text: format!("{e:?}") }.into()
}

fn data_type(dtype: DType) -> sys::cudaDataType {
    match dtype {
        DType::Bf16 => sys::cudaDataType::CUDA_R_16BF,
        DType::F32 => sys::cudaDataType::CUDA_R_32F,
        _ => sys::cudaDataType::CUDA_R_16F,
    }
}

/// Rows on the device, `pitch` elements apart; of a stack of matrices one every `stride` elements.
#[derive(Debug, Clone, Copy)]
pub struct Rows {
    pub address: u64,
    pub pitch: usize,
    pub stride: usize,
}

impl Rows {
    pub fn new(address: u64, pitch: usize) -> Self {
        Self { address, pitch, stride: 0 }
    }
}

#[derive(Debug)]
pub struct Blas {
    handle: sys::cublasHandle_t,
    /// Of the factors.
    dtype: DType,
    _workspace: Buffer,
}

impl Blas {
    pub fn new(gpu: &Rc<Gpu>, dtype: DType) -> Result<Self> {
        let workspace = Buffer::new(gpu, WORKSPACE_BYTES)?;
        let handle = result::create_handle().map_err(blas_error("cublasCreate"))?;
        let new = Self { handle, dtype, _workspace: workspace };
        // SAFETY: the handle is new; stream and workspace outlive it, as fields of those who hold it.
        unsafe {
            result::set_stream(handle, gpu.raw_stream().cast()).map_err(blas_error("cublasSetStream"))?;
            let address = new._workspace.address() as usize as *mut _;
            sys::cublasSetWorkspace_v2(handle, address, WORKSPACE_BYTES)
                .result()
                .map_err(blas_error("cublasSetWorkspace"))?;
        }
        Ok(new)
    }

    /// `y[i] = weights . x[i]` for `n` vectors, plus the old `y` if `accumulate`; `y` has elements of type `out`.
    pub fn apply(
        &self,
        weights: &DeviceMatrix,
        x: Rows,
        n: usize,
        y: Rows,
        out: DType,
        accumulate: bool,
    ) -> Result<()> {
        let (one, beta) = (1.0f32, if accumulate { 1.0f32 } else { 0.0 });
        let (value, out) = (data_type(self.dtype), data_type(out));
        // SAFETY: the caller's rows have room for n vectors of the matrix's width and height.
        unsafe {
            sys::cublasGemmEx(
                self.handle,
                sys::cublasOperation_t::CUBLAS_OP_T,
                sys::cublasOperation_t::CUBLAS_OP_N,
                weights.rows as i32,
                n as i32,
                weights.cols as i32,
                (&raw const one).cast(),
                pointer(weights.address()).cast_const(),
                value,
                weights.cols as i32,
                pointer(x.address).cast_const(),
                value,
                x.pitch as i32,
                (&raw const beta).cast(),
                pointer(y.address),
                out,
                y.pitch as i32,
                COMPUTE,
                ALGORITHM,
            )
        }
        .result()
        .map_err(blas_error("cublasGemmEx"))
    }

    /// `out = factor * left . right`, or `left . right^T` if `transposed`, for `count` stacked matrices; `[m, k]` times
    /// `[k, n]`, with elements of type `out_type` in the result.
    #[allow(clippy::too_many_arguments, reason = "a product has that many")]
    pub fn product(
        &self,
        [m, n, k]: [usize; 3],
        factor: f32,
        left: Rows,
        (right, transposed): (Rows, bool),
        out: Rows,
        out_type: DType,
        count: usize,
    ) -> Result<()> {
        let zero = 0.0f32;
        let value = data_type(self.dtype);
        let operation = match transposed {
            true => sys::cublasOperation_t::CUBLAS_OP_T,
            false => sys::cublasOperation_t::CUBLAS_OP_N,
        };
        // SAFETY: the caller's rows reach as far as the sizes say.
        unsafe {
            sys::cublasGemmStridedBatchedEx(
                self.handle,
                operation,
                sys::cublasOperation_t::CUBLAS_OP_N,
                n as i32,
                m as i32,
                k as i32,
                (&raw const factor).cast(),
                pointer(right.address).cast_const(),
                value,
                right.pitch as i32,
                right.stride as i64,
                pointer(left.address).cast_const(),
                value,
                left.pitch as i32,
                left.stride as i64,
                (&raw const zero).cast(),
                pointer(out.address),
                data_type(out_type),
                out.pitch as i32,
                out.stride as i64,
                count as i32,
                COMPUTE,
                ALGORITHM,
            )
        }
        .result()
        .map_err(blas_error("cublasGemmStridedBatchedEx"))
    }
}

fn pointer(address: u64) -> *mut std::ffi::c_void {
    address as usize as *mut _
}

impl Drop for Blas {
    fn drop(&mut self) {
        // SAFETY: made in `new`, destroyed once. Nothing can be done about an error.
        let _ = unsafe { result::destroy_handle(self.handle) };
    }
}
