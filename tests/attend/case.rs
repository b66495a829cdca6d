//! A batch for `attend` with everything around it poisoned, and what the reference says about it.

use crate::common::{Dense, Dist, Layout, Paged, Pool, Rng, Table, attention, coarse, mem, run};
use mustafar::ops::{self, Attend, Center, Compressed};
use mustafar::reference::{Scoring, Token};
use mustafar::{Context, DType, Error, Mem, PageFormat, Rows, Sequences, ValueType};

/// Where the pages of a sequence are found.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Pages {
    Table,
    Contiguous,
    /// Table, with another length for each KV head.
    PerHead,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Centre {
    Off,
    Shared,
    PerSequence,
}

/// What a batch looks like; contents come from `seed`.
#[derive(Debug, Clone)]
pub struct Spec {
    pub seed: u64,
    pub heads: (usize, usize),
    pub k: PageFormat,
    pub v: PageFormat,
    pub q: DType,
    pub out: DType,
    /// Dtypes of dense K and V.
    pub dense: (DType, DType),
    pub layout: Layout,
    pub dist: Dist,
    /// Query tokens of each sequence; equal ones go without `q_indptr`.
    pub queries: Vec<usize>,
    pub sinks: Option<Vec<usize>>,
    pub compressed: Option<(Vec<usize>, Pages)>,
    pub window: Option<Vec<usize>>,
    /// Whether dense tokens lie in rows of another order.
    pub shuffled_rows: bool,
    pub first: Option<Vec<usize>>,
    pub centre: Centre,
    pub scale: Option<f32>,
    pub softcap: Option<f32>,
    pub sliding_window: Option<usize>,
    pub split_tokens: Option<usize>,
    /// Queries and dense tokens that any of the types can hold.
    pub coarse: bool,
}

impl Spec {
    /// One sequence of `len` compressed tokens, one query token, f16, and nothing special.
    pub fn plain(heads: (usize, usize), dim: usize, keep: usize, len: usize) -> Self {
        let format = PageFormat::uniform(ValueType::F16, dim, 64, keep).unwrap();
        Self {
            seed: 1,
            heads,
            k: format,
            v: format,
            q: DType::F16,
            out: DType::F32,
            dense: (DType::F16, DType::F16),
            layout: Layout::TokensFirst,
            dist: Dist::Normal,
            queries: vec![1],
            sinks: None,
            compressed: Some((vec![len], Pages::Table)),
            window: None,
            shuffled_rows: false,
            first: None,
            centre: Centre::Off,
            scale: None,
            softcap: None,
            sliding_window: None,
            split_tokens: None,
            coarse: false,
        }
    }

    /// The nearest batch that CUDA kernels serve, and whose inputs they do not round.
    pub fn for_cuda(self) -> Self {
        let (dim, page_tokens) = (self.k_dim(), self.v.page_tokens());
        let values = self.k.value_type();
        let dtype = values.dtype().unwrap_or(DType::F16);
        let like_k = |format: PageFormat| match format.keep() {
            Some(keep) => uniform(values, dim, page_tokens, keep.min(dim)),
            None => ragged(values, dim, page_tokens),
        };
        let (k, v) = (like_k(self.k), like_k(self.v));
        // Without pages of a dtype, dense tokens or queries say with which type kernels compute.
        let any_dtype = self.compressed.is_none() || values.is_scaled();
        let all_wide = any_dtype && self.dense.0 == DType::F32 && self.q == DType::F32;
        Self { k, v, q: if all_wide { dtype } else { self.q }, coarse: true, ..self }
    }

    pub fn batch(&self) -> usize {
        self.queries.len()
    }

    pub fn k_dim(&self) -> usize {
        self.k.head_dim()
    }

    pub fn v_dim(&self) -> usize {
        self.v.head_dim()
    }
}

/// Dense tokens with more rows than sequences need.
pub struct Section {
    pub k: Dense,
    pub v: Dense,
    pub lens: Vec<i32>,
    pub rows: Option<Vec<i32>>,
}

