//! One decode step on the device: append a token to every sequence, then attend over all of them. Bounds are always the
//! same; lengths, tables and everything stored come from a [`State`].

use crate::common::device::{DeviceCopy, TestStream};
use crate::common::{Dense, Dist, Layout, Paged, Pool, Rng, Table, Tolerance, assert_close, attention};
use mustafar::ops::{self, Append, AppendSide, Attend, Compressed, Decompress};
use mustafar::reference::{self, Scoring, Token};
use mustafar::{
    Context, DType, Mem, PageFormat, PagePool, PagePoolMut, PoolLayout, Sequences, Shape, Stream, Tensor,
    TensorMut, ValueType,
};

pub const BATCH: usize = 3;
pub const MAX_LEN: usize = 700;
const MAX_WINDOW: usize = 20;
const Q_HEADS: usize = 8;
const KV_HEADS: usize = 2;
const DIM: usize = 128;
const PAGE_TOKENS: usize = 64;
const KEEP: usize = 39;
const SEQUENCE_PAGES: usize = MAX_LEN.div_ceil(PAGE_TOKENS);
const NUM_PAGES: usize = BATCH * SEQUENCE_PAGES + 1;

fn format() -> PageFormat {
    PageFormat::uniform(ValueType::F16, DIM, PAGE_TOKENS, KEEP).unwrap()
}

/// What the device arrays hold before the step.
pub struct State {
    table: Table,
    k: Paged,
    v: Paged,
    /// The token that is appended to each sequence, K and V.
    new: [Dense; 2],
    window: [Dense; 2],
    window_lens: Vec<i32>,
    q: Dense,
}

impl State {
    /// `lens` count the token that the step appends; a sequence of length 0 gets none.
    pub fn random(seed: u64, lens: [usize; BATCH]) -> Self {
        let rng = &mut Rng::new(seed);
        let table = table(rng, lens);
        let mut paged =
            || Paged::random(rng, Dist::Normal, Pool::contiguous(format(), NUM_PAGES, KV_HEADS), &table);
        let (k, v) = (paged(), paged());
        let mut rows = |batch, tokens, heads| {
            let shape = Layout::TokensFirst.shape(batch, tokens, heads, DIM);
            Dense::random(rng, Dist::Normal, DType::F16, shape).coarse()
        };
        let new = [rows(1, BATCH, KV_HEADS), rows(1, BATCH, KV_HEADS)];
        let window = [rows(BATCH, MAX_WINDOW, KV_HEADS), rows(BATCH, MAX_WINDOW, KV_HEADS)];
        let q = rows(1, BATCH, Q_HEADS);
        let window_lens = (0..BATCH).map(|_| rng.below(MAX_WINDOW + 1) as i32).collect();
        Self { table, k, v, new, window, window_lens, q }
    }

    fn slots(&self) -> Vec<i64> {
        let last = |b| self.table.len(b, 0).checked_sub(1);
        (0..BATCH).map(|b| last(b).map_or(-1, |t| self.table.slot(b, t))).collect()
    }

    /// Keys and values of a KV head after the step.
    fn tokens(&self, b: usize, h: usize) -> Vec<Token> {
        let appended =
            |side: usize| reference::prune_token(DType::F16, &self.new[side].row_bits(0, b, h), KEEP, None);
        let stored = |paged: &Paged, side: usize| -> Vec<Vec<f64>> {
            let mut rows = paged.rows[b][h].clone();
            if let Some(last) = rows.last_mut() {
                *last = appended(side);
            }
            rows.iter().map(|row| row.dense(ValueType::F16, None)).collect()
        };
        let window = (0..self.window_lens[b] as usize)
            .map(|t| Token { k: self.window[0].row(b, t, h), v: self.window[1].row(b, t, h) });
        let pages = stored(&self.k, 0).into_iter().zip(stored(&self.v, 1)).map(|(k, v)| Token { k, v });
        pages.chain(window).collect()
    }

