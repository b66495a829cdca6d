//! Pools, block tables and the reference rows behind them.

use super::bytes::POISON;
use super::{Bytes, Dist, Rng};
use mustafar::reference::{self, Row};
use mustafar::{
    DType, Mem, MemMut, PageFormat, PagePool, PagePoolMut, PoolLayout, Rows, Sequences, ValueType,
};

/// A pool that owns its memory; all poison at first.
#[derive(Debug, Clone)]
pub struct Pool {
    pub bytes: Bytes,
    pub layout: PoolLayout,
}

impl Pool {
    /// Pages back to back.
    pub fn contiguous(format: PageFormat, num_pages: usize, kv_heads: usize) -> Self {
        Self::with(PoolLayout::contiguous(format, num_pages, kv_heads).unwrap())
    }

    /// All pages of a head together, and gaps: 16 bytes after every page, 48 after every head.
    pub fn gaps(format: PageFormat, num_pages: usize, kv_heads: usize) -> Self {
        let page_stride = format.page_bytes() + 16;
        let head_stride = num_pages * page_stride + 48;
        Self::with(PoolLayout { format, num_pages, kv_heads, page_stride, head_stride })
    }

    pub fn with(layout: PoolLayout) -> Self {
        Self { bytes: Bytes::poisoned(layout.extent("test pool").unwrap()), layout }
    }

    pub fn page(&self, page: usize, head: usize) -> &[u8] {
        &self.bytes[self.layout.offset(page, head)..][..self.layout.format.page_bytes()]
    }

    pub fn page_mut(&mut self, page: usize, head: usize) -> &mut [u8] {
        let start = self.layout.offset(page, head);
        &mut self.bytes[start..start + self.layout.format.page_bytes()]
    }

    /// Fails if anything between the pages was written.
    pub fn assert_gaps_untouched(&self) {
        let mut inside = vec![false; self.bytes.len()];
        for page in 0..self.layout.num_pages {
            for head in 0..self.layout.kv_heads {
                inside[self.layout.offset(page, head)..][..self.layout.format.page_bytes()].fill(true);
            }
        }
        let touched = inside.iter().zip(self.bytes.iter()).position(|(inside, &x)| !inside && x != POISON);
        assert_eq!(touched, None, "byte between the pages of the pool was written");
    }

    pub fn view(&self) -> PagePool<'_> {
        PagePool::new("test pool", Mem::host(&self.bytes[..]), self.layout).unwrap()
    }

    pub fn view_mut(&mut self) -> PagePoolMut<'_> {
        PagePoolMut::new("test pool", MemMut::host(&mut self.bytes[..]), self.layout).unwrap()
    }
}

/// Which pages hold which tokens: shuffled, with spare pages that belong to no one, and table tails that point
/// nowhere.
#[derive(Debug, Clone)]
pub struct Table {
    pub page_tokens: usize,
    pub num_pages: usize,
    pub entries: Vec<i32>,
    pub stride: usize,
    /// `[batch]`, or `[batch, kv_heads]` when `per_head` is given.
    pub lens: Vec<i32>,
    pub per_head: Option<usize>,
    pub max_len: usize,
}

impl Table {
    /// One length per sequence. `spare` pages stay unused; `max_len` exceeds the longest by a few tokens.
    pub fn shuffled(rng: &mut Rng, page_tokens: usize, lens: &[usize], spare: usize) -> Self {
        let max_len = lens.iter().max().map_or(0, |&n| n + 3);
        let stride = max_len.div_ceil(page_tokens) + 2;
        let used: usize = lens.iter().map(|n| n.div_ceil(page_tokens)).sum();
        let mut pages: Vec<i32> = (0..(used + spare) as i32).collect();
        rng.shuffle(&mut pages);
        let mut entries = vec![i32::MIN; lens.len() * stride];
        let mut free = pages.into_iter();
        for (b, n) in lens.iter().enumerate() {
            for i in 0..n.div_ceil(page_tokens) {
                entries[b * stride + i] = free.next().unwrap();
            }
        }
        let lens = lens.iter().map(|&n| n as i32).collect();
        Self { page_tokens, num_pages: used + spare, entries, stride, lens, per_head: None, max_len }
    }

    /// Shortens each head of each sequence to a random length of its own, at least one of them unshortened.
    pub fn with_head_lengths(mut self, rng: &mut Rng, kv_heads: usize) -> Self {
        let full = rng.below(kv_heads);
        let shorten = |(n, h): (i32, usize)| if h == full { n } else { rng.below(n as usize + 1) as i32 };
        let of_all = self.lens.iter().flat_map(|&n| (0..kv_heads).map(move |h| (n, h)));
        self.lens = of_all.map(shorten).collect();
        self.per_head = Some(kv_heads);
        self
    }

