//! The same random tokens compressed and dense, and one decode step over either.

use super::{Options, begin};
use half::f16;
use indicatif::ProgressBar;
use mustafar::ops::{self, Append, AppendSide, Attend, Compressed, Dense};
use mustafar::{
    Context, DType, Error, Mem, MemMut, PageFormat, PagePool, PagePoolMut, PoolLayout, Sequences, Shape,
    Stream, Tensor, TensorMut,
};

/// Tokens per page: the default of the library's cache.
const PAGE_TOKENS: usize = 64;
/// Tokens that one append call takes while the pages are filled.
const APPEND_TOKENS: usize = 1024;

/// K first, then V, wherever there are two.
pub(crate) struct Workload {
    batch: usize,
    layouts: [PoolLayout; 2],
    pages: [Aligned; 2],
    table: Vec<i32>,
    lens: Vec<i32>,
    dense: [Vec<f16>; 2],
    dense_shape: Shape,
    q: Vec<f16>,
    q_shape: Shape,
    out: Vec<f32>,
    workspace: Aligned,
}

impl Workload {
    pub(crate) fn new(context: &Context, options: &Options, bar: &ProgressBar) -> Result<Self, Error> {
        let &Options { batch, q_heads, kv_heads, head_dim, tokens, .. } = options;
        let num_pages = batch * tokens.div_ceil(PAGE_TOKENS);
        let layout = |keep| {
            let format = PageFormat::uniform(DType::F16, head_dim, PAGE_TOKENS, keep)?;
            PoolLayout::contiguous(format, num_pages, kv_heads)
        };
        let layouts = [layout(options.keep_k)?, layout(options.keep_v)?];
        let pool = |layout: &PoolLayout| Aligned::new(layout.extent("pages")?);
        // Heads outside tokens, so that each head streams its tokens one after the other.
        let dense_shape = Shape::heads_first(batch, kv_heads, tokens, head_dim)?;
        let side = || zeros(dense_shape.extent("dense tokens")?);
        let q_shape = Shape::contiguous(1, batch, q_heads, head_dim)?;
        let mut new = Self {
            batch,
            pages: [pool(&layouts[0])?, pool(&layouts[1])?],
            layouts,
            table: shuffled(num_pages),
            lens: vec![tokens as i32; batch],
            dense: [side()?, side()?],
            dense_shape,
            q: zeros(q_shape.extent("queries")?)?,
            q_shape,
            out: zeros(q_shape.extent("outputs")?)?,
            workspace: Aligned::new(0)?,
        };
        new.fill(bar);
        new.compress(context, bar)?;
        let mut out = std::mem::take(&mut new.out);
        let compressed = ops::attend_workspace(context, &new.compressed(&mut out)?)?;
        let dense = ops::attend_workspace(context, &new.window(&mut out)?)?;
        new.out = out;
        new.workspace = Aligned::new(compressed.max(dense))?;
        Ok(new)
    }

    fn fill(&mut self, bar: &ProgressBar) {
        bar.set_message("random K and V");
        begin(bar, self.dense.iter().map(|side| side.len() as u64).sum());
        let mut random = Random(1);
        self.q.iter_mut().for_each(|x| *x = random.element());
        for chunk in self.dense.iter_mut().flat_map(|side| side.chunks_mut(1 << 20)) {
            chunk.iter_mut().for_each(|x| *x = random.element());
            bar.inc(chunk.len() as u64);
        }
    }

    fn compress(&mut self, context: &Context, bar: &ProgressBar) -> Result<(), Error> {
        let tokens = self.dense_shape.tokens;
        bar.set_message("prune and compress");
        begin(bar, (self.batch * tokens) as u64);
        for b in 0..self.batch {
            for first in (0..tokens).step_by(APPEND_TOKENS) {
                let count = (tokens - first).min(APPEND_TOKENS);
                let slots: Vec<i64> = (first..first + count).map(|t| self.slot(b, t)).collect();
                let shape = Shape { batch: 1, tokens: count, ..self.dense_shape };
                self.append(context, &slots, shape, self.dense_shape.offset(b, first, 0))?;
                bar.inc(count as u64);
            }
        }
        Ok(())
    }

    /// Stores the last token of every sequence again: what a decode step without a dense window does.
    pub(crate) fn append_last(&mut self, context: &Context) -> Result<(), Error> {
        let last = self.dense_shape.tokens - 1;
        let slots: Vec<i64> = (0..self.batch).map(|b| self.slot(b, last)).collect();
        // One token per sequence: what is a batch in the dense tensors is a run of tokens here.
        let token_stride = self.dense_shape.batch_stride;
        let shape = Shape { batch: 1, tokens: self.batch, token_stride, ..self.dense_shape };
        self.append(context, &slots, shape, self.dense_shape.offset(0, last, 0))
    }

    fn slot(&self, b: usize, token: usize) -> i64 {
        let entry = b * self.dense_shape.tokens.div_ceil(PAGE_TOKENS) + token / PAGE_TOKENS;
        i64::from(self.table[entry]) * PAGE_TOKENS as i64 + (token % PAGE_TOKENS) as i64
    }

