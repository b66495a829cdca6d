//! Weights on the device: matrices in 16 bits, norms in f32.

use super::gpu::{Buffer, Gpu};
use super::kernels::Kernels;
use crate::llama::config::Config;
use crate::llama::error::Result;
use crate::llama::matmul::Matrix;
use crate::llama::sample::Rng;
use crate::llama::vector::to_f16;
use crate::llama::weights::Weights;
use half::slice::HalfFloatSliceExt;
use half::{bf16, f16};
use mustafar::DType;
use std::rc::Rc;

/// A matrix with contiguous rows.
#[derive(Debug)]
pub struct DeviceMatrix {
    pub rows: usize,
    pub cols: usize,
    memory: Buffer,
}

impl DeviceMatrix {
    pub fn address(&self) -> u64 {
        self.memory.address()
    }

    /// From the host. One row is a norm, and stays f32.
    pub fn upload(gpu: &Rc<Gpu>, dtype: DType, matrix: &Matrix) -> Result<Self> {
        let Matrix { rows, cols, ref data } = *matrix;
        let memory = match dtype {
            _ if rows == 1 => Buffer::of(gpu, data)?,
            DType::Bf16 => {
                let mut rounded = vec![bf16::ZERO; data.len()];
                rounded.convert_from_f32_slice(data);
                Buffer::of(gpu, &rounded)?
            }
            _ => {
                let mut rounded = vec![f16::ZERO; data.len()];
                to_f16(data, &mut rounded);
                Buffer::of(gpu, &rounded)?
            }
        };
        Ok(Self { rows, cols, memory })
    }
}

/// Normally distributed weights, made on the device; others than [`Weights::random`] gives for the same seed.
pub fn random(gpu: &Rc<Gpu>, kernels: &Kernels, config: &Config, seed: u64) -> Result<Weights<DeviceMatrix>> {
    let mut rng = Rng::new(seed);
    Weights::build(config, &mut |part| {
        let (rows, cols) = (part.total_rows(), part.cols);
        let deviation = 1.0 / (cols as f32).sqrt();
        let memory = if part.is_norm() {
            let norm: Vec<f32> = (0..cols).map(|_| 1.0 + rng.normal() as f32 * deviation).collect();
            Buffer::of(gpu, &norm)?
        } else {
            let count = (rows * cols).next_multiple_of(2);
            let memory = Buffer::elements::<u16>(gpu, count)?;
            kernels.fill_normal(memory.address(), count, rng.next_u64(), deviation)?;
            memory
        };
        Ok(DeviceMatrix { rows, cols, memory })
    })
}
