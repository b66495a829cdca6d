//! A prompt: all its tokens in one pass, layer by layer, with unpruned attention.

use super::gpu::{Buffer, Gpu};
use super::model::{Activations, GpuModel};
use super::store::GpuStore;
use crate::llama::config::Config;
use crate::llama::error::{Error, Result};
use crate::llama::sample::Rng;
use std::rc::Rc;

/// Rows that projections take at a time, so that the wide activations of a long prompt stay small.
const CHUNK: usize = 4096;
/// Queries that attention takes at a time.
pub(super) const QUERY_BLOCK: usize = 512;

/// Memory for prompts of up to so many tokens.
#[derive(Debug)]
pub struct PromptMemory {
    tokens: usize,
    ids: Buffer,
    x: Buffer,
    normed: Buffer,
    pub(super) qkv: Buffer,
    pub(super) attended: Buffer,
    gate_up: Buffer,
    /// f32 `[query heads of a KV head, QUERY_BLOCK, tokens]`, and the weights made of them.
    pub(super) scores: Buffer,
    pub(super) weights: Buffer,
    /// Log-sum-exps, f32 `[tokens, q heads]`.
    pub(super) lse: Buffer,
}

impl PromptMemory {
    fn new(gpu: &Rc<Gpu>, c: &Config, tokens: usize) -> Result<Self> {
        let chunk = tokens.min(CHUNK);
        let scores = c.group() * tokens.min(QUERY_BLOCK) * pitch(tokens);
        Ok(Self {
            tokens,
            ids: Buffer::elements::<i32>(gpu, tokens)?,
            x: Buffer::elements::<f32>(gpu, tokens * c.hidden)?,
            normed: Buffer::elements::<u16>(gpu, chunk * c.hidden)?,
            qkv: Buffer::elements::<u16>(gpu, tokens * (c.q_width() + 2 * c.kv_width()))?,
            attended: Buffer::elements::<u16>(gpu, tokens * c.q_width())?,
            gate_up: Buffer::elements::<u16>(gpu, chunk * 2 * c.ffn)?,
            scores: Buffer::elements::<f32>(gpu, scores)?,
            weights: Buffer::elements::<u16>(gpu, scores)?,
            lse: Buffer::elements::<f32>(gpu, tokens * c.heads)?,
        })
    }
}

/// Elements from one row of scores to the next: whole 32-byte sectors.
pub(super) fn pitch(seen: usize) -> usize {
    seen.next_multiple_of(16)
}

impl GpuModel {
    /// Makes room for prompts of up to so many tokens, which [`GpuModel::prefill`] would do at the first.
    pub fn reserve_prompt(&mut self, tokens: usize) -> Result<()> {
        if self.prompt.as_ref().is_none_or(|memory| memory.tokens < tokens) {
            self.prompt = None;
            self.prompt = Some(PromptMemory::new(&self.gpu, &self.config, tokens)?);
        }
        Ok(())
    }

    /// Runs a prompt from position 0, stores its keys and values in every sequence of the store, which must be empty, and
    /// returns the logits after its last token. Waits for the device.
    pub fn prefill(&mut self, tokens: &[u32], store: &mut GpuStore) -> Result<Vec<f32>> {
        let n = tokens.len();
        self.config.check_input(tokens, n)?;
        if store.len() > 0 {
            return Err(Error::Invalid(format!("prefill into a store that holds {} tokens", store.len())));
        }
        store.check_room(n)?;
        self.reserve_prompt(n)?;
        let Some(memory) = &self.prompt else { return Err(Error::Invalid("no memory for a prompt".into())) };
        let ids: Vec<i32> = tokens.iter().map(|&t| t as i32).collect();
        memory.ids.write(&ids)?;
        self.embed(memory.ids.address(), memory.x.address(), n)?;

        let (hidden, q_width) = (self.config.hidden, self.config.q_width());
        for layer in 0..=self.config.layers {
            for first in (0..n).step_by(CHUNK) {
                let chunk = Activations {
                    x: memory.x.at::<f32>(first * hidden),
                    normed: memory.normed.address(),
                    qkv: memory.qkv.at::<u16>(first * self.qkv_width()),
                    attended: memory.attended.at::<u16>(first * q_width),
                    gate_up: memory.gate_up.address(),
                };
                self.between(layer, chunk, CHUNK.min(n - first))?;
            }
            if layer < self.config.layers {
                self.turn(memory.qkv.address(), n, 0, store.prompt_target(layer))?;
                self.causal_attention(memory, n)?;
                store.append_prompt(self, layer, memory, n)?;
            }
        }
        let last = memory.x.at::<f32>((n - 1) * hidden);
        let logits = store.begin(n)?;
        self.logits(last, memory.normed.address(), logits.address(), 1)?;
        logits.read(self.config.vocab)
    }

    /// Stores random keys and values of so many tokens in every sequence of an empty store: for measuring what comes after
    /// a prompt without computing it.
    pub fn fill(&mut self, tokens: usize, seed: u64, store: &mut GpuStore) -> Result<()> {
        store.check_room(tokens)?;
        self.reserve_prompt(tokens)?;
        let Some(memory) = &self.prompt else { return Err(Error::Invalid("no memory for a prompt".into())) };
        memory.lse.write(&vec![0f32; tokens * self.config.heads])?;
        let mut rng = Rng::new(seed);
        for layer in 0..self.config.layers {
            let count = tokens * self.qkv_width();
            self.kernels.fill_normal(memory.qkv.address(), count, rng.next_u64(), 1.0)?;
            self.turn(memory.qkv.address(), tokens, 0, store.prompt_target(layer))?;
            store.append_prompt(self, layer, memory, tokens)?;
        }
        store.begin(tokens)?;
        Ok(())
    }
}