impl Section {
    fn random(rng: &mut Rng, spec: &Spec, lens: &[usize]) -> Self {
        let spare = 2 * usize::from(spec.shuffled_rows);
        let (batch, tokens) = (lens.len() + spare, lens.iter().max().map_or(0, |n| n + 2));
        let mut order: Vec<i32> = (0..batch as i32).collect();
        rng.shuffle(&mut order);
        order.truncate(lens.len());
        let rows = spec.shuffled_rows.then_some(order);
        let side = |rng: &mut Rng, dtype, dim| {
            let mut side = Dense::poisoned(dtype, spec.layout.shape(batch, tokens, spec.heads.1, dim));
            for (b, len) in lens.iter().enumerate() {
                let row = rows.as_ref().map_or(b, |rows| rows[b] as usize);
                for (t, h) in (0..*len).flat_map(|t| (0..spec.heads.1).map(move |h| (t, h))) {
                    let x = (0..dim).map(|c| element(rng, spec.dist, dtype, c));
                    let x: Vec<f64> = if spec.coarse { x.map(coarse).collect() } else { x.collect() };
                    side.set_row(row, t, h, &x);
                }
            }
            side
        };
        let (k, v) = (side(rng, spec.dense.0, spec.k_dim()), side(rng, spec.dense.1, spec.v_dim()));
        Self { k, v, lens: lens.iter().map(|&n| n as i32).collect(), rows }
    }

    pub fn view(&self) -> ops::Dense<'_> {
        ops::Dense {
            k: self.k.view(),
            v: self.v.view(),
            lens: Mem::host(&self.lens),
            rows: mem(self.rows.as_ref()),
        }
    }

    fn tokens(&self, b: usize, head: usize) -> Vec<Token> {
        let row = self.rows.as_ref().map_or(b, |rows| rows[b] as usize);
        let token = |t| Token { k: self.k.row(row, t, head), v: self.v.row(row, t, head) };
        (0..self.lens[b] as usize).map(token).collect()
    }
}

fn element(rng: &mut Rng, dist: Dist, dtype: DType, c: usize) -> f64 {
    match dtype {
        DType::F32 => rng.normal(),
        _ => mustafar::reference::value(dtype, dist.element(rng, dtype, c)),
    }
}

pub struct Case {
    pub spec: Spec,
    pub q: Dense,
    pub indptr: Vec<i32>,
    pub sinks: Option<Section>,
    pub table: Table,
    pub k: Paged,
    pub v: Paged,
    pub window: Option<Section>,
    pub first: Option<Vec<i32>>,
    pub centre: Vec<f32>,
}

/// Outputs of a run: (output, log-sum-exp) of each query token and head, as the reference orders them.
pub type Results = Vec<(Vec<f64>, f64)>;

impl Case {
    pub fn new(spec: Spec) -> Self {
        let rng = &mut Rng::new(spec.seed);
        let kv_heads = spec.heads.1;
        let page_tokens = spec.k.page_tokens();
        let none = (vec![0; spec.batch()], Pages::Table);
        let (lens, pages) = spec.compressed.clone().unwrap_or(none);
        let mut table = match pages {
            Pages::Contiguous => contiguous(page_tokens, &lens),
            _ => Table::shuffled(rng, page_tokens, &lens, 2),
        };
        if pages == Pages::PerHead {
            table = table.with_head_lengths(rng, kv_heads);
        }
        let k = Paged::random(rng, spec.dist, Pool::gaps(spec.k, table.num_pages, kv_heads), &table);
        let v = Paged::random(rng, spec.dist, Pool::contiguous(spec.v, table.num_pages, kv_heads), &table);
        let mut indptr = vec![0];
        spec.queries.iter().for_each(|n| indptr.push(indptr.last().unwrap() + *n as i32));
        let total_q = spec.queries.iter().sum();
        let q = Dense::random(
            rng,
            Dist::Normal,
            spec.q,
            spec.layout.shape(1, total_q, spec.heads.0, spec.k_dim()),
        );
        let q = if spec.coarse { q.coarse() } else { q };
        let sinks = spec.sinks.as_ref().map(|lens| Section::random(rng, &spec, lens));
        let window = spec.window.as_ref().map(|lens| Section::random(rng, &spec, lens));
        let centre = match spec.centre {
            Centre::Off => 0,
            Centre::Shared => kv_heads * spec.k_dim(),
            Centre::PerSequence => spec.batch() * kv_heads * spec.k_dim(),
        };
        let centre = rng.floats(centre);
        let first = spec.first.as_ref().map(|first| first.iter().map(|&n| n as i32).collect());
        Self { spec, q, indptr, sinks, table, k, v, window, first, centre }
    }