    /// Compares what came out with the float64 reference.
    pub fn check(&self, results: &Results) {
        let tokens: Vec<Vec<Vec<Token>>> =
            (0..BATCH).map(|b| (0..KV_HEADS).map(|h| self.tokens(b, h)).collect()).collect();
        let indptr: Vec<usize> = (0..=BATCH).collect();
        let scoring = vec![Scoring::new(DIM); BATCH];
        let expected = attention(&self.q, &indptr, &tokens, DIM, &scoring);
        for (i, (out, lse)) in expected.iter().enumerate() {
            let (t, h) = (i / Q_HEADS, i % Q_HEADS);
            let near = |scale| Tolerance::on_cuda(DType::F16, DType::F32, scale);
            assert_close(&format!("sequence {t}, head {h}"), &results.out.row(0, t, h), out, near(4.0));
            let scale = if lse.is_finite() { 1.0 + lse.abs() } else { 1.0 };
            assert_close(&format!("lse {t}, head {h}"), &results.lse.row(0, t, h), &[*lse], near(scale));
        }
        for (b, heads) in tokens.iter().enumerate() {
            let len = self.table.len(b, 0);
            for (t, h) in (0..len).flat_map(|t| (0..KV_HEADS).map(move |h| (t, h))) {
                assert_eq!(results.keys.row(b, t, h), heads[h][t].k, "key {t} of sequence {b}, head {h}");
            }
        }
    }
}

/// Any pages of the pool for each sequence; entries past the last one point nowhere.
fn table(rng: &mut Rng, lens: [usize; BATCH]) -> Table {
    let mut pages: Vec<i32> = (0..NUM_PAGES as i32).collect();
    rng.shuffle(&mut pages);
    let mut entries = vec![i32::MIN; BATCH * SEQUENCE_PAGES];
    for (b, len) in lens.iter().enumerate() {
        let used = &mut entries[b * SEQUENCE_PAGES..][..len.div_ceil(PAGE_TOKENS)];
        used.iter_mut().for_each(|entry| *entry = pages.pop().unwrap());
    }
    Table {
        page_tokens: PAGE_TOKENS,
        num_pages: NUM_PAGES,
        entries,
        stride: SEQUENCE_PAGES,
        lens: lens.map(|n| n as i32).to_vec(),
        per_head: None,
        max_len: MAX_LEN,
    }
}

/// Where things lie on the device.
#[derive(Clone, Copy)]
pub struct Place {
    /// Bytes from page to page; `None`: back to back.
    pub page_stride: Option<usize>,
    /// Elements between tokens of new tokens, queries and outputs, and between rows of the window and of decompressed
    /// keys; `None`: back to back.
    pub stride: Option<usize>,
}

pub const PACKED: Place = Place { page_stride: None, stride: None };

/// A tensor on the device.
struct OnDevice {
    memory: DeviceCopy,
    dtype: DType,
    shape: Shape,
}

impl OnDevice {
    fn poisoned(dtype: DType, shape: Shape) -> Self {
        let memory = DeviceCopy::poisoned(shape.extent("test tensor").unwrap() * dtype.bytes());
        Self { memory, dtype, shape }
    }

    fn rows(&self, host: &Dense) -> impl Iterator<Item = (usize, std::ops::Range<usize>)> {
        let (dtype, shape, host_shape) = (self.dtype, self.shape, host.shape);
        host.indices().into_iter().map(move |(b, t, h)| {
            let from = host_shape.offset(b, t, h) * dtype.bytes();
            (shape.offset(b, t, h) * dtype.bytes(), from..from + shape.dim * dtype.bytes())
        })
    }

    fn load(&self, host: &Dense) {
        self.rows(host).for_each(|(at, range)| self.memory.write_at(at, &host.bytes[range]));
    }

    /// The tensor back to back, on the host.
    fn read(&self) -> Dense {
        let Shape { batch, tokens, heads, dim, .. } = self.shape;
        let mut host = Dense::poisoned(self.dtype, Layout::TokensFirst.shape(batch, tokens, heads, dim));
        for (at, range) in self.rows(&host).collect::<Vec<_>>() {
            self.memory.read_at(at, &mut host.bytes[range]);
        }
        host
    }

