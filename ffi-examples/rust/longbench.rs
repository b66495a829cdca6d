//! LongBench with a pruned KV cache:
//! `cargo run --release --example longbench -- predict --data DIR --k-sparsity 0.7 --v-sparsity 0.7`, then
//! `cargo run --release --example longbench -- score PRED_DIR`. docs/longbench.md says more.
#![allow(clippy::print_stdout, clippy::print_stderr)]

#[path = "../../tests/llama/mod.rs"]
mod llama;

mod common;
#[path = "longbench/mod.rs"]
mod longbench;

use clap::{Args, Parser, Subcommand};
use common::{ModelOptions, PolicyOptions, bar, exit_code, sparsity};
use llama::error::{Error, Result};
use longbench::predict::{Event, Run, default_max_length};
use longbench::{score, tasks};
use std::path::PathBuf;
use std::process::ExitCode;

/// LongBench over a pruned KV cache: predictions that can be resumed, and their scores.
#[derive(Debug, Parser)]
struct Cli {
    #[command(subcommand)]
    what: What,
}

#[derive(Debug, Subcommand)]
enum What {
    /// Answer the items that have no answer yet
    Predict(Predict),
    /// Score a folder of predictions, print the result and write it to result.json there
    Score(Score),
}

#[derive(Debug, Args)]
struct Predict {
    /// Folder with the published files, TASK.jsonl, or TASK_e.jsonl with --e
    #[arg(long, value_name = "DIR")]
    data: PathBuf,
    /// Where the folder MODEL_LENGTH_K_x_V_y of predictions goes [default: pred, or pred_e with --e]
    #[arg(long, value_name = "DIR")]
    out: Option<PathBuf>,
    /// Tasks to run [default: all]
    #[arg(long, value_name = "NAME", value_delimiter = ',')]
    tasks: Vec<String>,
    /// LongBench-E: 13 tasks, scored by length
    #[arg(long)]
    e: bool,
    /// Tokens of a prompt at most; longer ones lose their middle [default: 1000 per 1024 of the context, less 500]
    #[arg(long, value_name = "N")]
    max_length: Option<usize>,
    /// Share of each key row that is dropped, 0 to below 1
    #[arg(long, value_name = "X", default_value = "0", value_parser = sparsity)]
    k_sparsity: f64,
    /// Share of each value row that is dropped, 0 to below 1
    #[arg(long, value_name = "Y", default_value = "0", value_parser = sparsity)]
    v_sparsity: f64,
    #[command(flatten)]
    policy: PolicyOptions,
    #[command(flatten)]
    model: ModelOptions,
}

#[derive(Debug, Args)]
struct Score {
    /// Folder with TASK.jsonl
    #[arg(value_name = "PRED_DIR")]
    folder: PathBuf,
    /// LongBench-E: one score per length bucket
    #[arg(long)]
    e: bool,
}

fn main() -> ExitCode {
    exit_code(match Cli::parse().what {
        What::Predict(args) => predict(&args),
        What::Score(args) => score(&args),
    })
}

fn predict(args: &Predict) -> Result<()> {
    let tasks = tasks::select(&args.tasks, args.e)?;
    let out = args.out.clone().unwrap_or_else(|| PathBuf::from(if args.e { "pred_e" } else { "pred" }));
    let (model, tokenizer) = args.model.load()?;
    let path = args.model.model.clone().unwrap_or_else(llama::fetch::path);
    let name = if path.is_dir() { path.file_name() } else { path.file_stem() };
    let run = Run {
        data: &args.data,
        out: &out,
        name: &name.unwrap_or_default().to_string_lossy(),
        tasks: &tasks,
        e: args.e,
        max_length: args.max_length.map_or_else(|| default_max_length(model.config.context), Ok)?,
        policy: args.policy.policy(args.k_sparsity, args.v_sparsity),
    };
    let progress = bar("predicting", 0);
    let damaged = run.run(&model, &tokenizer, &mut |event| match event {
        Event::Start { left, done } => {
            progress.set_length(left as u64);
            progress.reset();
            if done > 0 {
                progress.suspend(|| eprintln!("{done} items have answers from an earlier run"));
            }
        }
        Event::Next(task) => progress.set_message(task.name),
        Event::Done => progress.inc(1),
        Event::Damaged(message) => progress.suspend(|| eprintln!("left out: {message}")),
    })?;
    progress.finish_and_clear();
    println!("{}", run.folder().display());
    match damaged {
        0 => Ok(()),
        n => Err(Error::Invalid(format!(
            "{n} damaged lines of the data were left out; all other items have answers"
        ))),
    }
}

fn score(args: &Score) -> Result<()> {
    let result = score::score_folder(&args.folder, args.e)?;
    let (_, text) = score::write_result(&args.folder, &result)?;
    println!("{text}");
    Ok(())
}
