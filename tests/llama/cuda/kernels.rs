//! The kernels of `kernels.cu`, compiled by NVRTC when a model is made.
#![allow(unsafe_code, reason = "launches take raw addresses")]

use super::gpu::{Gpu, driver_error};
use crate::llama::error::{Error, Result};
use cudarc::driver::{result, sys};
use cudarc::nvrtc::{CompileError, CompileOptions, compile_ptx_with_opts};
use mustafar::DType;
use std::ffi::{CString, c_void};
use std::rc::Rc;

const SOURCE: &str = include_str!("kernels.cu");
const THREADS: u32 = 256;
/// For rows of a few thousand numbers of which there may be only one.
const ROW_THREADS: u32 = 512;
const PICK_THREADS: u32 = 1024;
/// Blocks that fill a device.
const FILL_BLOCKS: u32 = 1024;

#[derive(Debug)]
pub struct Kernels {
    gpu: Rc<Gpu>,
    module: sys::CUmodule,
    embed: sys::CUfunction,
    rms_norm: sys::CUfunction,
    rope: sys::CUfunction,
    causal_softmax: sys::CUfunction,
    silu_mul: sys::CUfunction,
    pick: sys::CUfunction,
    fill_normal: sys::CUfunction,
}

/// Submits a kernel; arguments are copied before the call returns.
macro_rules! launch {
    ($self:ident.$kernel:ident, $grid:expr, $threads:expr, [$($argument:expr),* $(,)?]) => {
        $self.submit($self.$kernel, $grid, $threads, &mut [$(std::ptr::from_ref(&$argument).cast_mut().cast()),*])
    };
}

/// Where [`Kernels::rope`] also puts keys and values: dense tensors `[sequences, capacity, kv heads, dim]`.
#[derive(Debug, Clone, Copy)]
pub struct DenseTarget {
    pub k: u64,
    pub v: u64,
    pub capacity: usize,
    /// Sequences that get the row.
    pub copies: usize,
}

/// Shape of a row of queries, keys and values.
#[derive(Debug, Clone, Copy)]
pub struct RowShape {
    pub heads: usize,
    pub kv_heads: usize,
    pub dim: usize,
    /// Pairs of a head that turn.
    pub pairs: usize,
}

/// PTX for a compute capability such as 90.
pub fn compile(dtype: DType, capability: i32) -> Result<Vec<u8>> {
    let mut options = vec![format!("--gpu-architecture=compute_{capability}"), "--std=c++17".to_string()];
    if dtype == DType::Bf16 {
        options.push("--define-macro=VALUE_BF16".to_string());
    }
    let options = CompileOptions { options, name: Some("kernels.cu".into()), ..CompileOptions::default() };
    let ptx = compile_ptx_with_opts(SOURCE, options).map_err(|e| {
        let text = match e {
            CompileError::CompileError { log, .. } => log.to_string_lossy().into_owned(),
            other => other.to_string(),
        };
        Error::Mustafar(mustafar::Error::Cuda { during: "nvrtcCompileProgram", code: 0, text })
    })?;
    Ok(ptx.to_src().into_bytes())
}

impl Kernels {
    pub fn new(gpu: &Rc<Gpu>, dtype: DType) -> Result<Self> {
        let mut ptx = compile(dtype, gpu.capability()?)?;
        ptx.push(0);
        // SAFETY: PTX that ends in a 0.
        let module = unsafe { result::module::load_data(ptx.as_ptr().cast()) }
            .map_err(driver_error("cuModuleLoadData"))?;
        let function = |name: &str| {
            let name = CString::new(name).map_err(|e| Error::Invalid(e.to_string()))?;
            // SAFETY: the module is loaded.
            let function = unsafe { result::module::get_function(module, name) };
            function.map_err(driver_error("cuModuleGetFunction"))
        };
        Ok(Self {
            gpu: Rc::clone(gpu),
            embed: function("embed")?,
            rms_norm: function("rms_norm")?,
            rope: function("rope")?,
            causal_softmax: function("causal_softmax")?,
            silu_mul: function("silu_mul")?,
            pick: function("pick")?,
            fill_normal: function("fill_normal")?,
            module,
        })
    }

