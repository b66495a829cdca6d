//! What pruning costs: perplexity, agreement with dense and KL divergence under decode semantics.

use super::error::{Error, Result};
use super::model::{Meter, Model};
use super::sample::{argmax, log_softmax};
use super::store::{KvBytes, KvStore, Policy};

/// One store's figures over the scored tokens.
#[derive(Debug, Clone, Copy)]
pub struct Score {
    /// e to the mean negative log-likelihood, in nats, of the scored tokens.
    pub perplexity: f64,
    /// Share of scored positions where the likeliest token is the dense one's.
    pub top1_agreement: f64,
    /// Mean over the scored positions of KL(dense || this), in nats.
    pub kl: f64,
    /// Bytes after the last token.
    pub bytes: KvBytes,
}

/// Prefills `prefill` tokens of `text` and then scores the next `score` tokens, feeding the text's own tokens one
/// by one as decoding would. Returns the figures of dense and of each policy.
///
/// The stores run in lock-step, which reads the weights once per step. The first scored token is predicted by the
/// prompt's own last position, hence alike for all stores.
pub fn perplexity(
    model: &Model,
    text: &[u32],
    prefill: usize,
    score: usize,
    policies: &[Policy],
    progress: &mut dyn FnMut(usize),
) -> Result<(Score, Vec<Score>)> {
    if prefill == 0 || score == 0 {
        return Err(Error::Invalid(format!(
            "prefill is {prefill} and score {score}; allowed: at least 1 each"
        )));
    }
    let needed =
        prefill.checked_add(score).ok_or_else(|| Error::Invalid("prefill + score overflows".into()))?;
    if text.len() < needed {
        return Err(Error::Invalid(format!(
            "the text has {} tokens; prefill {prefill} and score {score} need {needed}",
            text.len()
        )));
    }
    // The last scored token is not fed.
    if needed - 1 > model.config.context {
        return Err(Error::Invalid(format!(
            "prefill {prefill} and score {score} exceed the model's context of {} tokens",
            model.config.context
        )));
    }
    let vocab = model.config.vocab;
    let mut dense = KvStore::dense(&model.config);
    let mut pruned = policies
        .iter()
        .map(|policy| KvStore::pruned(&model.config, policy, needed, model.context()))
        .collect::<Result<Vec<_>>>()?;
    let mut meter = Meter::default();
    let first = model.prefill(&text[..prefill], &mut dense, &mut meter)?;
    for store in &mut pruned {
        store.fill_from(&dense)?;
    }
    let mut stores: Vec<&mut KvStore> = std::iter::once(&mut dense).chain(&mut pruned).collect();
    let count = stores.len();
    let mut sums = vec![(0.0, 0usize, 0.0); count];
    let mut logits = first.repeat(count);
    for (step, &target) in text[prefill..needed].iter().enumerate() {
        if step > 0 {
            logits = model.decode(&vec![text[prefill + step - 1]; count], &mut stores, &mut meter)?;
        }
        let reference = log_softmax(&logits[..vocab]);
        let reference_top = argmax(&logits[..vocab]);
        for (logits, (nll, same, kl)) in logits.chunks_exact(vocab).zip(&mut sums) {
            let own = log_softmax(logits);
            *nll -= own[target as usize];
            *same += usize::from(argmax(logits) == reference_top);
            *kl += reference.iter().zip(&own).map(|(p, q)| p.exp() * (p - q)).sum::<f64>();
        }
        progress(step + 1);
    }
    let n = score as f64;
    let mut scores = Vec::with_capacity(count);
    for (store, (nll, same, kl)) in stores.iter().zip(sums) {
        scores.push(Score {
            perplexity: (nll / n).exp(),
            top1_agreement: same as f64 / n,
            kl: kl / n,
            bytes: store.bytes()?,
        });
    }
    let dense = scores.remove(0);
    Ok((dense, scores))
}
