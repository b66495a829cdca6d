//! Storing on the CPU: `append`, `prune`, `compress` and `decompress` in dense bytes per second, per instruction
//! level and single-threaded. `cargo bench --bench cpu_store [FILTER]`.
#![allow(missing_docs, clippy::unwrap_used)]

use criterion::{BatchSize, BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use half::{bf16, f16};
use mustafar::ops::{self, Append, AppendSide, Center, Compress, Decompress, Prune, Selection};
use mustafar::{
    Context, DType, Level, Mem, MemMut, PageFormat, PagePool, PagePoolMut, PoolLayout, Sequences, Shape,
    Stream, Tensor, TensorMut, ValueType,
};

use numbers::numbers;

#[path = "common/numbers.rs"]
#[allow(unreachable_pub)]
mod numbers;

const TOKENS: usize = 4096;
const HEADS: usize = 8;
const DIM: usize = 128;
const PAGE_TOKENS: usize = 64;
const PAGES: usize = TOKENS / PAGE_TOKENS;

fn contexts() -> impl Iterator<Item = Context> {
    let levels = Level::ALL.into_iter().filter(|level| level.available());
    levels.map(|level| Context::cpu_with_level(1, level).unwrap())
}

fn dense(dtype: DType) -> Vec<u16> {
    let bits = |x: f32| match dtype {
        DType::F16 => f16::from_f32(x).to_bits(),
        _ => bf16::from_f32(x).to_bits(),
    };
    numbers(TOKENS * HEADS * DIM).into_iter().map(bits).collect()
}

fn shape() -> Shape {
    Shape::contiguous(1, TOKENS, HEADS, DIM).unwrap()
}

/// A buffer for a pool, 16-byte aligned.
struct Pool {
    memory: Vec<u8>,
    start: usize,
    layout: PoolLayout,
}

impl Pool {
    fn new(format: PageFormat) -> Self {
        let layout = PoolLayout::contiguous(format, PAGES, HEADS).unwrap();
        let memory = vec![0u8; layout.extent("pool").unwrap() + 16];
        let start = memory.as_ptr().align_offset(16);
        Self { memory, start, layout }
    }

    fn view(&self) -> PagePool<'_> {
        PagePool::new("pool", Mem::host(&self.memory[self.start..]), self.layout).unwrap()
    }

    fn view_mut(&mut self) -> PagePoolMut<'_> {
        PagePoolMut::new("pool", MemMut::host(&mut self.memory[self.start..]), self.layout).unwrap()
    }
}

fn append(
    context: &Context,
    (dtype, x): (DType, &[u16]),
    pool: &mut Pool,
    weights: Option<&[f32]>,
    center: Option<&[f32]>,
) {
    let slots: Vec<i64> = (0..TOKENS as i64).collect();
    let k = AppendSide {
        x: Tensor::new("x", Mem::host(x), dtype, shape()).unwrap(),
        weights: weights.map(Mem::host),
        center: center.map(|c| Center { values: Mem::host(c), batch: 1 }),
        pool: pool.view_mut(),
    };
    let args = Append { k: Some(k), v: None, slots: Mem::host(&slots), sequence: None };
    ops::append(context, Stream::NONE, args).unwrap();
}

fn bench_append(c: &mut Criterion) {
    let mut group = c.benchmark_group("append");
    group.throughput(Throughput::Bytes((TOKENS * HEADS * DIM * 2) as u64));
    let weights = numbers(HEADS * DIM).into_iter().map(f32::abs).collect::<Vec<_>>();
    for context in contexts() {
        for (values, keep) in [
            (ValueType::F16, 39),
            (ValueType::F16, 64),
            (ValueType::Bf16, 64),
            (ValueType::E4m3, 64),
            (ValueType::Int8, 64),
        ] {
            let dtype = values.dtype().unwrap_or(DType::F16);
            let x = dense(dtype);
            let x = (dtype, &x[..]);
            let mut pool = Pool::new(PageFormat::uniform(values, DIM, PAGE_TOKENS, keep).unwrap());
            let id = |what: &str| BenchmarkId::new(format!("{values} keep {keep}{what}"), &context);
            group.bench_function(id(""), |b| b.iter(|| append(&context, x, &mut pool, None, None)));
            if keep == 39 {
                group.bench_function(id(" weighted"), |b| {
                    b.iter(|| append(&context, x, &mut pool, Some(&weights), None));
                });
                group.bench_function(id(" centred"), |b| {
                    b.iter(|| append(&context, x, &mut pool, None, Some(&weights)));
                });
            }
        }
    }
}

