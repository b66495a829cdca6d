//! The same random tokens compressed and dense, and one decode step over either.

use super::begin;
use super::memory::Buffer;
use half::{bf16, f16};
use indicatif::ProgressBar;
use mustafar::ops::{self, Append, AppendSide, Attend, Compressed, Dense};
use mustafar::{
    Context, DType, Error, PageFormat, PagePool, PagePoolMut, PoolLayout, Sequences, Shape, Stream, Tensor,
    TensorMut, ValueType,
};

/// Tokens per page: the default of the library's cache.
const PAGE_TOKENS: usize = 64;
/// Tokens that one append call takes while the pages are filled.
const APPEND_TOKENS: usize = 1024;

/// How much there is of what.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Size {
    pub(crate) batch: usize,
    pub(crate) q_heads: usize,
    pub(crate) kv_heads: usize,
    pub(crate) head_dim: usize,
    /// Of each sequence.
    pub(crate) tokens: usize,
    pub(crate) keep_k: usize,
    pub(crate) keep_v: usize,
    /// Of K, V and queries.
    pub(crate) dtype: DType,
    /// What pages store.
    pub(crate) values: ValueType,
}

impl Size {
    /// Pages that keep so many values of a row.
    pub(crate) fn format(&self, keep: usize) -> Result<PageFormat, Error> {
        PageFormat::uniform(self.values, self.head_dim, PAGE_TOKENS, keep)
    }
}

/// K first, then V, wherever there are two.
pub(crate) struct Workload {
    context: Context,
    stream: Stream,
    batch: usize,
    dtype: DType,
    layouts: [PoolLayout; 2],
    pages: [Buffer; 2],
    table: Buffer,
    lens: Buffer,
    /// Slot of the last token of each sequence.
    last_slots: Buffer,
    dense: [Buffer; 2],
    dense_shape: Shape,
    q: Buffer,
    q_shape: Shape,
    out: Buffer,
    workspace: Buffer,
}

impl Workload {
    /// Makes the tokens and compresses them. All ops are submitted to `stream`.
    pub(crate) fn new(
        context: &Context,
        stream: Stream,
        size: &Size,
        bar: &ProgressBar,
    ) -> Result<Self, Error> {
        let &Size { batch, q_heads, kv_heads, head_dim, tokens, keep_k, keep_v, dtype, .. } = size;
        let sequence_pages = tokens.div_ceil(PAGE_TOKENS);
        let num_pages = batch * sequence_pages;
        let layout = |keep| PoolLayout::contiguous(size.format(keep)?, num_pages, kv_heads);
        let layouts = [layout(keep_k)?, layout(keep_v)?];
        let pool = |layout: &PoolLayout| Buffer::zeroed(context, layout.extent("pages")?);
        // Heads outside tokens, so that each head streams its tokens one after the other.
        let dense_shape = Shape::heads_first(batch, kv_heads, tokens, head_dim)?;
        let side = || Buffer::zeroed(context, dense_shape.extent("dense tokens")? * dtype.bytes());
        let q_shape = Shape::contiguous(1, batch, q_heads, head_dim)?;
        let table = shuffled(num_pages);
        let slot = |b: usize, t: usize| {
            let page = table[b * sequence_pages + t / PAGE_TOKENS];
            i64::from(page) * PAGE_TOKENS as i64 + (t % PAGE_TOKENS) as i64
        };
        let slots: Vec<i64> = (0..batch * tokens).map(|i| slot(i / tokens, i % tokens)).collect();
        let last_slots: Vec<i64> = (0..batch).map(|b| slot(b, tokens - 1)).collect();
        let mut new = Self {
            context: context.clone(),
            stream,
            batch,
            dtype,
            pages: [pool(&layouts[0])?, pool(&layouts[1])?],
            layouts,
            table: Buffer::holding(context, &table)?,
            lens: Buffer::holding(context, &vec![tokens as i32; batch])?,
            last_slots: Buffer::holding(context, &last_slots)?,
            dense: [side()?, side()?],
            dense_shape,
            q: Buffer::zeroed(context, q_shape.extent("queries")? * dtype.bytes())?,
            q_shape,
            out: Buffer::zeroed(context, q_shape.extent("outputs")? * DType::F32.bytes())?,
            workspace: Buffer::default(),
        };
        new.fill(bar)?;
        new.compress(&Buffer::holding(context, &slots)?, bar)?;
        let mut out = std::mem::take(&mut new.out);
        let compressed = ops::attend_workspace(context, &new.compressed(&mut out)?)?;
        let dense = ops::attend_workspace(context, &new.window(&mut out)?)?;
        new.out = out;
        new.workspace = Buffer::zeroed(context, compressed.max(dense))?;
        Ok(new)
    }

    fn fill(&mut self, bar: &ProgressBar) -> Result<(), Error> {
        bar.set_message("random K and V");
        begin(bar, self.dense_bytes() as u64);
        let mut random = Random(1);
        for buffer in [&mut self.q].into_iter().chain(&mut self.dense) {
            let mut at = 0;
            while at < buffer.bytes() {
                let count = ((buffer.bytes() - at) / 2).min(1 << 20);
                let chunk: Vec<u16> = (0..count).map(|_| random.element(self.dtype)).collect();
                buffer.write(at, &chunk)?;
                at += 2 * count;
                bar.inc(2 * count as u64);
            }
        }
        Ok(())
    }