    /// The arguments, with outputs of the caller's.
    pub fn args<'a>(&'a self, out: &'a mut Dense, lse: &'a mut Dense) -> Attend<'a> {
        let spec = &self.spec;
        let contiguous = matches!(spec.compressed, Some((_, Pages::Contiguous)));
        let compressed = spec.compressed.as_ref().map(|_| Compressed {
            k: self.k.pool.view(),
            v: self.v.pool.view(),
            sequences: match contiguous {
                true => Sequences { table: None, ..self.table.view() },
                false => self.table.view(),
            },
            k_center: (spec.centre != Centre::Off).then(|| Center {
                values: Mem::host(&self.centre),
                batch: if spec.centre == Centre::Shared { 1 } else { spec.batch() },
            }),
        });
        let equal = spec.queries.windows(2).all(|pair| pair[0] == pair[1]);
        Attend {
            q: self.q.view(),
            batch: spec.batch(),
            q_indptr: (!equal).then(|| Mem::host(&self.indptr)),
            max_q_len: spec.queries.iter().copied().max().unwrap_or(0),
            sinks: self.sinks.as_ref().map(Section::view),
            compressed,
            window: self.window.as_ref().map(Section::view),
            first: mem(self.first.as_ref()),
            scale: spec.scale,
            softcap: spec.softcap,
            sliding_window: spec.sliding_window,
            split_tokens: spec.split_tokens,
            out: out.view_mut(),
            lse: Some(lse.view_mut()),
        }
    }

    /// Poisoned outputs.
    pub fn outputs(&self) -> (Dense, Dense) {
        let shape = |dim| self.spec.layout.shape(1, self.q.shape.tokens, self.spec.heads.0, dim);
        (Dense::poisoned(self.spec.out, shape(self.spec.v_dim())), Dense::poisoned(DType::F32, shape(1)))
    }

    /// Runs `attend` with a poisoned workspace of exactly the size asked for.
    pub fn run(&self, context: &Context) -> Result<Results, Error> {
        let (mut out, mut lse) = self.outputs();
        let args = self.args(&mut out, &mut lse);
        run::attend(context, args)?;
        out.assert_gaps_untouched();
        lse.assert_gaps_untouched();
        let result = |(b, t, h)| (out.row(b, t, h), lse.row(b, t, h)[0]);
        Ok(out.indices().into_iter().map(result).collect())
    }

    /// All tokens of a sequence as one KV head sees them.
    pub fn tokens(&self, b: usize, head: usize) -> Vec<Token> {
        let dense = |section: &Option<Section>| section.as_ref().map_or(Vec::new(), |s| s.tokens(b, head));
        let dim = self.spec.k_dim();
        let centre = match self.spec.centre {
            Centre::Off => None,
            Centre::Shared => Some(head),
            Centre::PerSequence => Some(b * self.spec.heads.1 + head),
        };
        let centre = centre.map(|i| &self.centre[i * dim..][..dim]);
        let mut tokens = dense(&self.sinks);
        for (k, v) in self.k.rows[b][head].iter().zip(&self.v.rows[b][head]) {
            tokens.push(Token {
                k: k.dense(self.spec.k.value_type(), centre),
                v: v.dense(self.spec.v.value_type(), None),
            });
        }
        tokens.extend(dense(&self.window));
        tokens
    }

    pub fn expected(&self) -> Results {
        let spec = &self.spec;
        let heads = |b| (0..spec.heads.1).map(|h| self.tokens(b, h)).collect();
        let tokens: Vec<Vec<Vec<Token>>> = (0..spec.batch()).map(heads).collect();
        let scoring = |b: usize| Scoring {
            scale: spec.scale.map_or(1.0 / (spec.k_dim() as f64).sqrt(), f64::from),
            softcap: spec.softcap.map(f64::from),
            first: spec.first.as_ref().map_or(0, |first| first[b]),
            sliding_window: spec.sliding_window,
        };
        let scoring: Vec<Scoring> = (0..spec.batch()).map(scoring).collect();
        let indptr: Vec<usize> = self.indptr.iter().map(|&n| n as usize).collect();
        attention(&self.q, &indptr, &tokens, spec.v_dim(), &scoring)
    }
}

/// Sequence b in pages `b * ceil(max_len / page_tokens)` and following.
fn contiguous(page_tokens: usize, lens: &[usize]) -> Table {
    let max_len = lens.iter().max().map_or(0, |&n| n + 3);
    let stride = max_len.div_ceil(page_tokens);
    let num_pages = lens.len() * stride;
    Table {
        page_tokens,
        num_pages,
        entries: (0..num_pages as i32).collect(),
        stride,
        lens: lens.iter().map(|&n| n as i32).collect(),
        per_head: None,
        max_len,
    }
}

/// Same page size and capacity for any pattern.
pub fn ragged(values: ValueType, dim: usize, page_tokens: usize) -> PageFormat {
    PageFormat::ragged(values, dim, page_tokens, page_tokens * dim / 2).unwrap()
}

/// The format with `keep` values per row.
pub fn uniform(values: ValueType, dim: usize, page_tokens: usize, keep: usize) -> PageFormat {
    let format = PageFormat::uniform(values, dim, page_tokens, keep).unwrap();
    assert_eq!(format.rows(), Rows::Uniform { keep });
    format
}
