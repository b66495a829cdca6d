//! How fast attention over compressed pages is, next to dense attention by the same library.
//!
//! ```text
//! cargo run --release --example speed -- --backend cpu --batch 1 --q-heads 32 --kv-heads 8 --head-dim 128 \
//!     --tokens 32768 --keep-k 39 --keep-v 39 --threads 2
//! ```
//!
//! Compressed and dense runs take turns, so that both see the same machine; every time is a median. One decode
//! step is measured: one query token per sequence over `--tokens` tokens each. On CUDA times are those of events around
//! the work, with nothing in the L2 cache before; dense attention there is this library's, not the fastest there is.
#![allow(clippy::print_stdout, clippy::print_stderr)]

#[path = "speed/gpu.rs"]
mod gpu;
#[path = "speed/memory.rs"]
mod memory;
#[path = "speed/meter.rs"]
mod meter;
#[path = "speed/workload.rs"]
mod workload;

use clap::builder::{PossibleValuesParser, TypedValueParser};
use clap::{Parser, ValueEnum};
use indicatif::{ProgressBar, ProgressStyle};
use meter::Meter;
use mustafar::ops::{Advice, attend_advice};
use mustafar::{DType, Error, ValueType};
use std::process::ExitCode;
use workload::{Size, Workload};

/// Measures decode attention over a compressed KV cache against this library's attention over dense tokens
///
/// Compressed and dense runs take turns; every time is a median. With --backend cuda times come from CUDA events and the
/// L2 cache is emptied before every run. Dense attention there is this library's kernel over a dense window: it is not
/// the fastest dense attention there is, see docs/performance.md.
#[derive(Debug, Parser)]
#[command(name = "speed")]
struct Options {
    /// Where to run
    #[arg(long, value_enum, default_value_t = BackendName::Cpu)]
    backend: BackendName,
    /// Sequences
    #[arg(long, value_name = "B", default_value_t = 1)]
    batch: usize,
    /// Query heads, a multiple of --kv-heads
    #[arg(long, value_name = "H", default_value_t = 32)]
    q_heads: usize,
    /// KV heads
    #[arg(long, value_name = "K", default_value_t = 8)]
    kv_heads: usize,
    /// Channels per head: 64, 96, 128 or 256
    #[arg(long, value_name = "D", default_value_t = 128)]
    head_dim: usize,
    /// Tokens of each sequence
    #[arg(long, value_name = "T", default_value_t = 32768)]
    tokens: usize,
    /// Values kept per key row, 1 to D
    #[arg(long, value_name = "N", default_value_t = 39)]
    keep_k: usize,
    /// Values kept per value row, 1 to D
    #[arg(long, value_name = "N", default_value_t = 39)]
    keep_v: usize,
    /// Type of K, V and queries
    #[arg(long, default_value = "f16", value_parser = PossibleValuesParser::new(["f16", "bf16"]).map(dtype))]
    dtype: DType,
    /// Type of the values that are stored [default: --dtype]
    #[arg(long, value_parser = PossibleValuesParser::new(["f16", "bf16", "e4m3", "int8"]).map(value_type))]
    values: Option<ValueType>,
    /// Threads of the CPU backend; not for --backend cuda
    #[arg(long, value_name = "N", default_value_t = 1)]
    threads: usize,
    /// Print one JSON object instead of a table
    #[arg(long)]
    json: bool,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum BackendName {
    /// This host
    Cpu,
    /// CUDA device 0
    Cuda,
}

fn dtype(name: String) -> DType {
    if name == "bf16" { DType::Bf16 } else { DType::F16 }
}

fn value_type(name: String) -> ValueType {
    let named = ValueType::all().into_iter().find(|values| values.to_string() == name);
    named.expect("the parser lists names of value types")
}

impl Options {
    /// Type of the values that are stored.
    fn value_type(&self) -> ValueType {
        let of_dtype = if self.dtype == DType::Bf16 { ValueType::Bf16 } else { ValueType::F16 };
        self.values.unwrap_or(of_dtype)
    }

    fn size(&self) -> Size {
        let &Self { batch, q_heads, kv_heads, head_dim, tokens, keep_k, keep_v, dtype, .. } = self;
        Size { batch, q_heads, kv_heads, head_dim, tokens, keep_k, keep_v, dtype, values: self.value_type() }
    }
}

/// Measured repetitions, after [`WARM_UP`] that are not.
const ROUNDS: usize = 21;
const WARM_UP: usize = 3;

fn main() -> ExitCode {
    let options = Options::parse();
    match measure(&options) {
        Ok(results) if options.json => {
            println!("{}", results.json());
            ExitCode::SUCCESS
        }
        Ok(results) => {
            results.print(&options);
            ExitCode::SUCCESS
        }
        Err(error) => {
            eprintln!("speed: {error}");
            ExitCode::FAILURE
        }
    }
}

/// Medians in microseconds and gigabytes (10^9 bytes) per second.
struct Results {
    /// What the times were taken on.
    backend: String,
    advice: Advice,
    values: ValueType,
    attend_us: f64,
    dense_us: f64,
    append_us: f64,
    /// Bytes of K and V that compressed attention reads, and that dense attention reads.
    bytes: usize,
    dense_bytes: usize,
    copy_gbps: f64,
}

impl Results {
    fn speedup(&self) -> f64 {
        self.dense_us / self.attend_us
    }

    fn gbps(&self) -> f64 {
        self.bytes as f64 / self.attend_us / 1e3
    }