fn bench_decompress(c: &mut Criterion) {
    let mut group = c.benchmark_group("decompress");
    let lens = [TOKENS as i32];
    let sequences = Sequences {
        batch: 1,
        table: None,
        table_stride: 0,
        lens: Mem::host(&lens),
        lens_per_head: false,
        max_len: TOKENS,
    };
    let x = dense(DType::F16);
    let mut pool = Pool::new(PageFormat::uniform(ValueType::F16, DIM, PAGE_TOKENS, 39).unwrap());
    append(&Context::cpu(1).unwrap(), (DType::F16, &x), &mut pool, None, None);
    let mut out = vec![0f32; TOKENS * HEADS * DIM];
    for context in contexts() {
        for dtype in [DType::F16, DType::F32] {
            group.throughput(Throughput::Bytes((TOKENS * HEADS * DIM * dtype.bytes()) as u64));
            group.bench_function(BenchmarkId::new(format!("keep 39 to {dtype}"), &context), |b| {
                b.iter(|| {
                    let out = TensorMut::new("out", MemMut::host(&mut out), dtype, shape()).unwrap();
                    let args = Decompress { pool: pool.view(), sequences, center: None, out };
                    ops::decompress(&context, Stream::NONE, args).unwrap();
                });
            });
        }
    }
}

fn bench_prune_and_compress(c: &mut Criterion) {
    let x = dense(DType::F16);
    let mut group = c.benchmark_group("prune");
    group.throughput(Throughput::Bytes((TOKENS * HEADS * DIM * 2) as u64));
    let rules = [
        ("token keep 39", Selection::Token { keep: 39 }),
        ("channel keep 10", Selection::Channel { keep: 10 }),
    ];
    for context in contexts() {
        for (name, selection) in rules {
            let run = |x: &mut Vec<u16>| {
                let x = TensorMut::new("x", MemMut::host(x), DType::F16, shape()).unwrap();
                let args = Prune { x, selection, weights: None, token_weights: None, mask: None };
                ops::prune(&context, Stream::NONE, args).unwrap();
            };
            // A fresh copy each time: pruned rows would end the search early.
            group.bench_function(BenchmarkId::new(name, &context), |b| {
                b.iter_batched_ref(|| x.clone(), run, BatchSize::LargeInput);
            });
        }
    }
    group.finish();

    let mut x = x;
    let view = TensorMut::new("x", MemMut::host(&mut x), DType::F16, shape()).unwrap();
    let selection = Selection::Channel { keep: 10 };
    let args = Prune { x: view, selection, weights: None, token_weights: None, mask: None };
    ops::prune(&Context::cpu(1).unwrap(), Stream::NONE, args).unwrap();
    let mut group = c.benchmark_group("compress");
    group.throughput(Throughput::Bytes((TOKENS * HEADS * DIM * 2) as u64));
    let mut pool = Pool::new(PageFormat::ragged(ValueType::F16, DIM, PAGE_TOKENS, 2 * 10 * DIM).unwrap());
    let pages: Vec<i32> = (0..PAGES as i32).collect();
    for context in contexts() {
        group.bench_function(BenchmarkId::new("non-zeros, 10 of 32", &context), |b| {
            b.iter(|| {
                let x = Tensor::new("x", Mem::host(&x), DType::F16, shape()).unwrap();
                let pages = Mem::host(&pages);
                let args = Compress { x, mask: None, pool: pool.view_mut(), pages, needed: None };
                ops::compress(&context, Stream::NONE, args).unwrap();
            });
        });
    }
}

criterion_group! {
    name = benches;
    config = Criterion::default().sample_size(10).warm_up_time(std::time::Duration::from_millis(300))
        .measurement_time(std::time::Duration::from_secs(1));
    targets = bench_append, bench_decompress, bench_prune_and_compress
}
criterion_main!(benches);
