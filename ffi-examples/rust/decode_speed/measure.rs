//! The measurement: for each input length first what a prompt takes, dense and with every policy, then decoding with each
//! batch.

use super::report::Report;
use super::runner::Runner;
use crate::common::bar;
use crate::llama::config::Config;
use crate::llama::error::{Error, Result};
use crate::llama::sample::Rng;
use crate::llama::store::{KvBytes, Policy};
use std::time::{Duration, Instant};

#[derive(Debug)]
pub(crate) struct Plan {
    /// `None`: dense.
    pub(crate) policies: Vec<Option<Policy>>,
    pub(crate) batches: Vec<usize>,
    pub(crate) largest: bool,
    pub(crate) inputs: Vec<usize>,
    pub(crate) output: usize,
    pub(crate) repeats: usize,
    pub(crate) seed: u64,
}

/// One row of the report.
#[derive(Debug)]
pub(crate) struct Row {
    pub(crate) policy: Option<Policy>,
    pub(crate) input: usize,
    pub(crate) batch: usize,
    /// The largest that fits.
    pub(crate) largest: bool,
    /// From the prompt's tokens to the first token on the host, for one sequence.
    pub(crate) ttft: Duration,
    /// Or why there are none: it does not fit.
    pub(crate) figures: std::result::Result<Figures, String>,
}

/// Medians of the repeats.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Figures {
    /// One token of every sequence.
    pub(crate) step: Duration,
    /// The host's part of it, where it does not wait for the device.
    pub(crate) submit: Option<Duration>,
    /// After the last token.
    pub(crate) kv: KvBytes,
    pub(crate) device_bytes: Option<usize>,
}

pub(crate) fn measure<R: Runner>(plan: &Plan, runner: &mut R) -> Result<Report> {
    check(plan, runner.config())?;
    let mut rows = Vec::new();
    // `None`: the largest that fits.
    let batches: Vec<Option<usize>> =
        plan.batches.iter().map(|&n| Some(n)).chain(plan.largest.then_some(None)).collect();
    let progress = bar("measuring", (plan.inputs.len() * (1 + plan.policies.len() * batches.len())) as u64);
    for &input in &plan.inputs {
        let prompt = prompt(plan, runner.config(), input);
        let ttft = first_tokens(plan, runner, &prompt)?;
        progress.inc(1);
        for &wanted in &batches {
            for (policy, &ttft) in plan.policies.iter().zip(&ttft) {
                let (batch, store) = match wanted {
                    Some(batch) => (batch, runner.store(batch, input + plan.output, policy.as_ref())),
                    None => {
                        let (batch, store) = runner.largest(input + plan.output, policy.as_ref())?;
                        (batch, Ok(store))
                    }
                };
                let figures = match store {
                    Ok(store) => Ok(figures(plan, runner, &prompt, store)?),
                    Err(e @ Error::DeviceMemory { .. }) => Err(e.to_string()),
                    Err(e) => return Err(e),
                };
                let largest = wanted.is_none();
                rows.push(Row { policy: *policy, input, batch, largest, ttft, figures });
                progress.inc(1);
            }
        }
    }
    progress.finish_and_clear();
    let (model, device) = (runner.model(), runner.device());
    Ok(Report { model, device, output: plan.output, repeats: plan.repeats, rows })
}

fn check(plan: &Plan, config: &Config) -> Result<()> {
    let fits = |input: usize| input > 0 && input.saturating_add(plan.output) <= config.context;
    if let Some(input) = plan.inputs.iter().find(|input| !fits(**input)) {
        return Err(Error::Invalid(format!(
            "--input is {input} with --output {}; allowed: at least 1, together up to the model's context of {}",
            plan.output, config.context
        )));
    }
    match plan.batches.contains(&0) {
        true => Err(Error::Invalid("--batch is 0; allowed: at least 1".to_string())),
        false => Ok(()),
    }
}

fn prompt(plan: &Plan, config: &Config, tokens: usize) -> Vec<u32> {
    let mut rng = Rng::new(plan.seed);
    (0..tokens).map(|_| (rng.next_u64() % config.vocab as u64) as u32).collect()
}

/// Time to the first token of one sequence with each policy, which take turns.
fn first_tokens<R: Runner>(plan: &Plan, runner: &mut R, prompt: &[u32]) -> Result<Vec<Duration>> {
    let mut time = |policy: Option<&Policy>| -> Result<Duration> {
        let mut store = runner.store(1, prompt.len(), policy)?;
        let start = Instant::now();
        runner.prefill(prompt, &mut store)?;
        Ok(start.elapsed())
    };
    // The first prompt of its length takes memory and loads kernels.
    time(None)?;
    let mut times = vec![Vec::new(); plan.policies.len()];
    for _ in 0..plan.repeats {
        for (policy, times) in plan.policies.iter().zip(&mut times) {
            times.push(time(policy.as_ref())?);
        }
    }
    Ok(times.into_iter().map(|times| median(times).unwrap_or_default()).collect())
}

fn figures<R: Runner>(plan: &Plan, runner: &mut R, prompt: &[u32], mut store: R::Store) -> Result<Figures> {
    let (mut step, mut submit) = (Vec::new(), Vec::new());
    let steps = plan.output - 1;
    for _ in 0..plan.repeats {
        runner.clear(&mut store)?;
        let first = runner.fill(prompt, &mut store)?;
        let decoded = runner.decode(first, steps, &mut store)?;
        step.push(decoded.total / steps as u32);
        submit.extend(decoded.submit);
    }
    Ok(Figures {
        step: median(step).unwrap_or_default(),
        submit: median(submit),
        kv: runner.bytes(&store)?,
        device_bytes: runner.device_bytes()?,
    })
}

fn median(mut times: Vec<Duration>) -> Option<Duration> {
    times.sort_unstable();
    times.get(times.len() / 2).copied()
}
