//! Decode attention over compressed pages and over dense f16 tokens on the CPU backend.
//!
//! `cargo bench --bench cpu` sweeps head_dim and keep at 8192 tokens of 2 KV heads, four query heads each; the throughput that
//! criterion prints is bytes of K and V read. The shapes of `docs/performance.md` come from the `speed` example.
#![allow(missing_docs, clippy::unwrap_used)]

use criterion::{BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use indicatif::ProgressBar;
use mustafar::{Context, DType, Stream, ValueType};
use workload::{Size, Workload};

#[path = "../ffi-examples/rust/speed/memory.rs"]
mod memory;
#[path = "../ffi-examples/rust/speed/workload.rs"]
mod workload;

/// What the example shows while a workload is made; here criterion reports.
fn begin(_: &ProgressBar, _: u64) {}

fn attend(criterion: &mut Criterion) {
    let context = Context::cpu(1).unwrap();
    let mut group = criterion.benchmark_group("attend");
    group.sample_size(20);
    for head_dim in mustafar::variants::HEAD_DIMS {
        let types = if head_dim == 128 { &ValueType::all()[..] } else { &[ValueType::F16] };
        for (sparsity, values) in [0.5, 0.7].into_iter().flat_map(|s| types.iter().map(move |v| (s, *v))) {
            let keep = mustafar::keep_for_sparsity(head_dim, sparsity).unwrap();
            let size = Size {
                batch: 1,
                q_heads: 8,
                kv_heads: 2,
                head_dim,
                tokens: 8192,
                keep_k: keep,
                keep_v: keep,
                dtype: if values == ValueType::Bf16 { DType::Bf16 } else { DType::F16 },
                values,
            };
            let mut workload = Workload::new(&context, Stream::NONE, &size, &ProgressBar::hidden()).unwrap();
            group.throughput(Throughput::Bytes(workload.compressed_bytes() as u64));
            group.bench_function(BenchmarkId::new(format!("compressed/{values}/D{head_dim}"), keep), |b| {
                b.iter(|| workload.attend_compressed().unwrap());
            });
            if sparsity == 0.5 && values == ValueType::F16 {
                group.throughput(Throughput::Bytes(workload.dense_bytes() as u64));
                group.bench_function(BenchmarkId::new("dense", format!("D{head_dim}")), |b| {
                    b.iter(|| workload.attend_dense().unwrap());
                });
            }
        }
    }
    group.finish();
}

fn append(criterion: &mut Criterion) {
    let context = Context::cpu(1).unwrap();
    let size = Size {
        batch: 16,
        q_heads: 32,
        kv_heads: 8,
        head_dim: 128,
        tokens: 64,
        keep_k: 39,
        keep_v: 39,
        dtype: DType::F16,
        values: ValueType::F16,
    };
    let mut workload = Workload::new(&context, Stream::NONE, &size, &ProgressBar::hidden()).unwrap();
    criterion.bench_function("append/16 sequences x 8 heads", |b| {
        b.iter(|| workload.append_last().unwrap());
    });
}

criterion_group!(benches, attend, append);
criterion_main!(benches);
