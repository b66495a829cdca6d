//! What is measured, on the CPU and on a GPU, behind one interface.

use crate::Cli;
use crate::common::{load_on_gpu, threads};
use crate::llama::config::Config;
use crate::llama::cuda::model::GpuModel;
use crate::llama::cuda::store::GpuStore;
use crate::llama::error::{Error, Result};
use crate::llama::model::{Meter, Model};
use crate::llama::sample::argmax;
use crate::llama::store::{KvBytes, KvStore, Policy};
use std::time::{Duration, Instant};

/// Device memory that the largest batch leaves free: a cache sends the page numbers of long prompts by way of a few
/// megabytes, and the driver has needs of its own.
const SPARE_BYTES: usize = 64 << 20;

/// How long some steps took.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Steps {
    pub(crate) total: Duration,
    /// The host's part of the quickest step, where it does not wait for the device.
    pub(crate) submit: Option<Duration>,
}

pub(crate) trait Runner {
    type Store;

    fn model(&self) -> String;
    fn device(&self) -> String;
    fn config(&self) -> &Config;
    /// An empty store of `batch` sequences.
    fn store(&self, batch: usize, capacity: usize, policy: Option<&Policy>) -> Result<Self::Store>;
    fn clear(&self, store: &mut Self::Store) -> Result<()>;
    /// Runs a prompt in every sequence; the first token after it.
    fn prefill(&mut self, prompt: &[u32], store: &mut Self::Store) -> Result<u32>;
    /// Puts every sequence where it is after a prompt; a token to go on with.
    fn fill(&mut self, prompt: &[u32], store: &mut Self::Store) -> Result<u32>;
    /// Decodes `steps` tokens after `first` in every sequence, each time the likeliest.
    fn decode(&self, first: u32, steps: usize, store: &mut Self::Store) -> Result<Steps>;
    fn bytes(&self, store: &Self::Store) -> Result<KvBytes>;
    /// Bytes of device memory in use.
    fn device_bytes(&self) -> Result<Option<usize>>;
    /// The largest batch that fits device memory, and its empty store.
    fn largest(&self, capacity: usize, policy: Option<&Policy>) -> Result<(usize, Self::Store)>;
}

pub(crate) struct GpuRunner {
    name: String,
    model: GpuModel,
}

impl GpuRunner {
    pub(crate) fn new(args: &Cli, ordinal: usize) -> Result<Self> {
        let dtype = args.policy.dtype();
        let model = match &args.model {
            None => GpuModel::random(args.random_config()?, args.seed, ordinal, dtype)?,
            Some(path) => load_on_gpu(path, ordinal, dtype)?.0,
        };
        Ok(Self { name: args.name(), model })
    }
}

impl Runner for GpuRunner {
    type Store = GpuStore;

    fn model(&self) -> String {
        self.name.clone()
    }

    fn device(&self) -> String {
        self.model.gpu().name().to_string()
    }

    fn config(&self) -> &Config {
        &self.model.config
    }

    fn store(&self, batch: usize, capacity: usize, policy: Option<&Policy>) -> Result<GpuStore> {
        self.model.store(batch, capacity, policy)
    }

    fn clear(&self, store: &mut GpuStore) -> Result<()> {
        store.clear()
    }

    fn prefill(&mut self, prompt: &[u32], store: &mut GpuStore) -> Result<u32> {
        Ok(argmax(&self.model.prefill(prompt, store)?))
    }

    fn fill(&mut self, prompt: &[u32], store: &mut GpuStore) -> Result<u32> {
        self.model.fill(prompt.len(), 0, store)?;
        Ok(prompt[0])
    }

    fn decode(&self, first: u32, steps: usize, store: &mut GpuStore) -> Result<Steps> {
        self.model.feed(&vec![first; store.batch()], store)?;
        self.model.gpu().synchronize()?;
        let start = Instant::now();
        let mut submit = Duration::MAX;
        for _ in 0..steps {
            let mut meter = Meter::default();
            self.model.step(store, &mut meter)?;
            submit = submit.min(meter.total);
        }
        self.model.picked(store)?;
        let total = start.elapsed();
        if !self.model.gpu().context().take_device_errors()?.is_empty() {
            return Err(Error::Invalid("the cache has skipped tokens".to_string()));
        }
        Ok(Steps { total, submit: Some(submit) })
    }

