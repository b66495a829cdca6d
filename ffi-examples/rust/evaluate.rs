//! What pruning costs. One policy on one text, all strategies on several texts, and whether facts are found again:
//!
//! ```text
//! cargo run --release --example evaluate -- perplexity --text FILE --k-sparsity 0.5 --v-sparsity 0.5
//! cargo run --release --example evaluate -- strategies --text FILE --text FILE --svg strategies.svg
//! cargo run --release --example evaluate -- passkey --text FILE --recipe Kt_Mag+Vt_Mag --sparsity 0.7 --svg passkey.svg
//! ```
#![allow(clippy::print_stdout, clippy::print_stderr)]

#[path = "../../tests/llama/mod.rs"]
mod llama;

mod common;
#[path = "evaluate/passkey.rs"]
mod passkey;
#[path = "evaluate/plot.rs"]
mod plot;
#[path = "evaluate/recipe.rs"]
mod recipe;
#[path = "evaluate/strategies.rs"]
mod strategies;

use clap::{Args, Parser, Subcommand};
use common::{ModelOptions, PolicyOptions, bar, exit_code, sparsity};
use llama::error::{Error, Result};
use llama::evaluate::perplexity;
use std::path::PathBuf;
use std::process::ExitCode;

/// Accuracy of decoding over a pruned KV cache.
#[derive(Debug, Parser)]
struct Cli {
    #[command(subcommand)]
    what: What,
}

#[derive(Debug, Subcommand)]
enum What {
    /// Perplexity, top-1 agreement and KL divergence against the dense cache
    Perplexity(Perplexity),
    /// The same for each strategy at several sparsities, over several texts
    Strategies(strategies::Strategies),
    /// Whether a number is found in a long text, by length and depth
    Passkey(passkey::Passkey),
}

#[derive(Debug, Args)]
struct Perplexity {
    /// UTF-8 text
    #[arg(long, value_name = "FILE")]
    text: PathBuf,
    /// Tokens of the text that are the prompt
    #[arg(long, value_name = "N", default_value_t = 2048)]
    prefill: usize,
    /// Tokens after the prompt that are scored, each fed as if it had been generated
    #[arg(long, value_name = "M", default_value_t = 256)]
    score: usize,
    /// Share of each key row that is dropped, 0 to below 1
    #[arg(long, value_name = "X", value_parser = sparsity)]
    k_sparsity: f64,
    /// Share of each value row that is dropped, 0 to below 1
    #[arg(long, value_name = "Y", value_parser = sparsity)]
    v_sparsity: f64,
    #[command(flatten)]
    policy: PolicyOptions,
    #[command(flatten)]
    model: ModelOptions,
    /// Print one JSON object as the last line
    #[arg(long)]
    json: bool,
}

fn main() -> ExitCode {
    exit_code(match Cli::parse().what {
        What::Perplexity(args) => run(&args),
        What::Strategies(args) => strategies::run(&args),
        What::Passkey(args) => passkey::run(&args),
    })
}

fn run(args: &Perplexity) -> Result<()> {
    let text = std::fs::read_to_string(&args.text)
        .map_err(|e| Error::io(format!("text file {}", args.text.display()), e))?;
    let (model, tokenizer) = args.model.load()?;
    let tokens = tokenizer.encode(&text)?;
    let policy = args.policy.policy(args.k_sparsity, args.v_sparsity);
    let progress = bar("scoring", args.score as u64);
    let (dense, pruned) = perplexity(&model, &tokens, args.prefill, args.score, &[policy], &mut |n| {
        progress.set_position(n as u64)
    })?;
    progress.finish_and_clear();
    let pruned = pruned[0];

    println!(
        "{} tokens after a prompt of {}, K sparsity {}, V sparsity {}, {} values",
        args.score, args.prefill, args.k_sparsity, args.v_sparsity, policy.values
    );
    println!(
        "perplexity       {:.3}, dense {:.3} ({:+.2} %)",
        pruned.perplexity,
        dense.perplexity,
        (pruned.perplexity / dense.perplexity - 1.0) * 100.0
    );
    println!("top-1 agreement  {:.1} %", pruned.top1_agreement * 100.0);
    println!("KL(dense || it)  {:.4} nats per token", pruned.kl);
    println!(
        "KV cache         {} bytes, dense {} ({:.1} %)",
        pruned.bytes.held,
        pruned.bytes.dense,
        pruned.bytes.held as f64 / pruned.bytes.dense as f64 * 100.0
    );
    if args.json {
        println!(
            "{}",
            serde_json::json!({
                "values": policy.values.to_string(),
                "ppl": pruned.perplexity,
                "ppl_dense": dense.perplexity,
                "top1_agreement": pruned.top1_agreement,
                "kl": pruned.kl,
                "kv_bytes": pruned.bytes.held,
                "kv_bytes_dense": pruned.bytes.dense,
            })
        );
    }
    Ok(())
}
