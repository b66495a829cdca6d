//! How fast a whole model decodes over a dense and over pruned KV caches, and what memory it takes.
//!
//! ```text
//! cargo run --release --example decode_speed -- --shape llama-3-8b --batch 1,4,8 --input 4096 --sparsity 0.5,0.7
//! cargo run --release --example decode_speed -- --device cpu --shape tiny --input 300 --output 8
//! ```
//!
//! The time to the first token is that of one sequence, from a prompt of random tokens to a token on the host. Decoding is
//! measured with every sequence in memory of its own; on a GPU a prompt for each would take too long, so their caches are
//! filled with random keys and values. docs/performance.md has results and says more of what is measured.
#![allow(clippy::print_stdout, clippy::print_stderr)]

#[path = "../../tests/llama/mod.rs"]
mod llama;

mod common;
#[path = "decode_speed/measure.rs"]
mod measure;
#[path = "decode_speed/report.rs"]
mod report;
#[path = "decode_speed/runner.rs"]
mod runner;

use clap::Parser;
use clap::builder::PossibleValuesParser;
use common::{Device, PolicyOptions, device, exit_code, sparsity};
use llama::config::Config;
use llama::error::{Error, Result};
use llama::shapes::{SHAPES, named};
use measure::Plan;
use report::Report;
use runner::{CpuRunner, GpuRunner};
use std::path::PathBuf;
use std::process::ExitCode;

/// Measures time to the first token, decoding speed and memory of a model, dense and pruned
#[derive(Debug, Parser)]
struct Cli {
    /// Random weights of this shape; the context grows to what is asked for
    #[arg(long, value_name = "NAME", default_value = "llama-3-8b", value_parser = PossibleValuesParser::new(SHAPES.map(|(name, _)| name)))]
    shape: String,
    /// A model instead: GGUF file, or folder of a Hugging Face checkpoint
    #[arg(long, value_name = "FILE", conflicts_with = "shape")]
    model: Option<PathBuf>,
    /// Where to run: cpu, cuda or cuda:N
    #[arg(long, value_name = "DEVICE", default_value = "cuda", value_parser = device)]
    device: Device,
    /// Sequences that decode together; one run per value
    #[arg(long, value_name = "B", value_delimiter = ',', default_value = "1")]
    batch: Vec<usize>,
    /// Also the largest batch that fits device memory, for each way to store
    #[arg(long)]
    largest: bool,
    /// Tokens of the prompt; one run per value
    #[arg(long, value_name = "T", value_delimiter = ',', default_value = "4096")]
    input: Vec<usize>,
    /// Tokens to generate, at least 2
    #[arg(long, value_name = "N", default_value_t = 256, value_parser = clap::value_parser!(u32).range(2..))]
    output: u32,
    /// Share of each row that is dropped, of keys and values or as K/V; one run per value, besides dense
    #[arg(long, value_name = "S", value_delimiter = ',', default_value = "0.5,0.7", value_parser = sparsities)]
    sparsity: Vec<(f64, f64)>,
    /// Runs of each measurement; times are medians
    #[arg(long, value_name = "N", default_value_t = 3, value_parser = clap::value_parser!(u32).range(1..))]
    repeats: u32,
    /// Seed of weights and prompt
    #[arg(long, value_name = "N", default_value_t = 0)]
    seed: u64,
    #[command(flatten)]
    policy: PolicyOptions,
    /// Threads on the CPU [default: all cores]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u16).range(1..=1024))]
    threads: Option<u16>,
    /// Print one JSON object as the last line
    #[arg(long)]
    json: bool,
}

/// Parses `0.7` or `0.5/0.7`.
fn sparsities(text: &str) -> std::result::Result<(f64, f64), String> {
    let (k, v) = text.split_once('/').unwrap_or((text, text));
    Ok((sparsity(k)?, sparsity(v)?))
}

fn main() -> ExitCode {
    exit_code(run(&Cli::parse()))
}

fn run(args: &Cli) -> Result<()> {
    let report = match args.device {
        Device::Cuda(ordinal) => measure::measure(&plan(args), &mut GpuRunner::new(args, ordinal)?)?,
        Device::Cpu if args.largest => {
            return Err(Error::Invalid("--largest is for device memory: not with --device cpu".to_string()));
        }
        Device::Cpu => measure::measure(&plan(args), &mut CpuRunner::new(args)?)?,
    };
    print(args, &report);
    Ok(())
}

fn print(args: &Cli, report: &Report) {
    report.print();
    if args.json {
        println!("{}", report.json());
    }
}

fn plan(args: &Cli) -> Plan {
    let policies = args.sparsity.iter().map(|&(k, v)| Some(args.policy.policy(k, v)));
    Plan {
        policies: std::iter::once(None).chain(policies).collect(),
        batches: args.batch.clone(),
        largest: args.largest,
        inputs: args.input.clone(),
        output: args.output as usize,
        repeats: args.repeats as usize,
        seed: args.seed,
    }
}

impl Cli {
    /// The shape asked for, with room for the longest sequence.
    fn random_config(&self) -> Result<Config> {
        let mut config = named(&self.shape)?;
        let longest = self.input.iter().max().copied().unwrap_or(0).saturating_add(self.output as usize);
        config.context = config.context.max(longest);
        Ok(config)
    }

    /// Name for the report.
    fn name(&self) -> String {
        match &self.model {
            Some(path) => path.display().to_string(),
            None => format!("{}, random weights", self.shape),
        }
    }
}