    fn view(&self) -> Tensor<'static> {
        Tensor::new("test tensor", self.memory.mem(), self.dtype, self.shape).unwrap()
    }

    fn view_mut(&self) -> TensorMut<'static> {
        TensorMut::new("test tensor", self.memory.mem_mut(), self.dtype, self.shape).unwrap()
    }
}

/// Everything that the step reads and writes, in device memory.
pub struct Step {
    layout: PoolLayout,
    pools: [DeviceCopy; 2],
    table: DeviceCopy,
    lens: DeviceCopy,
    slots: DeviceCopy,
    window_lens: DeviceCopy,
    new: [OnDevice; 2],
    window: [OnDevice; 2],
    q: OnDevice,
    out: OnDevice,
    lse: OnDevice,
    keys: OnDevice,
    pub workspace: DeviceCopy,
}

/// Outputs of a step, and the keys that are stored after it.
#[derive(Debug)]
pub struct Results {
    pub out: Dense,
    pub lse: Dense,
    pub keys: Dense,
}

impl Results {
    pub fn same_bits(&self, other: &Self) -> bool {
        let all = |r: &Self| [r.out.bytes.to_vec(), r.lse.bytes.to_vec(), r.keys.bytes.to_vec()];
        all(self) == all(other)
    }
}

impl Step {
    pub fn new(context: &Context, state: &State, place: Place) -> Self {
        let packed = PoolLayout::contiguous(format(), NUM_PAGES, KV_HEADS).unwrap();
        let layout = match place.page_stride {
            None => packed,
            // Heads half a stride apart.
            Some(stride) => PoolLayout { page_stride: stride, head_stride: stride / 32 * 16, ..packed },
        };
        let pool = || DeviceCopy::poisoned(layout.extent("test pool").unwrap());
        let tokens = |dtype, heads, dim| {
            let shape = Layout::TokensFirst.shape(1, BATCH, heads, dim);
            let token_stride = place.stride.unwrap_or(shape.token_stride);
            OnDevice::poisoned(dtype, Shape { token_stride, batch_stride: 0, ..shape })
        };
        let rows = |tokens| {
            let shape = Layout::TokensFirst.shape(BATCH, tokens, KV_HEADS, DIM);
            let batch_stride = place.stride.unwrap_or(shape.batch_stride);
            OnDevice::poisoned(DType::F16, Shape { batch_stride, ..shape })
        };
        let mut new = Self {
            layout,
            pools: [pool(), pool()],
            table: DeviceCopy::poisoned(BATCH * SEQUENCE_PAGES * 4),
            lens: DeviceCopy::poisoned(BATCH * 4),
            slots: DeviceCopy::poisoned(BATCH * 8),
            window_lens: DeviceCopy::poisoned(BATCH * 4),
            new: [tokens(DType::F16, KV_HEADS, DIM), tokens(DType::F16, KV_HEADS, DIM)],
            window: [rows(MAX_WINDOW), rows(MAX_WINDOW)],
            q: tokens(DType::F16, Q_HEADS, DIM),
            out: tokens(DType::F32, Q_HEADS, DIM),
            lse: tokens(DType::F32, Q_HEADS, 1),
            keys: rows(MAX_LEN),
            workspace: DeviceCopy::poisoned(0),
        };
        new.workspace = DeviceCopy::poisoned(ops::attend_workspace(context, &new.attend()).unwrap());
        new.load(state);
        new
    }

    /// Replaces what the inputs hold.
    pub fn load(&self, state: &State) {
        for (device, host) in self.pools.iter().zip([&state.k.pool, &state.v.pool]) {
            for (page, h) in (0..NUM_PAGES).flat_map(|page| (0..KV_HEADS).map(move |h| (page, h))) {
                device.write_at(self.layout.offset(page, h), host.page(page, h));
            }
        }
        let int32 = |x: &[i32]| x.iter().flat_map(|x| x.to_le_bytes()).collect::<Vec<u8>>();
        self.table.write_at(0, &int32(&state.table.entries));
        self.lens.write_at(0, &int32(&state.table.lens));
        self.window_lens.write_at(0, &int32(&state.window_lens));
        let slots: Vec<u8> = state.slots().iter().flat_map(|x| x.to_le_bytes()).collect();
        self.slots.write_at(0, &slots);
        let tensors = self.new.iter().chain(&self.window).chain([&self.q]);
        let hosts = state.new.iter().chain(&state.window).chain([&state.q]);
        tensors.zip(hosts).for_each(|(device, host)| device.load(host));
    }

