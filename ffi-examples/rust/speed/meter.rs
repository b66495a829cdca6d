//! What tells the time: the clock of the host, or events of the GPU.

use super::gpu::Gpu;
use super::{BackendName, Options};
use mustafar::{Context, Error, Stream};
use std::time::Instant;

/// Bytes copied to measure bandwidth; far beyond any cache.
const COPY_BYTES: usize = 256 << 20;
const COPY_ROUNDS: usize = 7;

pub(crate) enum Meter {
    Host { threads: usize },
    Gpu(Gpu),
}

impl Meter {
    /// The backend that the options name, and its meter.
    pub(crate) fn open(options: &Options) -> Result<(Context, Self), Error> {
        match options.backend {
            BackendName::Cpu => Ok((Context::cpu(options.threads)?, Self::Host { threads: options.threads })),
            BackendName::Cuda => Ok((Context::cuda(0)?, Self::Gpu(Gpu::new()?))),
        }
    }

    /// Where to submit what is measured.
    pub(crate) fn stream(&self) -> Stream {
        match self {
            Self::Host { .. } => Stream::NONE,
            Self::Gpu(gpu) => gpu.stream(),
        }
    }

    /// Microseconds that `work` takes.
    pub(crate) fn time(&self, work: impl FnOnce() -> Result<(), Error>) -> Result<f64, Error> {
        match self {
            Self::Host { .. } => {
                let start = Instant::now();
                work()?;
                Ok(start.elapsed().as_secs_f64() * 1e6)
            }
            Self::Gpu(gpu) => gpu.time(work),
        }
    }

    /// Gigabytes read and written per second by plain copies, the best of a few.
    pub(crate) fn copy_bandwidth(&self) -> Result<f64, Error> {
        match self {
            Self::Host { threads } => Ok(host_copy_bandwidth(*threads)),
            Self::Gpu(gpu) => gpu.copy_bandwidth(),
        }
    }
}

fn host_copy_bandwidth(threads: usize) -> f64 {
    let (from, mut to) = (vec![1u8; COPY_BYTES], vec![2u8; COPY_BYTES]);
    let share = COPY_BYTES.div_ceil(threads);
    let mut best = f64::INFINITY;
    for _ in 0..COPY_ROUNDS {
        let start = Instant::now();
        std::thread::scope(|scope| {
            for (from, to) in from.chunks(share).zip(to.chunks_mut(share)) {
                scope.spawn(move || to.copy_from_slice(from));
            }
        });
        best = best.min(start.elapsed().as_secs_f64());
        std::hint::black_box(&to);
    }
    2.0 * COPY_BYTES as f64 / best / 1e9
}