    fn json(&self) -> serde_json::Value {
        serde_json::json!({
            "values": self.values.to_string(),
            "expected": self.advice.speed.to_string(),
            "attend_us": self.attend_us,
            "dense_us": self.dense_us,
            "speedup": self.speedup(),
            "bytes": self.bytes,
            "gbps": self.gbps(),
            "copy_gbps": self.copy_gbps,
            "append_us": self.append_us,
        })
    }

    fn print(&self, options: &Options) {
        let Options { batch, q_heads, kv_heads, head_dim, tokens, keep_k, keep_v, dtype, .. } = options;
        println!(
            "batch {batch}, {q_heads} query / {kv_heads} KV heads of {head_dim}, {tokens} tokens, keep {keep_k} / {keep_v}, \
             {} of {dtype}, {}",
            self.values, self.backend
        );
        let dense_gbps = self.dense_bytes as f64 / self.dense_us / 1e3;
        println!("{:<12}{:>12}{:>12}{:>10}{:>10}", "", "us", "MB", "GB/s", "of copy");
        for (name, us, bytes, gbps) in [
            ("compressed", self.attend_us, self.bytes, self.gbps()),
            ("dense", self.dense_us, self.dense_bytes, dense_gbps),
        ] {
            let (mb, share) = (bytes as f64 / 1e6, 100.0 * gbps / self.copy_gbps);
            println!("{name:<12}{us:>12.1}{mb:>12.1}{gbps:>10.2}{share:>9.0}%");
        }
        println!("speedup {:.2}", self.speedup());
        println!("expected for long contexts: {}", self.advice);
        println!("append of one token to every sequence: {:.1} us", self.append_us);
        println!("memory copy in the same run: {:.2} GB/s (read + write)", self.copy_gbps);
    }
}

fn measure(options: &Options) -> Result<Results, Error> {
    check(options)?;
    let (context, meter) = Meter::open(options)?;
    let bar = ProgressBar::new(0).with_style(
        ProgressStyle::with_template("{msg:28} {bar:40} {pos}/{len} {elapsed}")
            .expect("the template names fields that exist"),
    );
    let size = options.size();
    let mut workload = Workload::new(&context, meter.stream(), &size, &bar)?;
    bar.set_message("memory copy");
    let copy_gbps = meter.copy_bandwidth()?;

    bar.set_message("attention");
    begin(&bar, (WARM_UP + ROUNDS) as u64);
    let (mut compressed, mut dense) = (Vec::new(), Vec::new());
    for _ in 0..WARM_UP + ROUNDS {
        compressed.push(meter.time(|| workload.attend_compressed())?);
        dense.push(meter.time(|| workload.attend_dense())?);
        bar.inc(1);
    }
    bar.set_message("append");
    begin(&bar, (WARM_UP + ROUNDS) as u64);
    let mut append = Vec::new();
    for _ in 0..WARM_UP + ROUNDS {
        append.push(meter.time(|| workload.append_last())?);
        bar.inc(1);
    }
    bar.finish_and_clear();
    Ok(Results {
        backend: context.to_string(),
        advice: attend_advice(context.backend(), &size.format(size.keep_k)?, &size.format(size.keep_v)?)?,
        values: options.value_type(),
        attend_us: median(compressed),
        dense_us: median(dense),
        append_us: median(append),
        bytes: workload.compressed_bytes(),
        dense_bytes: workload.dense_bytes(),
        copy_gbps,
    })
}

/// A bar from 0 again.
fn begin(bar: &ProgressBar, length: u64) {
    bar.set_length(length);
    bar.set_position(0);
}

/// Without the first few, which fill caches and page tables.
fn median(mut times: Vec<f64>) -> f64 {
    times.drain(..WARM_UP);
    times.sort_by(f64::total_cmp);
    times[times.len() / 2]
}

/// What the library would only find out after minutes of preparation, or not at all.
fn check(options: &Options) -> Result<(), Error> {
    let invalid = |argument, value: usize, allowed: String| {
        Err(Error::InvalidArgument { argument, value: value.to_string(), allowed })
    };
    if options.backend == BackendName::Cuda && options.threads != 1 {
        return invalid("--threads", options.threads, "1 with --backend cuda, which has no threads".into());
    }
    for (argument, value) in [
        ("--batch", options.batch),
        ("--q-heads", options.q_heads),
        ("--kv-heads", options.kv_heads),
        ("--tokens", options.tokens),
    ] {
        // Above this the products below could overflow; no host has the memory either.
        if value == 0 || value > 1 << 24 {
            return invalid(argument, value, "1 to 16777216".into());
        }
    }
    if !options.q_heads.is_multiple_of(options.kv_heads) {
        let allowed = format!("a multiple of --kv-heads ({})", options.kv_heads);
        return invalid("--q-heads", options.q_heads, allowed);
    }
    if options.value_type().dtype().is_some_and(|dtype| dtype != options.dtype) {
        let (argument, value) = ("--values", options.value_type().to_string());
        return Err(Error::InvalidArgument {
            argument,
            value,
            allowed: format!("{}, e4m3, int8", options.dtype),
        });
    }
    for (argument, keep) in [("--keep-k", options.keep_k), ("--keep-v", options.keep_v)] {
        if keep == 0 || keep > options.head_dim {
            return invalid(argument, keep, format!("1 to --head-dim ({})", options.head_dim));
        }
    }
    Ok(())
}
