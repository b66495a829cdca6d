//! The measurement: for each input length and batch, dense and every policy.

use super::*;
use crate::llama::sample::Rng;
use common::bar;
use runner::Runner;
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
    pub(crate) batch: usize,
    /// The largest that fits.
    pub(crate) largest: bool,
    pub(crate) input: usize,
    /// Or why there is none: it does not fit.
    pub(crate) figures: std::result::Result<Figures, String>,
}

/// Medians of the repeats.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Figures {
    /// From the prompt's tokens to the first token on the host.
    pub(crate) ttft: Duration,
    /// One token of every sequence.
    pub(crate) step: Duration,
    pub(crate) submit: Option<Duration>,
    /// After the last token.
    pub(crate) kv: crate::llama::store::KvBytes,
    pub(crate) device_bytes: Option<usize>,
}

pub(crate) fn measure<R: Runner>(plan: &Plan, runner: &mut R) -> Result<Report> {
    check(plan, runner.config())?;
    let mut rows = Vec::new();
    let each = plan.batches.len() + usize::from(plan.largest);
    let progress = bar("measuring", (plan.inputs.len() * plan.policies.len() * each) as u64);
    for &input in &plan.inputs {
        let mut rng = Rng::new(plan.seed);
        let vocab = runner.config().vocab as u64;
        let prompt: Vec<u32> = (0..input).map(|_| (rng.next_u64() % vocab) as u32).collect();
        // The first prompt of its length loads kernels and takes memory for the next ones.
        let mut store = runner.store(1, input, None)?;
        runner.prefill(&prompt, &mut store)?;
        drop(store);
        for &batch in &plan.batches {
            for policy in &plan.policies {
                let store = runner.store(batch, input + plan.output, policy.as_ref());
                let figures = match store {
                    Ok(store) => Ok(figures(plan, runner, &prompt, store)?),
                    Err(e @ Error::DeviceMemory { .. }) => Err(e.to_string()),
                    Err(e) => return Err(e),
                };
                rows.push(Row { policy: *policy, batch, largest: false, input, figures });
                progress.inc(1);
            }
        }
        for policy in plan.policies.iter().filter(|_| plan.largest) {
            let (batch, store) = largest(runner, input, input + plan.output, policy.as_ref())?;
            let figures = Ok(figures(plan, runner, &prompt, store)?);
            rows.push(Row { policy: *policy, batch, largest: true, input, figures });
            progress.inc(1);
        }
    }
    progress.finish_and_clear();
    let (model, device) = (runner.model(), runner.device());
    Ok(Report { model, device, output: plan.output, repeats: plan.repeats, rows })
}

fn check(plan: &Plan, config: &Config) -> Result<()> {
    if let Some(input) =
        plan.inputs.iter().find(|n| **n == 0 || **n > config.context - plan.output.min(config.context))
    {
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

/// The largest batch that fits, found by trying from an estimate downwards.
fn largest<R: Runner>(
    runner: &mut R,
    input: usize,
    capacity: usize,
    policy: Option<&Policy>,
) -> Result<(usize, R::Store)> {
    let mut batch = runner.estimate_batch(input, capacity, policy)?.max(1);
    loop {
        match runner.store(batch, capacity, policy) {
            Ok(store) => return Ok((batch, store)),
            Err(Error::DeviceMemory { .. }) if batch > 1 => batch -= 1,
            Err(e) => return Err(e),
        }
    }
}

fn figures<R: Runner>(plan: &Plan, runner: &mut R, prompt: &[u32], mut store: R::Store) -> Result<Figures> {
    let (mut ttft, mut step, mut submit) = (Vec::new(), Vec::new(), Vec::new());
    let steps = plan.output - 1;
    for _ in 0..plan.repeats {
        runner.clear(&mut store)?;
        let start = Instant::now();
        let first = runner.prefill(prompt, &mut store)?;
        ttft.push(start.elapsed());
        let decoded = runner.decode(first, steps, &mut store)?;
        step.push(decoded.total / steps as u32);
        submit.extend(decoded.submit);
    }
    Ok(Figures {
        ttft: median(ttft).unwrap_or_default(),
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