    /// Appends the dense rows of `shape` from element `at` on.
    fn append(&mut self, context: &Context, slots: &[i64], shape: Shape, at: usize) -> Result<(), Error> {
        let mut sides = self.pages.iter_mut().zip(&self.layouts).zip(&self.dense);
        let mut side = |name| {
            let Some(((pages, layout), dense)) = sides.next() else { return Ok(None) };
            let x = Tensor::new(name, Mem::host(&dense[at..]), DType::F16, shape)?;
            let pool = PagePoolMut::new(name, MemMut::host(pages.bytes_mut()), *layout)?;
            Ok::<_, Error>(Some(AppendSide { x, pool, weights: None, center: None }))
        };
        let (k, v) = (side("k")?, side("v")?);
        ops::append(context, Stream::NONE, Append { k, v, slots: Mem::host(slots), sequence: None })
    }

    pub(crate) fn attend_compressed(&mut self, context: &Context) -> Result<(), Error> {
        let (mut out, mut workspace) = self.take_outputs();
        let args = self.compressed(&mut out)?;
        ops::attend(context, Stream::NONE, args, MemMut::host(workspace.bytes_mut()))?;
        (self.out, self.workspace) = (out, workspace);
        Ok(())
    }

    pub(crate) fn attend_dense(&mut self, context: &Context) -> Result<(), Error> {
        let (mut out, mut workspace) = self.take_outputs();
        let args = self.window(&mut out)?;
        ops::attend(context, Stream::NONE, args, MemMut::host(workspace.bytes_mut()))?;
        (self.out, self.workspace) = (out, workspace);
        Ok(())
    }

    fn take_outputs(&mut self) -> (Vec<f32>, Aligned) {
        (std::mem::take(&mut self.out), std::mem::take(&mut self.workspace))
    }

    /// Attention over the pages.
    fn compressed<'a>(&'a self, out: &'a mut [f32]) -> Result<Attend<'a>, Error> {
        let pool = |i: usize| PagePool::new("pages", Mem::host(self.pages[i].bytes()), self.layouts[i]);
        let sequences = Sequences {
            batch: self.batch,
            table: Some(Mem::host(&self.table)),
            table_stride: self.dense_shape.tokens.div_ceil(PAGE_TOKENS),
            lens: Mem::host(&self.lens),
            lens_per_head: false,
            max_len: self.dense_shape.tokens,
        };
        let compressed = Compressed { k: pool(0)?, v: pool(1)?, sequences, k_center: None };
        Ok(Attend { compressed: Some(compressed), ..self.args(out)? })
    }

    /// Attention over the same tokens before they were pruned.
    fn window<'a>(&'a self, out: &'a mut [f32]) -> Result<Attend<'a>, Error> {
        let side = |i: usize| Tensor::new("dense", Mem::host(&self.dense[i]), DType::F16, self.dense_shape);
        let dense = Dense { k: side(0)?, v: side(1)?, lens: Mem::host(&self.lens), rows: None };
        Ok(Attend { window: Some(dense), ..self.args(out)? })
    }

    fn args<'a>(&'a self, out: &'a mut [f32]) -> Result<Attend<'a>, Error> {
        Ok(Attend {
            q: Tensor::new("q", Mem::host(&self.q), DType::F16, self.q_shape)?,
            batch: self.batch,
            q_indptr: None,
            max_q_len: 1,
            sinks: None,
            compressed: None,
            window: None,
            first: None,
            scale: None,
            softcap: None,
            sliding_window: None,
            split_tokens: None,
            out: TensorMut::new("out", MemMut::host(out), DType::F32, self.q_shape)?,
            lse: None,
        })
    }

    /// Bytes of the pages in use: bitmaps and kept values.
    pub(crate) fn compressed_bytes(&self) -> usize {
        let row = |layout: &PoolLayout| layout.format.page_bytes() / PAGE_TOKENS;
        let rows = self.batch * self.dense_shape.tokens * self.dense_shape.heads;
        self.layouts.iter().map(|layout| rows * row(layout)).sum()
    }

    /// Bytes of the dense keys and values.
    pub(crate) fn dense_bytes(&self) -> usize {
        self.dense.iter().map(|side| size_of_val(&side[..])).sum()
    }
}

/// Pages in random places, as an allocator leaves them after a while.
fn shuffled(pages: usize) -> Vec<i32> {
    let mut random = Random(7);
    let mut table: Vec<i32> = (0..pages as i32).collect();
    for i in (1..pages).rev() {
        table.swap(i, (random.next() % (i as u64 + 1)) as usize);
    }
    table
}

fn zeros<T: Default + Clone>(count: usize) -> Result<Vec<T>, Error> {
    let mut new = Vec::new();
    new.try_reserve_exact(count)
        .map_err(|_| Error::OutOfMemory { bytes: count.saturating_mul(size_of::<T>()) })?;
    new.resize(count, T::default());
    Ok(new)
}

/// Bytes on a 64-byte boundary.
#[derive(Default)]
struct Aligned {
    raw: Vec<u8>,
    start: usize,
    len: usize,
}

impl Aligned {
    fn new(len: usize) -> Result<Self, Error> {
        let raw: Vec<u8> = zeros(len.saturating_add(63))?;
        let start = raw.as_ptr().align_offset(64);
        Ok(Self { raw, start, len })
    }

    fn bytes(&self) -> &[u8] {
        &self.raw[self.start..self.start + self.len]
    }

    fn bytes_mut(&mut self) -> &mut [u8] {
        &mut self.raw[self.start..self.start + self.len]
    }
}

/// splitmix64.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        z ^ (z >> 31)
    }

    /// About normal: the sum of four uniform numbers, variance 1.
    fn element(&mut self) -> f16 {
        let bits = self.next();
        let sum: f32 = (0..4).map(|i| f32::from((bits >> (16 * i)) as u16) / 65536.0).sum();
        f16::from_f32((sum - 2.0) * 3f32.sqrt())
    }
}
