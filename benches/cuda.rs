//! Decode attention and append on CUDA device 0, if there is one.
//!
//! `cargo bench --bench cuda`: 8 sequences of 8192 tokens, 32 query and 8 KV heads of 128. Times are those of CUDA events
//! with nothing in the L2 cache before; the throughput is bytes of K and V read.
#![allow(missing_docs, clippy::unwrap_used, clippy::print_stderr)]

use criterion::{BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use gpu::Gpu;
use indicatif::ProgressBar;
use mustafar::{Context, DType, Error, ValueType};
use std::time::Duration;
use workload::{Size, Workload};

#[path = "../ffi-examples/rust/speed/gpu.rs"]
#[allow(dead_code)]
mod gpu;
#[path = "../ffi-examples/rust/speed/memory.rs"]
mod memory;
#[path = "../ffi-examples/rust/speed/workload.rs"]
mod workload;

/// What the example shows while a workload is made; here criterion reports.
fn begin(_: &ProgressBar, _: u64) {}

/// What `n` runs of `op` take.
fn measure(gpu: &Gpu, n: u64, mut op: impl FnMut() -> Result<(), Error>) -> Duration {
    let us: f64 = (0..n).map(|_| gpu.time(&mut op).unwrap()).sum();
    Duration::from_secs_f64(us / 1e6)
}

fn cuda(criterion: &mut Criterion) {
    let context = match Context::cuda(0) {
        Ok(context) => context,
        Err(e) => return eprintln!("SKIPPED: {e}"),
    };
    let gpu = Gpu::new().unwrap();
    let mut group = criterion.benchmark_group("cuda");
    group.sample_size(20).measurement_time(Duration::from_secs(1));
    for dtype in [DType::F16, DType::Bf16] {
        for keep in [39, 64] {
            let size = Size {
                batch: 8,
                q_heads: 32,
                kv_heads: 8,
                head_dim: 128,
                tokens: 8192,
                keep_k: keep,
                keep_v: keep,
                dtype,
                values: if dtype == DType::Bf16 { ValueType::Bf16 } else { ValueType::F16 },
            };
            let mut workload = Workload::new(&context, gpu.stream(), &size, &ProgressBar::hidden()).unwrap();
            group.throughput(Throughput::Bytes(workload.compressed_bytes() as u64));
            group.bench_function(BenchmarkId::new(format!("attend/{dtype}"), keep), |b| {
                b.iter_custom(|n| measure(&gpu, n, || workload.attend_compressed()));
            });
            group.throughput(Throughput::Bytes(workload.dense_bytes() as u64));
            group.bench_function(BenchmarkId::new(format!("attend dense/{dtype}"), keep), |b| {
                b.iter_custom(|n| measure(&gpu, n, || workload.attend_dense()));
            });
            group.throughput(Throughput::Elements(8));
            group.bench_function(BenchmarkId::new(format!("append/{dtype}"), keep), |b| {
                b.iter_custom(|n| measure(&gpu, n, || workload.append_last()));
            });
        }
    }
    group.finish();
}

criterion_group!(benches, cuda);
criterion_main!(benches);
