//! The scores of a prompt beside the append that they precede: on each instruction level of the CPU (one thread, one
//! sequence) and on CUDA device 0, if there is one (8 sequences, a call for each; times of CUDA events with nothing in the L2
//! cache before). `cargo bench --bench score [FILTER]`.
//!
//! Sequences of 4096 tokens, 32 query and 8 KV heads of 128, f16, sparsity 0.7; scores look at the last 32 queries.
#![allow(missing_docs, clippy::unwrap_used, clippy::print_stderr)]

use criterion::{BenchmarkId, Criterion, criterion_group, criterion_main};
use gpu::Gpu;
use half::f16;
use memory::Buffer;
use mustafar::ops::{
    self, Append, AppendSide, QueryWeights, RECENT_QUERIES, StructuredWeights, TokenWeights,
};
use mustafar::{
    Context, DType, Error, Level, PageFormat, PagePoolMut, PoolLayout, Shape, Stream, Tensor, ValueType,
};
use numbers::numbers;
use std::time::Duration;

#[path = "../ffi-examples/rust/speed/gpu.rs"]
#[allow(dead_code)]
mod gpu;
#[path = "../ffi-examples/rust/speed/memory.rs"]
mod memory;
#[path = "common/numbers.rs"]
#[allow(unreachable_pub)]
mod numbers;

const TOKENS: usize = 4096;
const Q_HEADS: usize = 32;
const HEADS: usize = 8;
const DIM: usize = 128;
const KEEP: usize = 39;
const PAGE_TOKENS: usize = 64;

type Result<T> = std::result::Result<T, Error>;

/// A prompt of some sequences, each the same.
struct Prompt {
    context: Context,
    stream: Stream,
    sequences: usize,
    x: Buffer,
    q: Buffer,
    lse: Buffer,
    slots: Buffer,
    out: Buffer,
    layout: PoolLayout,
    pages: [Buffer; 2],
}

impl Prompt {
    fn new(context: &Context, stream: Stream, sequences: usize) -> Result<Self> {
        let tokens = sequences * TOKENS;
        let x: Vec<f16> = numbers(tokens * HEADS * DIM).into_iter().map(f16::from_f32).collect();
        let slots: Vec<i64> = (0..tokens as i64).collect();
        let format = PageFormat::uniform(ValueType::F16, DIM, PAGE_TOKENS, KEEP)?;
        let layout = PoolLayout::contiguous(format, tokens / PAGE_TOKENS, HEADS)?;
        let pages = || Buffer::zeroed(context, layout.extent("pages")?);
        Ok(Self {
            context: context.clone(),
            stream,
            sequences,
            x: Buffer::holding(context, &x)?,
            q: Buffer::holding(context, &numbers(RECENT_QUERIES * Q_HEADS * DIM))?,
            lse: Buffer::holding(context, &[8f32; RECENT_QUERIES * Q_HEADS])?,
            slots: Buffer::holding(context, &slots)?,
            out: Buffer::zeroed(context, TOKENS * HEADS * DIM * 4)?,
            layout,
            pages: [pages()?, pages()?],
        })
    }