    fn bytes(&self, store: &GpuStore) -> Result<KvBytes> {
        Ok(store.bytes())
    }

    fn device_bytes(&self) -> Result<Option<usize>> {
        let (free, total) = self.model.gpu().memory()?;
        Ok(Some(total - free))
    }

    fn largest(&self, capacity: usize, policy: Option<&Policy>) -> Result<(usize, GpuStore)> {
        let (free, _) = self.model.gpu().memory()?;
        let mut batch = (free / self.model.sequence_bytes(capacity, policy)?).max(1);
        loop {
            match self.model.store(batch, capacity, policy) {
                Err(Error::DeviceMemory { .. }) if batch > 1 => {}
                Err(e) => return Err(e),
                Ok(store) if batch == 1 || self.model.gpu().memory()?.0 >= SPARE_BYTES => {
                    return Ok((batch, store));
                }
                Ok(_) => {}
            }
            batch -= 1;
        }
    }
}

pub(crate) struct CpuRunner {
    name: String,
    model: Model,
}

impl CpuRunner {
    pub(crate) fn new(args: &Cli) -> Result<Self> {
        let threads = threads(args.threads)?;
        let model = match &args.model {
            None => Model::random(args.random_config()?, args.seed, threads)?,
            Some(path) => Model::open(path, threads, &mut |_, _| {})?.0,
        };
        Ok(Self { name: args.name(), model })
    }
}

impl Runner for CpuRunner {
    type Store = Vec<KvStore>;

    fn model(&self) -> String {
        self.name.clone()
    }

    fn device(&self) -> String {
        self.model.context().to_string()
    }

    fn config(&self) -> &Config {
        &self.model.config
    }

    fn store(&self, batch: usize, capacity: usize, policy: Option<&Policy>) -> Result<Vec<KvStore>> {
        let config = &self.model.config;
        let one = || match policy {
            None => Ok(KvStore::dense(config)),
            Some(policy) => KvStore::pruned(config, policy, capacity, self.model.context()),
        };
        (0..batch).map(|_| one()).collect()
    }

    fn clear(&self, store: &mut Vec<KvStore>) -> Result<()> {
        store.iter_mut().try_for_each(KvStore::clear)
    }

    fn prefill(&mut self, prompt: &[u32], store: &mut Vec<KvStore>) -> Result<u32> {
        let mut first = 0;
        for sequence in store {
            first = argmax(&self.model.prefill(prompt, sequence, &mut Meter::default())?);
        }
        Ok(first)
    }

    fn fill(&mut self, prompt: &[u32], store: &mut Vec<KvStore>) -> Result<u32> {
        self.prefill(prompt, store)
    }

    fn decode(&self, first: u32, steps: usize, store: &mut Vec<KvStore>) -> Result<Steps> {
        let mut meter = Meter::default();
        let mut tokens = vec![first; store.len()];
        let mut stores: Vec<&mut KvStore> = store.iter_mut().collect();
        for _ in 0..steps {
            let logits = self.model.decode(&tokens, &mut stores, &mut meter)?;
            tokens = logits.chunks_exact(self.model.config.vocab).map(argmax).collect();
        }
        Ok(Steps { total: meter.total, submit: None })
    }

    fn bytes(&self, store: &Vec<KvStore>) -> Result<KvBytes> {
        store.iter().try_fold(KvBytes { held: 0, dense: 0 }, |sum, sequence| {
            let bytes = sequence.bytes()?;
            Ok(KvBytes { held: sum.held + bytes.held, dense: sum.dense + bytes.dense })
        })
    }

    fn device_bytes(&self) -> Result<Option<usize>> {
        Ok(None)
    }

    fn largest(&self, _: usize, _: Option<&Policy>) -> Result<(usize, Vec<KvStore>)> {
        Err(Error::Invalid("the host's memory has no largest batch".to_string()))
    }
}
