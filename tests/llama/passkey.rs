//! Finding a fact in a long text: whether pruning loses what a later question asks for.

use super::error::{Error, Result};
use super::model::{Meter, Model};
use super::sample::{Rng, argmax};
use super::store::{KvStore, Policy};
use super::tokenizer::Tokenizer;

const KEYS: [&str; 12] = [
    "Paris", "Tokyo", "Cairo", "Lima", "Oslo", "Rome", "Dublin", "Vienna", "Madrid", "Athens", "Berlin",
    "Delhi",
];

/// A text that holds one fact, a question about it, and the answer.
#[derive(Debug, Clone)]
pub struct Trial {
    pub prompt: Vec<u32>,
    pub question: Vec<u32>,
    pub answer: Vec<u32>,
}

impl Trial {
    /// A prompt of `length` tokens: filler from a random place on (around its end, if need be) with the number of some
    /// key `depth` (0 to 1) of the way through.
    pub fn new(
        tokenizer: &Tokenizer,
        filler: &[u32],
        length: usize,
        depth: f64,
        rng: &mut Rng,
    ) -> Result<Self> {
        let key = KEYS[(rng.next_u64() % KEYS.len() as u64) as usize];
        let number = 10_000 + rng.next_u64() % 90_000;
        let fact = tokenizer.encode(&format!("\n\nThe secret number of {key} is {number}.\n\n"))?;
        let Some(rest) = length.checked_sub(fact.len()).filter(|_| !filler.is_empty()) else {
            return Err(Error::Invalid(format!(
                "length is {length} with {} tokens of filler; allowed: at least {}, and some filler",
                filler.len(),
                fact.len()
            )));
        };
        let first = (rng.next_u64() % filler.len() as u64) as usize;
        let text: Vec<u32> = filler.iter().cycle().skip(first).take(rest).copied().collect();
        let (before, after) = text.split_at((depth * rest as f64) as usize);
        Ok(Self {
            prompt: [before, &fact, after].concat(),
            question: tokenizer.encode(&format!(
                "\n\nQuestion: What is the secret number of {key}?\nAnswer: The secret number of {key} is"
            ))?,
            answer: tokenizer.encode(&format!(" {number}"))?,
        })
    }

    /// Whether greedy decoding answers exactly, for the dense cache and for each policy. The prompt is pruned before the
    /// question is read.
    pub fn run(&self, model: &Model, policies: &[Policy]) -> Result<(bool, Vec<bool>)> {
        let tokens = self.prompt.len() + self.question.len() + self.answer.len();
        let mut meter = Meter::default();
        let mut dense = KvStore::dense(&model.config);
        model.prefill(&self.prompt, &mut dense, &mut meter)?;
        let mut pruned = policies
            .iter()
            .map(|policy| KvStore::pruned(&model.config, policy, tokens, model.context()))
            .collect::<Result<Vec<_>>>()?;
        for store in &mut pruned {
            store.fill_from(&dense)?;
        }
        let mut stores: Vec<&mut KvStore> = std::iter::once(&mut dense).chain(&mut pruned).collect();
        let mut right = vec![true; stores.len()];
        let fed = [&self.question[..], &self.answer[..self.answer.len() - 1]].concat();
        for (i, &token) in fed.iter().enumerate() {
            let logits = model.decode(&vec![token; stores.len()], &mut stores, &mut meter)?;
            // From the last token of the question on, what comes next is the answer. Feeding it whatever was
            // predicted changes nothing for those who were right so far.
            if let Some(i) = (i + 1).checked_sub(self.question.len()) {
                for (right, logits) in right.iter_mut().zip(logits.chunks_exact(model.config.vocab)) {
                    *right &= argmax(logits) == self.answer[i];
                }
            }
        }
        Ok((right[0], right[1..].to_vec()))
    }
}