    pub fn batch(&self) -> usize {
        self.lens.len() / self.per_head.unwrap_or(1)
    }

    /// Compressed tokens of a head of a sequence.
    pub fn len(&self, b: usize, head: usize) -> usize {
        self.lens[self.per_head.map_or(b, |heads| b * heads + head)] as usize
    }

    /// Page of token `t` of sequence `b`.
    pub fn page(&self, b: usize, t: usize) -> usize {
        self.entries[b * self.stride + t / self.page_tokens] as usize
    }

    /// Slot of token `t` of sequence `b`, as `append` takes it.
    pub fn slot(&self, b: usize, t: usize) -> i64 {
        (self.page(b, t) * self.page_tokens + t % self.page_tokens) as i64
    }

    pub fn view(&self) -> Sequences<'_> {
        Sequences {
            batch: self.batch(),
            table: Some(Mem::host(&self.entries)),
            table_stride: self.stride,
            lens: Mem::host(&self.lens),
            lens_per_head: self.per_head.is_some(),
            max_len: self.max_len,
        }
    }
}

/// Compressed tokens of a batch as the reference stores them: the pool and the rows in it.
#[derive(Debug, Clone)]
pub struct Paged {
    pub pool: Pool,
    /// `rows[b][head][token]`.
    pub rows: Vec<Vec<Vec<Row>>>,
}

impl Paged {
    /// Random rows for every token of `table`: pruned by magnitude in uniform pages, by arbitrary masks (empty and
    /// full rows among them) in ragged ones. Everything no token owns is poison.
    pub fn random(rng: &mut Rng, dist: Dist, mut pool: Pool, table: &Table) -> Self {
        let format = pool.layout.format;
        let mut rows = Vec::new();
        for b in 0..table.batch() {
            let mut heads = Vec::new();
            for h in 0..pool.layout.kv_heads {
                let tokens: Vec<Row> = (0..table.len(b, h)).map(|_| Self::row(rng, dist, format)).collect();
                for (i, of_page) in tokens.chunks(format.page_tokens()).enumerate() {
                    let page = pool.page_mut(table.page(b, i * format.page_tokens()), h);
                    page.copy_from_slice(&reference::page(&format, of_page, POISON).expect("rows fit"));
                    poison_unused_rows(format, page, of_page.len());
                }
                heads.push(tokens);
            }
            rows.push(heads);
        }
        Self { pool, rows }
    }

    fn row(rng: &mut Rng, dist: Dist, format: PageFormat) -> Row {
        let (values, dim) = (format.value_type(), format.head_dim());
        let dtype = source_dtype(rng, values);
        let bits = rng.row(dist, dtype, dim);
        let pruned = match format.rows() {
            Rows::Uniform { keep } => reference::prune_token(dtype, &bits, keep, None),
            Rows::Ragged { capacity } => {
                // Counts differ but never exceed an even share, so every page fits.
                let most = capacity / format.page_tokens();
                let kept = if rng.chance(0.2) { most } else { rng.below(most + 1) };
                let mut mask = vec![false; dim];
                mask[..kept].fill(true);
                rng.shuffle(&mut mask);
                Row::new(mask, &bits)
            }
        };
        pruned.stored(dtype, values)
    }
}

/// A type of tensors that pages of these values are made from.
pub fn source_dtype(rng: &mut Rng, values: ValueType) -> DType {
    values.dtype().unwrap_or_else(|| *rng.pick(&super::DTYPES))
}

/// Copies a row of one uniform page to another page of the format.
pub fn copy_row(format: PageFormat, (from, from_row): (&[u8], usize), (to, to_row): (&mut [u8], usize)) {
    let values = (format.values_offset(), format.keep().unwrap() * format.value_type().bytes());
    let scales = format.scales_offset().map(|at| (at, 2));
    for (start, bytes) in [(0, format.bitmap_row_bytes()), values].into_iter().chain(scales) {
        to[start + to_row * bytes..][..bytes].copy_from_slice(&from[start + from_row * bytes..][..bytes]);
    }
}

/// Readers must not look at rows past the last token: neither their bitmaps nor, in a ragged page, their offsets.
fn poison_unused_rows(format: PageFormat, page: &mut [u8], used: usize) {
    let row_bytes = format.bitmap_row_bytes();
    page[used * row_bytes..format.bitmap_bytes()].fill(POISON);
    if let Some(scales) = format.scales_offset() {
        page[scales + 2 * used..format.values_offset()].fill(POISON);
    }
    if let Some(offsets) = format.offsets_offset() {
        let end = format.scales_offset().unwrap_or(format.values_offset());
        page[offsets + 2 * (used + 1)..end].fill(POISON);
    }
}