    fn sequences(&self) -> Sequences<'static> {
        Sequences {
            batch: BATCH,
            table: Some(self.table.mem()),
            table_stride: SEQUENCE_PAGES,
            lens: self.lens.mem(),
            lens_per_head: false,
            max_len: MAX_LEN,
        }
    }

    fn pool(&self, side: usize) -> PagePool<'static> {
        PagePool::new("test pool", self.pools[side].mem(), self.layout).unwrap()
    }

    pub fn append(&self) -> Append<'static> {
        let side = |i: usize| AppendSide {
            x: self.new[i].view(),
            pool: PagePoolMut::new("test pool", self.pools[i].mem_mut(), self.layout).unwrap(),
            weights: None,
            center: None,
        };
        Append { k: Some(side(0)), v: Some(side(1)), slots: self.slots.mem(), sequence: None }
    }

    pub fn attend(&self) -> Attend<'static> {
        let compressed =
            Compressed { k: self.pool(0), v: self.pool(1), sequences: self.sequences(), k_center: None };
        Attend {
            q: self.q.view(),
            batch: BATCH,
            q_indptr: None,
            max_q_len: 1,
            sinks: None,
            compressed: Some(compressed),
            window: Some(ops::Dense {
                k: self.window[0].view(),
                v: self.window[1].view(),
                lens: self.window_lens.mem(),
                rows: None,
            }),
            first: None,
            scale: None,
            softcap: None,
            sliding_window: None,
            split_tokens: None,
            out: self.out.view_mut(),
            lse: Some(self.lse.view_mut()),
        }
    }

    pub fn decompress(&self) -> Decompress<'static> {
        Decompress {
            pool: self.pool(0),
            sequences: self.sequences(),
            center: None,
            out: self.keys.view_mut(),
        }
    }

    /// Submits the whole step, and `decompress` of the keys after it.
    pub fn submit(&self, context: &Context, stream: Stream) {
        ops::append(context, stream, self.append()).unwrap();
        ops::attend(context, stream, self.attend(), self.workspace.mem_mut()).unwrap();
        ops::decompress(context, stream, self.decompress()).unwrap();
    }

    /// Poisons outputs and workspace.
    pub fn poison(&self) {
        [&self.out, &self.lse, &self.keys].into_iter().for_each(|x| x.memory.poison());
        self.workspace.poison();
    }

    pub fn key_pages(&self) -> Vec<u8> {
        self.pools[0].read()
    }

    pub fn results(&self) -> Results {
        Results { out: self.out.read(), lse: self.lse.read(), keys: self.keys.read() }
    }

    /// Nothing has been written to outputs.
    pub fn is_untouched(&self) -> bool {
        let untouched = |x: &OnDevice| {
            let x = x.read();
            x.indices().into_iter().all(|(b, t, h)| x.is_poisoned(b, t, h))
        };
        [&self.out, &self.lse, &self.keys].into_iter().all(untouched)
    }
}

/// The step by itself, on a stream of its own.
pub fn alone(context: &Context, state: &State, place: Place) -> Results {
    let (step, stream) = (Step::new(context, state, place), TestStream::new());
    step.submit(context, stream.stream());
    stream.synchronize();
    assert!(context.take_device_errors().unwrap().is_empty());
    step.results()
}

/// A view that claims to be device memory.
pub fn mem_at(address: u64, bytes: usize) -> Mem<'static> {
    // SAFETY: for calls that refuse it; nothing is read.
    unsafe { Mem::from_raw(address, bytes, mustafar::Place::Device) }
}