    fn tokens(&self, sequence: usize, count: usize) -> Result<Tensor<'_>> {
        let x = self.x.mem().skip("x", sequence * TOKENS * HEADS * DIM * 2)?;
        Tensor::new("x", x, DType::F16, Shape::contiguous(1, count, HEADS, DIM)?)
    }

    fn queries(&self) -> Result<Tensor<'_>> {
        Tensor::new("q", self.q.mem(), DType::F32, Shape::contiguous(1, RECENT_QUERIES, Q_HEADS, DIM)?)
    }

    fn append(&mut self) -> Result<()> {
        let [k, v] = &mut self.pages;
        let shape = Shape::contiguous(1, self.sequences * TOKENS, HEADS, DIM)?;
        let x = Tensor::new("x", self.x.mem(), DType::F16, shape)?;
        let [k, v] = [k, v].map(|pages| {
            let pool = PagePoolMut::new("pages", pages.mem_mut(), self.layout)?;
            Ok(Some(AppendSide { x, pool, weights: None, center: None }))
        });
        let (k, v) = (k?, v?);
        ops::append(&self.context, self.stream, Append { k, v, slots: self.slots.mem(), sequence: None })
    }

    fn query_weights(&mut self) -> Result<()> {
        (0..self.sequences).try_for_each(|_| {
            let mut out = std::mem::take(&mut self.out);
            let args = QueryWeights { q: self.queries()?, kv_heads: HEADS, out: out.mem_mut() };
            ops::query_weights(&self.context, self.stream, args)?;
            self.out = out;
            Ok(())
        })
    }

    fn structured_weights(&mut self) -> Result<()> {
        (0..self.sequences).try_for_each(|sequence| {
            let mut out = std::mem::take(&mut self.out);
            let (x, q) = ([self.tokens(sequence, TOKENS)?], Some(self.queries()?));
            let args = StructuredWeights { x: &x, center: None, q, keep: KEEP, out: out.mem_mut() };
            ops::structured_weights(&self.context, self.stream, args)?;
            self.out = out;
            Ok(())
        })
    }

    /// `count` tokens in a call: a cache weighs a group of them at a time.
    fn token_weights(&mut self, count: usize) -> Result<()> {
        (0..self.sequences * TOKENS / count).try_for_each(|i| {
            let mut out = std::mem::take(&mut self.out);
            let lse = Shape::contiguous(1, RECENT_QUERIES, Q_HEADS, 1)?;
            let args = TokenWeights {
                q: self.queries()?,
                lse: Tensor::new("lse", self.lse.mem(), DType::F32, lse)?,
                q_position: TOKENS - 1,
                k: self.tokens(i * count / TOKENS, count)?,
                k_position: i * count % TOKENS,
                scale: None,
                softcap: None,
                sliding_window: None,
                out: out.mem_mut(),
            };
            ops::token_weights(&self.context, self.stream, args)?;
            self.out = out;
            Ok(())
        })
    }
}

/// Every op; `time` says what some runs of one take.
fn bench(
    criterion: &mut Criterion,
    context: &Context,
    mut prompt: Prompt,
    time: impl Fn(u64, &mut dyn FnMut() -> Result<()>) -> Duration,
) {
    type Op = fn(&mut Prompt) -> Result<()>;
    let ops: [(&str, Op); 5] = [
        ("append", Prompt::append),
        ("query_weights", Prompt::query_weights),
        ("structured_weights", Prompt::structured_weights),
        ("token_weights", |prompt| prompt.token_weights(TOKENS)),
        ("token_weights by 256", |prompt| prompt.token_weights(256)),
    ];
    let mut group = criterion.benchmark_group("score");
    group.sample_size(10).warm_up_time(Duration::from_millis(200)).measurement_time(Duration::from_secs(1));
    for (name, op) in ops {
        group.bench_function(BenchmarkId::new(name, context), |b| {
            b.iter_custom(|n| time(n, &mut || op(&mut prompt)));
        });
    }
}

fn score(criterion: &mut Criterion) {
    for level in Level::ALL.into_iter().filter(|level| level.available()) {
        let context = Context::cpu_with_level(1, level).unwrap();
        let prompt = Prompt::new(&context, Stream::NONE, 1).unwrap();
        bench(criterion, &context, prompt, |n, op| {
            let start = std::time::Instant::now();
            (0..n).for_each(|_| op().unwrap());
            start.elapsed()
        });
    }
    let context = match Context::cuda(0) {
        Ok(context) => context,
        Err(e) => return eprintln!("SKIPPED on CUDA: {e}"),
    };
    let gpu = Gpu::new().unwrap();
    let prompt = Prompt::new(&context, gpu.stream(), 8).unwrap();
    bench(criterion, &context, prompt, |n, op| {
        let us: f64 = (0..n).map(|_| gpu.time(&mut *op).unwrap()).sum();
        Duration::from_secs_f64(us / 1e6)
    });
}

criterion_group!(benches, score);
criterion_main!(benches);