    fn submit(
        &self,
        function: sys::CUfunction,
        (x, y): (usize, usize),
        threads: u32,
        arguments: &mut [*mut c_void],
    ) -> Result<()> {
        let (grid, block) = ((x as u32, y as u32, 1), (threads, 1, 1));
        // SAFETY: the arguments have the types of the kernel's parameters, and the addresses among them reach as far
        // as the sizes, which the callers in this module see to.
        unsafe { result::launch_kernel(function, grid, block, 0, self.gpu.raw_stream(), arguments) }
            .map_err(driver_error("cuLaunchKernel"))
    }

    /// Rows of the embedding, f32.
    pub fn embed(&self, x: u64, table: u64, tokens: u64, rows: usize, hidden: usize) -> Result<()> {
        launch!(self.embed, (rows, 1), ROW_THREADS, [x, table, tokens, hidden as i32])
    }

    /// 16-bit `out` from f32 `x`, both `[rows, hidden]`.
    pub fn rms_norm(
        &self,
        out: u64,
        x: u64,
        weight: u64,
        rows: usize,
        hidden: usize,
        eps: f32,
    ) -> Result<()> {
        launch!(self.rms_norm, (rows, 1), ROW_THREADS, [out, x, weight, hidden as i32, eps])
    }

    /// Turns queries and keys in place. `positions` has one of each row; null: the row is the position.
    pub fn rope(
        &self,
        qkv: u64,
        rows: usize,
        shape: RowShape,
        turns: u64,
        positions: u64,
        dense: Option<DenseTarget>,
    ) -> Result<()> {
        let RowShape { heads, kv_heads, dim, pairs } = shape;
        let dense = dense.unwrap_or(DenseTarget { k: 0, v: 0, capacity: 0, copies: 0 });
        let (capacity, copies) = (dense.capacity as i64, dense.copies as i32);
        let [heads_arg, kv_heads_arg, dim_arg, pairs] = [heads, kv_heads, dim, pairs].map(|n| n as i32);
        launch!(
            self.rope,
            (rows, heads + 2 * kv_heads),
            (dim / 2) as u32,
            [
                qkv,
                turns,
                positions,
                dense.k,
                dense.v,
                capacity,
                copies,
                heads_arg,
                kv_heads_arg,
                dim_arg,
                pairs
            ]
        )
    }

    /// Weights times [`WEIGHT_SCALE`] from f32 scores, both `[heads, rows, pitch]`; `lse` as `[rows, lse_pitch]`.
    #[allow(clippy::too_many_arguments, reason = "as the kernel")]
    pub fn causal_softmax(
        &self,
        weights: u64,
        scores: u64,
        (lse, lse_pitch): (u64, usize),
        (rows, heads): (usize, usize),
        first: usize,
        seen: usize,
        pitch: usize,
    ) -> Result<()> {
        let (first, seen, pitch, lse_pitch) = (first as i32, seen as i32, pitch as i64, lse_pitch as i32);
        launch!(
            self.causal_softmax,
            (rows, heads),
            ROW_THREADS,
            [weights, scores, lse, first, seen, pitch, lse_pitch]
        )
    }

    /// `[rows, 2 * ffn]`, of which the first halves are replaced.
    pub fn silu_mul(&self, gate_up: u64, rows: usize, ffn: usize) -> Result<()> {
        let columns = ffn.div_ceil(THREADS as usize);
        launch!(self.silu_mul, (columns, rows), THREADS, [gate_up, ffn as i32])
    }

    /// The likeliest token of each row, and its position and length plus one.
    pub fn pick(
        &self,
        tokens: u64,
        positions: u64,
        lens: u64,
        logits: u64,
        rows: usize,
        vocab: usize,
    ) -> Result<()> {
        launch!(self.pick, (rows, 1), PICK_THREADS, [tokens, positions, lens, logits, vocab as i32])
    }

    /// `count` normally distributed 16-bit numbers; an even count.
    pub fn fill_normal(&self, out: u64, count: usize, seed: u64, deviation: f32) -> Result<()> {
        assert!(count.is_multiple_of(2), "numbers come in pairs");
        launch!(self.fill_normal, (FILL_BLOCKS as usize, 1), THREADS, [out, count as i64, seed, deviation])
    }
}

/// What [`Kernels::causal_softmax`] multiplies weights by, so that small ones are normal f16 numbers.
pub const WEIGHT_SCALE: f32 = 32768.0;

impl Drop for Kernels {
    fn drop(&mut self) {
        // SAFETY: loaded in `new`; unloading waits for what runs. Nothing can be done about an error.
        let _ = unsafe { result::module::unload(self.module) };
    }
}
