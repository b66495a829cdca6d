//! Whether a fact is found again, by length of the text and depth of the fact.

use crate::common::{ModelOptions, PolicyOptions, bar};
use crate::llama::error::{Error, Result};
use crate::llama::passkey::Trial;
use crate::llama::sample::Rng;
use crate::plot;
use crate::recipe::Comparison;
use clap::Args;
use std::path::PathBuf;

#[derive(Debug, Args)]
pub(crate) struct Passkey {
    /// UTF-8 text around the fact
    #[arg(long, value_name = "FILE")]
    text: PathBuf,
    /// Tokens of the prompt
    #[arg(long = "length", value_name = "LIST", value_delimiter = ',', default_values_t = [512, 1024, 2048])]
    lengths: Vec<usize>,
    /// Where the fact stands, from 0 (start) to 1 (end)
    #[arg(long = "depth", value_name = "LIST", value_delimiter = ',', value_parser = depth, default_values_t = [0.0, 0.25, 0.5, 0.75, 1.0])]
    depths: Vec<f64>,
    /// Prompts of each length and depth, with their own keys, numbers and places in the text
    #[arg(long, value_name = "N", default_value_t = 3)]
    trials: usize,
    #[arg(long, value_name = "SEED", default_value_t = 1)]
    seed: u64,
    #[command(flatten)]
    comparison: Comparison,
    #[command(flatten)]
    policy: PolicyOptions,
    #[command(flatten)]
    model: ModelOptions,
    /// Write heat maps, one of the dense cache and one of each recipe and sparsity
    #[arg(long, value_name = "FILE")]
    svg: Option<PathBuf>,
    /// Print one JSON object as the last line
    #[arg(long)]
    json: bool,
}

fn depth(text: &str) -> std::result::Result<f64, String> {
    let value: f64 = text.parse().map_err(|_| format!("{text:?} is not a number"))?;
    (0.0..=1.0).contains(&value).then_some(value).ok_or_else(|| format!("{value}; allowed: 0 to 1"))
}

/// Prints a Markdown table, one row per recipe and sparsity.
pub(crate) fn run(args: &Passkey) -> Result<()> {
    let text = std::fs::read_to_string(&args.text)
        .map_err(|e| Error::io(format!("text file {}", args.text.display()), e))?;
    let (model, tokenizer) = args.model.load()?;
    let filler = tokenizer.encode(&text)?;
    let cases = args.comparison.cases();
    let base = args.policy.policy(0.0, 0.0);
    let policies: Vec<_> = cases.iter().map(|(recipe, sparsity)| recipe.policy(&base, *sparsity)).collect();
    let cells = args.lengths.len() * args.depths.len();
    // [dense and every case][depth][length]: right answers.
    let mut found = vec![vec![vec![0usize; args.lengths.len()]; args.depths.len()]; 1 + cases.len()];
    let progress = bar("asking", (cells * args.trials) as u64);
    let mut rng = Rng::new(args.seed);
    for (column, &length) in args.lengths.iter().enumerate() {
        for (row, &depth) in args.depths.iter().enumerate() {
            for _ in 0..args.trials {
                let trial = Trial::new(&tokenizer, &filler, length, depth, &mut rng)?;
                let (dense, pruned) = trial.run(&model, &policies)?;
                for (found, right) in found.iter_mut().zip(std::iter::once(dense).chain(pruned)) {
                    found[row][column] += usize::from(right);
                }
                progress.inc(1);
            }
        }
    }
    progress.finish_and_clear();

    let names: Vec<String> = std::iter::once("dense".to_string())
        .chain(cases.iter().map(|(recipe, sparsity)| format!("{recipe} {sparsity}")))
        .collect();
    let by_length = |maps: &[Vec<usize>], column: usize| maps.iter().map(|row| row[column]).sum::<usize>();
    let lengths: Vec<String> = args.lengths.iter().map(ToString::to_string).collect();
    println!(
        "| right answers of {} each | {} | all of {} |",
        args.depths.len() * args.trials,
        lengths.join(" | "),
        cells * args.trials
    );
    println!("|---|{}---|", "---|".repeat(lengths.len()));
    for (name, map) in names.iter().zip(&found) {
        let columns: Vec<usize> = (0..lengths.len()).map(|column| by_length(map, column)).collect();
        let cells: Vec<String> = columns.iter().map(ToString::to_string).collect();
        println!("| {name} | {} | {} |", cells.join(" | "), columns.iter().sum::<usize>());
    }
    if let Some(path) = &args.svg {
        plot::write(path, &plot::heat_maps(&names, &found, &args.depths, &args.lengths, args.trials))?;
    }
    if args.json {
        let json = serde_json::json!({
            "lengths": args.lengths,
            "depths": args.depths,
            "trials": args.trials,
            "found": names.iter().cloned().zip(found).collect::<std::collections::BTreeMap<_, _>>(),
        });
        println!("{json}");
    }
    Ok(())
}
