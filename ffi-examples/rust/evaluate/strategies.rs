//! What strategies cost, over several texts.

use crate::common::{ModelOptions, PolicyOptions, bar};
use crate::llama::error::{Error, Result};
use crate::llama::evaluate::{Score, perplexity};
use crate::plot;
use crate::recipe::{Comparison, mean};
use clap::Args;
use std::path::PathBuf;

#[derive(Debug, Args)]
pub(crate) struct Strategies {
    /// UTF-8 texts; results are means over them with the standard error between them
    #[arg(long = "text", value_name = "FILE", required = true)]
    texts: Vec<PathBuf>,
    /// Tokens of each text that are the prompt
    #[arg(long, value_name = "N", default_value_t = 2048)]
    prefill: usize,
    /// Tokens after the prompt that are scored
    #[arg(long, value_name = "M", default_value_t = 128)]
    score: usize,
    #[command(flatten)]
    comparison: Comparison,
    #[command(flatten)]
    policy: PolicyOptions,
    #[command(flatten)]
    model: ModelOptions,
    /// Write a plot of KL over sparsity
    #[arg(long, value_name = "FILE")]
    svg: Option<PathBuf>,
}

/// Prints a Markdown table, one row per recipe and sparsity: means over the texts with standard errors. "KL / first" is the
/// geometric mean of the ratio to the first recipe of the table that prunes the same sides, at the same sparsity.
pub(crate) fn run(args: &Strategies) -> Result<()> {
    let (model, tokenizer) = args.model.load()?;
    let cases = args.comparison.cases();
    let base = args.policy.policy(0.0, 0.0);
    let policies: Vec<_> = cases.iter().map(|(recipe, sparsity)| recipe.policy(&base, *sparsity)).collect();
    let mut by_text: Vec<(Score, Vec<Score>)> = Vec::new();
    for path in &args.texts {
        let text = std::fs::read_to_string(path)
            .map_err(|e| Error::io(format!("text file {}", path.display()), e))?;
        let tokens = tokenizer.encode(&text)?;
        let progress = bar("scoring", args.score as u64);
        let scores = perplexity(&model, &tokens, args.prefill, args.score, &policies, &mut |n| {
            progress.set_position(n as u64);
        })?;
        progress.finish_and_clear();
        println!("{}: dense perplexity {:.3}", path.display(), scores.0.perplexity);
        by_text.push(scores);
    }
    println!(
        "\n| recipe | sparsity | PPL / dense | top-1 | KL | KL / first | bytes |\n|---|---|---|---|---|---|---|"
    );
    let mut points = Vec::new();
    for (i, (recipe, sparsity)) in cases.iter().enumerate() {
        let of_texts = |f: &dyn Fn(&Score, &Score) -> f64| -> (f64, f64) {
            mean(&by_text.iter().map(|(dense, all)| f(dense, &all[i])).collect::<Vec<_>>())
        };
        // Within each text, against the first recipe that prunes the same sides: what texts have in common cancels.
        let first = cases.iter().position(|(r, s)| r.sides() == recipe.sides() && s == sparsity).unwrap_or(i);
        let ratios: Vec<f64> = by_text.iter().map(|(_, all)| (all[i].kl / all[first].kl).ln()).collect();
        let (log_ratio, log_error) = mean(&ratios);
        let ratio = of_texts(&|dense, own| own.perplexity / dense.perplexity);
        let top = of_texts(&|_, own| own.top1_agreement * 100.0);
        let kl = of_texts(&|_, own| own.kl);
        let bytes = of_texts(&|_, own| own.bytes.held as f64 / own.bytes.dense as f64 * 100.0);
        println!(
            "| {recipe} | {sparsity} | {:.3} ± {:.3} | {:.1} % | {:.4} ± {:.4} | {:.2} ± {:.2} | {:.1} % |",
            ratio.0,
            ratio.1,
            top.0,
            kl.0,
            kl.1,
            log_ratio.exp(),
            log_ratio.exp() * log_error,
            bytes.0
        );
        points.push(plot::Point { recipe: *recipe, sparsity: *sparsity, value: kl.0, error: kl.1 });
    }
    match &args.svg {
        Some(path) => plot::write(path, &plot::lines(&points)),
        None => Ok(()),
    }
}
