//! A model on any device, for code that need not know which.

use super::config::Config;
use super::cuda::model::GpuModel;
use super::cuda::store::GpuStore;
use super::error::Result;
use super::model::{Meter, Model};
use super::store::{KvBytes, KvStore, Policy};
use std::time::{Duration, Instant};

pub trait Engine {
    /// Keys and values of one sequence.
    type Store;

    fn config(&self) -> &Config;

    /// What it runs on, for people.
    fn device(&self) -> String;

    /// Threads of the CPU.
    fn threads(&self) -> Option<usize>;

    /// An empty store for up to `capacity` tokens; dense without a policy.
    fn store(&self, policy: Option<&Policy>, capacity: usize) -> Result<Self::Store>;

    /// Runs a prompt from position 0 into an empty store; logits after its last token.
    fn prefill(&mut self, prompt: &[u32], store: &mut Self::Store, meter: &mut Meter) -> Result<Vec<f32>>;

    /// Leaves an empty store as prefilling would; `dense` has been prefilled with the same prompt. How long storing took,
    /// where nothing else was done.
    fn fill(
        &mut self,
        prompt: &[u32],
        dense: &Self::Store,
        store: &mut Self::Store,
    ) -> Result<Option<Duration>>;

    /// One step of each store with the same token; logits `[stores, vocab]`.
    fn decode(&self, token: u32, stores: &mut [&mut Self::Store], meter: &mut Meter) -> Result<Vec<f32>>;

    fn bytes(&self, store: &Self::Store) -> Result<KvBytes>;

    /// Tokens of a store that are compressed.
    fn compressed(&self, store: &Self::Store) -> Result<usize>;
}

impl Engine for Model {
    type Store = KvStore;

    fn config(&self) -> &Config {
        &self.config
    }

    fn device(&self) -> String {
        self.context().to_string()
    }

    fn threads(&self) -> Option<usize> {
        Some(Self::threads(self))
    }

    fn store(&self, policy: Option<&Policy>, capacity: usize) -> Result<KvStore> {
        match policy {
            None => Ok(KvStore::dense(&self.config)),
            Some(policy) => KvStore::pruned(&self.config, policy, capacity, self.context()),
        }
    }

    fn prefill(&mut self, prompt: &[u32], store: &mut KvStore, meter: &mut Meter) -> Result<Vec<f32>> {
        Self::prefill(self, prompt, store, meter)
    }

    fn fill(&mut self, _: &[u32], dense: &KvStore, store: &mut KvStore) -> Result<Option<Duration>> {
        let start = Instant::now();
        store.fill_from(dense)?;
        Ok(Some(start.elapsed()))
    }

    fn decode(&self, token: u32, stores: &mut [&mut KvStore], meter: &mut Meter) -> Result<Vec<f32>> {
        Self::decode(self, &vec![token; stores.len()], stores, meter)
    }

    fn bytes(&self, store: &KvStore) -> Result<KvBytes> {
        store.bytes()
    }

    fn compressed(&self, store: &KvStore) -> Result<usize> {
        store.compressed()
    }
}

impl Engine for GpuModel {
    type Store = GpuStore;

    fn config(&self) -> &Config {
        &self.config
    }

    fn device(&self) -> String {
        self.gpu().name().to_string()
    }

    fn threads(&self) -> Option<usize> {
        None
    }

    fn store(&self, policy: Option<&Policy>, capacity: usize) -> Result<GpuStore> {
        Self::store(self, 1, capacity, policy)
    }

    fn prefill(&mut self, prompt: &[u32], store: &mut GpuStore, meter: &mut Meter) -> Result<Vec<f32>> {
        let start = Instant::now();
        let logits = Self::prefill(self, prompt, store);
        meter.total += start.elapsed();
        logits
    }

    /// Computes the prompt again, which costs little here.
    fn fill(&mut self, prompt: &[u32], _: &GpuStore, store: &mut GpuStore) -> Result<Option<Duration>> {
        Self::prefill(self, prompt, store)?;
        Ok(None)
    }

    fn decode(&self, token: u32, stores: &mut [&mut GpuStore], meter: &mut Meter) -> Result<Vec<f32>> {
        let mut logits = Vec::new();
        for store in stores {
            logits.extend(Self::decode(self, &[token], store, meter)?);
        }
        Ok(logits)
    }

    fn bytes(&self, store: &GpuStore) -> Result<KvBytes> {
        Ok(store.bytes())
    }

    fn compressed(&self, store: &GpuStore) -> Result<usize> {
        store.compressed()
    }
}
