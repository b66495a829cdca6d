//! The ops on host memory whatever the backend: on CUDA every view is copied to the device, the op runs there on a
//! stream of its own, and what it has changed is copied back.
#![allow(unsafe_code)]

use super::device::{DeviceCopy, TestStream, exclusive};
use mustafar::ops::{
    self, Append, AppendSide, Attend, Center, Compress, Compressed, Decompress, Dense, Merge, NO_VIOLATION,
    Prune, QueryWeights, SpmvKey, SpmvValue, StructuredWeights, TokenWeights, Validate,
};
use mustafar::{
    Backend, Cache, CacheAttend, CacheQueries, Context, DeviceErrors, Error, Mem, MemMut, PagePool,
    PagePoolMut, Result, SequenceId, Sequences, Stream, Tensor, TensorMut,
};

/// Copies of the views of one call.
#[derive(Default)]
struct Staging {
    inputs: Vec<DeviceCopy>,
    outputs: Vec<Output>,
}

struct Output {
    device: DeviceCopy,
    before: Vec<u8>,
    host: *mut u8,
}

/// What a host view points at.
fn bytes_of(mem: &Mem<'_>) -> &'static [u8] {
    match mem.bytes() {
        0 => &[],
        // SAFETY: a host view of memory that outlives the call it is an argument of; the slice does not leave it.
        n => unsafe { std::slice::from_raw_parts(mem.address() as usize as *const u8, n) },
    }
}

impl Staging {
    fn mem(&mut self, mem: &Mem<'_>) -> Mem<'static> {
        let copy = DeviceCopy::new(bytes_of(mem));
        let view = copy.mem();
        self.inputs.push(copy);
        view
    }

    fn mem_mut(&mut self, mem: MemMut<'_>) -> MemMut<'static> {
        let bytes = bytes_of(&mem.as_ref());
        let device = DeviceCopy::new(bytes);
        let view = device.mem_mut();
        let host = mem.address() as usize as *mut u8;
        self.outputs.push(Output { device, before: bytes.to_vec(), host });
        view
    }

    fn tensor(&mut self, x: &Tensor<'_>) -> Tensor<'static> {
        Tensor::new("tensor", self.mem(&x.mem()), x.dtype, x.shape).unwrap()
    }

    fn tensor_mut(&mut self, x: &mut TensorMut<'_>) -> TensorMut<'static> {
        let mem = self.mem_mut(x.mem_mut());
        TensorMut::new("tensor", mem, x.dtype, x.shape).unwrap()
    }

    fn pool(&mut self, pool: &PagePool<'_>) -> PagePool<'static> {
        PagePool::new("pool", self.mem(&pool.mem()), pool.layout).unwrap()
    }

    fn pool_mut(&mut self, pool: &mut PagePoolMut<'_>) -> PagePoolMut<'static> {
        let mem = self.mem_mut(pool.mem_mut());
        PagePoolMut::new("pool", mem, pool.layout).unwrap()
    }

    fn sequences(&mut self, s: &Sequences<'_>) -> Sequences<'static> {
        Sequences {
            batch: s.batch,
            table: s.table.map(|table| self.mem(&table)),
            table_stride: s.table_stride,
            lens: self.mem(&s.lens),
            lens_per_head: s.lens_per_head,
            max_len: s.max_len,
        }
    }

    fn center(&mut self, center: &Option<Center<'_>>) -> Option<Center<'static>> {
        center.map(|c| Center { values: self.mem(&c.values), batch: c.batch })
    }

    fn dense(&mut self, dense: &Option<Dense<'_>>) -> Option<Dense<'static>> {
        dense.map(|d| Dense {
            k: self.tensor(&d.k),
            v: self.tensor(&d.v),
            lens: self.mem(&d.lens),
            rows: d.rows.map(|rows| self.mem(&rows)),
        })
    }

    fn side(&mut self, side: &mut Option<AppendSide<'_>>) -> Option<AppendSide<'static>> {
        side.as_mut().map(|side| AppendSide {
            x: self.tensor(&side.x),
            pool: self.pool_mut(&mut side.pool),
            weights: side.weights.map(|w| self.mem(&w)),
            center: self.center(&side.center),
        })
    }

    /// Copies back the bytes that changed; views of one call may interleave.
    fn finish(self) {
        for output in self.outputs {
            for (i, (now, before)) in output.device.read().into_iter().zip(output.before).enumerate() {
                if now != before {
                    // SAFETY: inside the writable view that the caller gave.
                    unsafe { output.host.add(i).write(now) };
                }
            }
        }
    }
}

/// Runs `op` on the device: between staging and copying back. Errors that only the device saw come back as
/// [`Error::CorruptData`].
fn on_device(
    context: &Context,
    mut staging: Staging,
    op: impl FnOnce(Stream) -> Result<()>,
) -> Result<Staging> {
    let _one_at_a_time = exclusive();
    let stream = TestStream::new();
    op(stream.stream())?;
    stream.synchronize();
    let errors = context.take_device_errors()?;
    staging.inputs.clear();
    if errors != DeviceErrors::default() {
        staging.finish();
        return Err(Error::CorruptData { what: "device array", reason: format!("{errors:?}") });
    }
    Ok(staging)
}

fn is_cpu(context: &Context) -> bool {
    context.backend() == Backend::Cpu
}

pub fn append(context: &Context, mut args: Append<'_>) -> Result<()> {
    if is_cpu(context) {
        return ops::append(context, Stream::NONE, args);
    }
    let mut s = Staging::default();
    let args = Append {
        k: s.side(&mut args.k),
        v: s.side(&mut args.v),
        slots: s.mem(&args.slots),
        sequence: args.sequence.map(|x| s.mem(&x)),
    };
    on_device(context, s, |stream| ops::append(context, stream, args)).map(Staging::finish)
}

pub fn prune(context: &Context, mut args: Prune<'_>) -> Result<()> {
    if is_cpu(context) {
        return ops::prune(context, Stream::NONE, args);
    }
    let mut s = Staging::default();
    let args = Prune {
        x: s.tensor_mut(&mut args.x),
        selection: args.selection,
        weights: args.weights.map(|w| s.mem(&w)),
        token_weights: args.token_weights.map(|w| s.mem(&w)),
        mask: args.mask.map(|m| s.mem_mut(m)),
    };
    on_device(context, s, |stream| ops::prune(context, stream, args)).map(Staging::finish)
}

pub fn compress(context: &Context, mut args: Compress<'_>) -> Result<()> {
    if is_cpu(context) {
        return ops::compress(context, Stream::NONE, args);
    }
    let mut s = Staging::default();
    let args = Compress {
        x: s.tensor(&args.x),
        mask: args.mask.map(|m| s.mem(&m)),
        pool: s.pool_mut(&mut args.pool),
        pages: s.mem(&args.pages),
        needed: args.needed.map(|n| s.mem_mut(n)),
    };
    on_device(context, s, |stream| ops::compress(context, stream, args)).map(Staging::finish)
}

pub fn decompress(context: &Context, mut args: Decompress<'_>) -> Result<()> {
    if is_cpu(context) {
        return ops::decompress(context, Stream::NONE, args);
    }
    let mut s = Staging::default();
    let args = Decompress {
        pool: s.pool(&args.pool),
        sequences: s.sequences(&args.sequences),
        center: s.center(&args.center),
        out: s.tensor_mut(&mut args.out),
    };
    on_device(context, s, |stream| ops::decompress(context, stream, args)).map(Staging::finish)
}

/// On either backend the violation is the result.
pub fn validate(context: &Context, args: Validate<'_>) -> Result<()> {
    if is_cpu(context) {
        return ops::validate(context, Stream::NONE, args);
    }
    let (layout, max_len) = (args.pool.layout, args.sequences.max_len);
    let mut record = [NO_VIOLATION];
    let mut s = Staging::default();
    let args = Validate {
        pool: s.pool(&args.pool),
        sequences: s.sequences(&args.sequences),
        record: Some(s.mem_mut(MemMut::host(&mut record))),
    };
    on_device(context, s, |stream| ops::validate(context, stream, args)).map(Staging::finish)?;
    ops::check_record(record[0], &layout, max_len)
}

/// With a workspace of exactly the size asked for, all poison.
pub fn attend(context: &Context, mut args: Attend<'_>) -> Result<()> {
    let mut workspace = super::Bytes::poisoned(ops::attend_workspace(context, &args)?);
    if is_cpu(context) {
        return ops::attend(context, Stream::NONE, args, MemMut::host(&mut workspace[..]));
    }
    let mut s = Staging::default();
    let args = Attend {
        q: s.tensor(&args.q),
        batch: args.batch,
        q_indptr: args.q_indptr.map(|x| s.mem(&x)),
        max_q_len: args.max_q_len,
        sinks: s.dense(&args.sinks),
        compressed: args.compressed.map(|c| Compressed {
            k: s.pool(&c.k),
            v: s.pool(&c.v),
            sequences: s.sequences(&c.sequences),
            k_center: s.center(&c.k_center),
        }),
        window: s.dense(&args.window),
        first: args.first.map(|x| s.mem(&x)),
        scale: args.scale,
        softcap: args.softcap,
        sliding_window: args.sliding_window,
        split_tokens: args.split_tokens,
        out: s.tensor_mut(&mut args.out),
        lse: args.lse.as_mut().map(|lse| s.tensor_mut(lse)),
    };
    let scratch = DeviceCopy::new(&workspace);
    on_device(context, s, |stream| ops::attend(context, stream, args, scratch.mem_mut())).map(Staging::finish)
}

pub fn spmv_key(context: &Context, mut args: SpmvKey<'_>) -> Result<()> {
    if is_cpu(context) {
        return ops::spmv_key(context, Stream::NONE, args);
    }
    let mut s = Staging::default();
    let args = SpmvKey {
        q: s.tensor(&args.q),
        pool: s.pool(&args.pool),
        sequences: s.sequences(&args.sequences),
        center: s.center(&args.center),
        scale: args.scale,
        scores: s.tensor_mut(&mut args.scores),
    };
    on_device(context, s, |stream| ops::spmv_key(context, stream, args)).map(Staging::finish)
}

pub fn spmv_value(context: &Context, mut args: SpmvValue<'_>) -> Result<()> {
    if is_cpu(context) {
        return ops::spmv_value(context, Stream::NONE, args);
    }
    let mut s = Staging::default();
    let args = SpmvValue {
        weights: s.tensor(&args.weights),
        pool: s.pool(&args.pool),
        sequences: s.sequences(&args.sequences),
        out: s.tensor_mut(&mut args.out),
    };
    on_device(context, s, |stream| ops::spmv_value(context, stream, args)).map(Staging::finish)
}

pub fn merge(context: &Context, mut args: Merge<'_>) -> Result<()> {
    if is_cpu(context) {
        return ops::merge(context, Stream::NONE, args);
    }
    let mut s = Staging::default();
    let args = Merge {
        a: s.tensor(&args.a),
        a_lse: s.tensor(&args.a_lse),
        b: s.tensor(&args.b),
        b_lse: s.tensor(&args.b_lse),
        out: s.tensor_mut(&mut args.out),
        lse: args.lse.as_mut().map(|lse| s.tensor_mut(lse)),
    };
    on_device(context, s, |stream| ops::merge(context, stream, args)).map(Staging::finish)
}

pub fn query_weights(context: &Context, args: QueryWeights<'_>) -> Result<()> {
    if is_cpu(context) {
        return ops::query_weights(context, Stream::NONE, args);
    }
    let mut s = Staging::default();
    let args = QueryWeights { q: s.tensor(&args.q), kv_heads: args.kv_heads, out: s.mem_mut(args.out) };
    on_device(context, s, |stream| ops::query_weights(context, stream, args)).map(Staging::finish)
}

pub fn structured_weights(context: &Context, args: StructuredWeights<'_>) -> Result<()> {
    if is_cpu(context) {
        return ops::structured_weights(context, Stream::NONE, args);
    }
    let mut s = Staging::default();
    let x: Vec<_> = args.x.iter().map(|x| s.tensor(x)).collect();
    let args = StructuredWeights {
        x: &x,
        center: s.center(&args.center),
        q: args.q.map(|q| s.tensor(&q)),
        keep: args.keep,
        out: s.mem_mut(args.out),
    };
    on_device(context, s, |stream| ops::structured_weights(context, stream, args)).map(Staging::finish)
}

pub fn token_weights(context: &Context, args: TokenWeights<'_>) -> Result<()> {
    if is_cpu(context) {
        return ops::token_weights(context, Stream::NONE, args);
    }
    let mut s = Staging::default();
    let args = TokenWeights {
        q: s.tensor(&args.q),
        lse: s.tensor(&args.lse),
        k: s.tensor(&args.k),
        out: s.mem_mut(args.out),
        ..args
    };
    on_device(context, s, |stream| ops::token_weights(context, stream, args)).map(Staging::finish)
}

/// [`Cache::append_batch`], or [`Cache::append`] for one sequence.
pub fn cache_append(
    context: &Context,
    cache: &mut Cache,
    layer: usize,
    ids: &[SequenceId],
    k: Tensor<'_>,
    v: Tensor<'_>,
) -> Result<()> {
    let mut call = |stream, k, v| match ids {
        [id] => cache.append(stream, layer, *id, k, v),
        _ => cache.append_batch(stream, layer, ids, k, v),
    };
    if is_cpu(context) {
        return call(Stream::NONE, k, v);
    }
    let mut s = Staging::default();
    let (k, v) = (s.tensor(&k), s.tensor(&v));
    on_device(context, s, |stream| call(stream, k, v)).map(Staging::finish)
}

pub fn cache_append_with_queries(
    context: &Context,
    cache: &mut Cache,
    layer: usize,
    ids: &[SequenceId],
    [k, v]: [Tensor<'_>; 2],
    queries: CacheQueries<'_>,
) -> Result<()> {
    let mut call = |stream, k, v, queries| cache.append_with_queries(stream, layer, ids, k, v, queries);
    if is_cpu(context) {
        return call(Stream::NONE, k, v, queries);
    }
    let mut s = Staging::default();
    let (k, v) = (s.tensor(&k), s.tensor(&v));
    let lse = queries.lse.map(|lse| s.tensor(&lse));
    let queries = CacheQueries { q: s.tensor(&queries.q), lse, ..queries };
    on_device(context, s, |stream| call(stream, k, v, queries)).map(Staging::finish)
}

pub fn cache_attend(context: &Context, cache: &mut Cache, mut args: CacheAttend<'_>) -> Result<()> {
    if is_cpu(context) {
        return cache.attend(Stream::NONE, args);
    }
    let mut s = Staging::default();
    let args = CacheAttend {
        layer: args.layer,
        sequences: args.sequences,
        q: s.tensor(&args.q),
        scale: args.scale,
        softcap: args.softcap,
        sliding_window: args.sliding_window,
        out: s.tensor_mut(&mut args.out),
        lse: args.lse.as_mut().map(|lse| s.tensor_mut(lse)),
    };
    on_device(context, s, |stream| cache.attend(stream, args)).map(Staging::finish)
}