    /// `slots` has one slot for every token, i64 `[batch, tokens]`.
    fn compress(&mut self, slots: &Buffer, bar: &ProgressBar) -> Result<(), Error> {
        let tokens = self.dense_shape.tokens;
        bar.set_message("prune and compress");
        begin(bar, (self.batch * tokens) as u64);
        for b in 0..self.batch {
            for first in (0..tokens).step_by(APPEND_TOKENS) {
                let count = (tokens - first).min(APPEND_TOKENS);
                let shape = Shape { batch: 1, tokens: count, ..self.dense_shape };
                let at = (b * tokens + first) * size_of::<i64>();
                self.append(slots, at, shape, self.dense_shape.offset(b, first, 0))?;
                bar.inc(count as u64);
            }
        }
        Ok(())
    }

    /// Stores the last token of every sequence again: what a decode step without a dense window does.
    pub(crate) fn append_last(&mut self) -> Result<(), Error> {
        let last = self.dense_shape.tokens - 1;
        // One token per sequence: what is a batch in the dense tensors is a run of tokens here.
        let token_stride = self.dense_shape.batch_stride;
        let shape = Shape { batch: 1, tokens: self.batch, token_stride, ..self.dense_shape };
        let slots = std::mem::take(&mut self.last_slots);
        self.append(&slots, 0, shape, self.dense_shape.offset(0, last, 0))?;
        self.last_slots = slots;
        Ok(())
    }

    /// Appends the dense rows of `shape` from element `at` on, to the slots from byte `first_slot` on.
    fn append(&mut self, slots: &Buffer, first_slot: usize, shape: Shape, at: usize) -> Result<(), Error> {
        let mut sides = self.pages.iter_mut().zip(&self.layouts).zip(&self.dense);
        let mut side = |name| {
            let Some(((pages, layout), dense)) = sides.next() else { return Ok(None) };
            let x = dense.mem().skip(name, at * self.dtype.bytes())?;
            let x = Tensor::new(name, x, self.dtype, shape)?;
            let pool = PagePoolMut::new(name, pages.mem_mut(), *layout)?;
            Ok::<_, Error>(Some(AppendSide { x, pool, weights: None, center: None }))
        };
        let (k, v) = (side("k")?, side("v")?);
        let slots = slots.mem().skip("slots", first_slot)?;
        ops::append(&self.context, self.stream, Append { k, v, slots, sequence: None })
    }

    pub(crate) fn attend_compressed(&mut self) -> Result<(), Error> {
        let (mut out, mut workspace) = self.take_outputs();
        let args = self.compressed(&mut out)?;
        ops::attend(&self.context, self.stream, args, workspace.mem_mut())?;
        (self.out, self.workspace) = (out, workspace);
        Ok(())
    }

    pub(crate) fn attend_dense(&mut self) -> Result<(), Error> {
        let (mut out, mut workspace) = self.take_outputs();
        let args = self.window(&mut out)?;
        ops::attend(&self.context, self.stream, args, workspace.mem_mut())?;
        (self.out, self.workspace) = (out, workspace);
        Ok(())
    }

    fn take_outputs(&mut self) -> (Buffer, Buffer) {
        (std::mem::take(&mut self.out), std::mem::take(&mut self.workspace))
    }

    /// Attention over the pages.
    fn compressed<'a>(&'a self, out: &'a mut Buffer) -> Result<Attend<'a>, Error> {
        let pool = |i: usize| PagePool::new("pages", self.pages[i].mem(), self.layouts[i]);
        let sequences = Sequences {
            batch: self.batch,
            table: Some(self.table.mem()),
            table_stride: self.dense_shape.tokens.div_ceil(PAGE_TOKENS),
            lens: self.lens.mem(),
            lens_per_head: false,
            max_len: self.dense_shape.tokens,
        };
        let compressed = Compressed { k: pool(0)?, v: pool(1)?, sequences, k_center: None };
        Ok(Attend { compressed: Some(compressed), ..self.args(out)? })
    }

    /// Attention over the same tokens before they were pruned.
    fn window<'a>(&'a self, out: &'a mut Buffer) -> Result<Attend<'a>, Error> {
        let side = |i: usize| Tensor::new("dense", self.dense[i].mem(), self.dtype, self.dense_shape);
        let dense = Dense { k: side(0)?, v: side(1)?, lens: self.lens.mem(), rows: None };
        Ok(Attend { window: Some(dense), ..self.args(out)? })
    }

    fn args<'a>(&'a self, out: &'a mut Buffer) -> Result<Attend<'a>, Error> {
        Ok(Attend {
            q: Tensor::new("q", self.q.mem(), self.dtype, self.q_shape)?,
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
            out: TensorMut::new("out", out.mem_mut(), DType::F32, self.q_shape)?,
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
        self.dense.iter().map(Buffer::bytes).sum()
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
    fn element(&mut self, dtype: DType) -> u16 {
        let bits = self.next();
        let sum: f32 = (0..4).map(|i| f32::from((bits >> (16 * i)) as u16) / 65536.0).sum();
        let x = (sum - 2.0) * 3f32.sqrt();
        match dtype {
            DType::Bf16 => bf16::from_f32(x).to_bits(),
            _ => f16::from_f32(x).to_bits(),
        }
    }
}
