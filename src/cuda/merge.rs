//! Launch of `merge`.
#![allow(unsafe_code)]

use super::Device;
use super::args::{int32, stride};
use super::kernels::{Kernel, LaunchShape, grid_rows};
use super::params::{MergeOperand, MergeParams};
use crate::backend::Stream;
use crate::error::{Error, Result};
use crate::ops::merge::Merge;
use crate::tensor::Tensor;

/// Threads of a block.
const THREADS: u32 = 128;
pub(crate) fn merge(device: &Device, stream: Stream, args: &mut Merge<'_>) -> Result<()> {
    let _entered = device.context.enter()?;
    let shape = args.a.shape;
    let operand = |[values_name, lse_name]: [&'static str; 2], values: &Tensor<'_>, lse: &Tensor<'_>| {
        Ok::<_, Error>(MergeOperand {
            values: device.tensor(values_name, values)?,
            lse: device.tensor(lse_name, lse)?.cast(),
            token_stride: stride(values_name, shape.tokens, values.shape.token_stride)?,
            head_stride: stride(values_name, shape.heads, values.shape.head_stride)?,
            lse_token_stride: stride(lse_name, shape.tokens, lse.shape.token_stride)?,
            lse_head_stride: stride(lse_name, shape.heads, lse.shape.head_stride)?,
            dtype: values.dtype as i32,
            reserved: 0,
        })
    };
    let (lse, lse_token_stride, lse_head_stride) = device.lse(args.lse.as_mut())?;
    let params = MergeParams {
        a: operand(["a", "a_lse"], &args.a, &args.a_lse)?,
        b: operand(["b", "b_lse"], &args.b, &args.b_lse)?,
        out_token_stride: stride("out", shape.tokens, args.out.shape.token_stride)?,
        out_head_stride: stride("out", shape.heads, args.out.shape.head_stride)?,
        lse_token_stride,
        lse_head_stride,
        out_dtype: args.out.dtype as i32,
        dim: int32("a.dim", shape.dim)?,
        out: device.tensor_mut("out", &mut args.out)?,
        lse,
    };
    let grid = [grid_rows("a.heads", shape.heads)?, grid_rows("a.tokens", shape.tokens)?, 1];
    // SAFETY: every pointer was checked to reach as far as tokens, heads and strides go, and views promise the memory
    // until the stream has run this.
    unsafe { device.kernels.launch(Kernel::Merge, LaunchShape::new(grid, THREADS), stream, &params) }
}
