//! All validation of [`Attend`](super::Attend): shapes and bounds for every backend, array contents for the host.

use super::{Attend, Compressed, Dense};
use crate::cpu::dense::AnyRows;
use crate::dtype::DType;
use crate::error::{Error, Result};
use crate::format::list;
use crate::mem::Mem;
use crate::ops::check::{self, HostCenter, HostSequences};
use crate::pool::Pages;
use crate::tensor::Shape;
use crate::variants::HEAD_DIMS;
use std::ops::Range;

const FLOATS: [DType; 3] = [DType::F16, DType::Bf16, DType::F32];

/// Tokens per work item unless the caller says otherwise: small enough that one long sequence feeds many threads,
/// large enough that the partial results (2 KB for 4 heads of 128) are a few percent of what an item reads.
const DEFAULT_SPLIT_TOKENS: usize = 512;

/// Alignment of the workspace in bytes.
pub(crate) const WORKSPACE_ALIGN: usize = 16;

/// Sizes that every backend needs, consistent with each other.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Shapes {
    pub(crate) batch: usize,
    pub(crate) total_q: usize,
    pub(crate) max_q_len: usize,
    pub(crate) q_heads: usize,
    pub(crate) kv_heads: usize,
    pub(crate) k_dim: usize,
    pub(crate) v_dim: usize,
    /// Positions of a sequence at most: sinks, compressed and window together.
    pub(crate) max_positions: usize,
    pub(crate) split_tokens: usize,
}

impl Shapes {
    /// Checks everything that needs no array contents.
    pub(crate) fn new(args: &Attend<'_>) -> Result<Self> {
        let q = &args.q.shape;
        check::same("q.batch", q.batch, 1, "queries of all sequences are packed in one")?;
        check::dtype("q.dtype", args.q.dtype, &FLOATS)?;
        check::dtype("out.dtype", args.out.dtype, &FLOATS)?;
        let (total_q, q_heads) = (q.tokens, q.heads);
        check::same("out.batch", args.out.shape.batch, 1, "as q")?;
        check::same("out.tokens", args.out.shape.tokens, total_q, "tokens of q")?;
        check::same("out.heads", args.out.shape.heads, q_heads, "heads of q")?;
        if let Some(lse) = &args.lse {
            check::dtype("lse.dtype", lse.dtype, &[DType::F32])?;
            check::same("lse.batch", lse.shape.batch, 1, "as q")?;
            check::same("lse.tokens", lse.shape.tokens, total_q, "tokens of q")?;
            check::same("lse.heads", lse.shape.heads, q_heads, "heads of q")?;
            check::same("lse.dim", lse.shape.dim, 1, "one value per query and head")?;
        }
        let shapes = Self {
            batch: args.batch,
            total_q,
            max_q_len: args.max_q_len,
            q_heads,
            kv_heads: kv_heads(args),
            k_dim: head_dim("q.dim", q)?,
            v_dim: head_dim("out.dim", &args.out.shape)?,
            max_positions: max_positions(args)?,
            split_tokens: args.split_tokens.unwrap_or(DEFAULT_SPLIT_TOKENS),
        };
        shapes.check_queries(args)?;
        for (names, dense) in [(&SINKS, &args.sinks), (&WINDOW, &args.window)] {
            if let Some(dense) = dense {
                shapes.check_dense(names, dense)?;
            }
        }
        if let Some(compressed) = &args.compressed {
            shapes.check_compressed(compressed)?;
        }
        check::scalars(args.scale, args.softcap, args.sliding_window)?;
        if args.split_tokens == Some(0) {
            return Err(Error::invalid("split_tokens", 0, "at least 1"));
        }
        Ok(shapes)
    }

    /// Query heads per KV head.
    pub(crate) fn group(&self) -> usize {
        self.q_heads / self.kv_heads
    }

    fn check_queries(&self, args: &Attend<'_>) -> Result<()> {
        if self.q_heads == 0 || self.kv_heads == 0 || !self.q_heads.is_multiple_of(self.kv_heads) {
            return Err(Error::invalid(
                "q.heads",
                self.q_heads,
                format!("a positive multiple of the {} KV heads", self.kv_heads),
            ));
        }
        if args.q_indptr.is_some() {
            return Ok(());
        }
        let even = if self.batch == 0 { self.total_q == 0 } else { self.total_q.is_multiple_of(self.batch) };
        if !even {
            return Err(Error::invalid(
                "q.tokens",
                self.total_q,
                format!("a multiple of batch ({}) without q_indptr", self.batch),
            ));
        }
        let each = self.total_q.checked_div(self.batch).unwrap_or(0);
        if each > self.max_q_len {
            return Err(Error::invalid(
                "q.tokens",
                format!("{each} per sequence"),
                format!("0 to max_q_len ({})", self.max_q_len),
            ));
        }
        Ok(())
    }

    fn check_dense(&self, names: &DenseNames, dense: &Dense<'_>) -> Result<()> {
        let (k, v) = (&dense.k.shape, &dense.v.shape);
        check::dtype(names.k, dense.k.dtype, &FLOATS)?;
        check::dtype(names.v, dense.v.dtype, &FLOATS)?;
        check::same(names.k_dim, k.dim, self.k_dim, "dim of q")?;
        check::same(names.v_dim, v.dim, self.v_dim, "dim of out")?;
        check::same(names.k_heads, k.heads, self.kv_heads, "KV heads")?;
        check::same(names.v_heads, v.heads, self.kv_heads, "KV heads")?;
        check::same(names.v_tokens, v.tokens, k.tokens, "tokens of k")?;
        check::same(names.v_batch, v.batch, k.batch, "batch of k")?;
        if dense.rows.is_none() && k.batch < self.batch {
            return Err(Error::invalid(
                names.k_batch,
                k.batch,
                format!("at least batch ({}) without rows", self.batch),
            ));
        }
        Ok(())
    }

    fn check_compressed(&self, compressed: &Compressed<'_>) -> Result<()> {
        let (k, v) = (&compressed.k.layout, &compressed.v.layout);
        let page_tokens = k.format.page_tokens();
        check::same("compressed.k.head_dim", k.format.head_dim(), self.k_dim, "dim of q")?;
        check::same("compressed.v.head_dim", v.format.head_dim(), self.v_dim, "dim of out")?;
        check::same("compressed.k.kv_heads", k.kv_heads, self.kv_heads, "KV heads")?;
        check::same("compressed.v.kv_heads", v.kv_heads, self.kv_heads, "KV heads")?;
        check::same("compressed.v.page_tokens", v.format.page_tokens(), page_tokens, "page_tokens of k")?;
        check::same("compressed.v.num_pages", v.num_pages, k.num_pages, "num_pages of k")?;
        check::same("compressed.sequences.batch", compressed.sequences.batch, self.batch, "batch")?;
        check::sequences(&compressed.sequences, k)?;
        if let Some(center) = &compressed.k_center {
            check::center_batch("compressed.k_center.batch", center, self.batch)?;
        }
        Ok(())
    }
}

/// Names of the arguments inside one dense section, for messages.
pub(crate) struct DenseNames {
    pub(crate) k: &'static str,
    pub(crate) v: &'static str,
    pub(crate) k_dim: &'static str,
    pub(crate) v_dim: &'static str,
    pub(crate) k_heads: &'static str,
    pub(crate) v_heads: &'static str,
    pub(crate) v_tokens: &'static str,
    pub(crate) k_batch: &'static str,
    pub(crate) v_batch: &'static str,
    pub(crate) lens: &'static str,
    pub(crate) rows: &'static str,
}

macro_rules! dense_names {
    ($section:literal) => {
        DenseNames {
            k: concat!($section, ".k"),
            v: concat!($section, ".v"),
            k_dim: concat!($section, ".k.dim"),
            v_dim: concat!($section, ".v.dim"),
            k_heads: concat!($section, ".k.heads"),
            v_heads: concat!($section, ".v.heads"),
            v_tokens: concat!($section, ".v.tokens"),
            k_batch: concat!($section, ".k.batch"),
            v_batch: concat!($section, ".v.batch"),
            lens: concat!($section, ".lens"),
            rows: concat!($section, ".rows"),
        }
    };
}

pub(crate) static SINKS: DenseNames = dense_names!("sinks");
pub(crate) static WINDOW: DenseNames = dense_names!("window");

fn kv_heads(args: &Attend<'_>) -> usize {
    let dense = |dense: &Option<Dense<'_>>| dense.as_ref().map(|d| d.k.shape.heads);
    let compressed = args.compressed.as_ref().map(|c| c.k.layout.kv_heads);
    // Without any section nothing is read, and any grouping gives the same answer.
    compressed.or(dense(&args.window)).or(dense(&args.sinks)).unwrap_or(args.q.shape.heads)
}

fn head_dim(argument: &'static str, shape: &Shape) -> Result<usize> {
    if !HEAD_DIMS.contains(&shape.dim) {
        return Err(Error::unsupported(argument, shape.dim, list(&HEAD_DIMS)));
    }
    Ok(shape.dim)
}

fn max_positions(args: &Attend<'_>) -> Result<usize> {
    let dense = |dense: &Option<Dense<'_>>| dense.as_ref().map_or(0, |d| d.k.shape.tokens);
    args.compressed
        .as_ref()
        .map_or(0, |c| c.sequences.max_len)
        .checked_add(dense(&args.sinks))
        .and_then(|n| n.checked_add(dense(&args.window)))
        .ok_or(Error::Overflow { argument: "tokens of sinks, compressed and window" })
}

/// Dense section on the host.
#[derive(Debug, Clone, Copy)]
pub(crate) struct HostDense<'a> {
    pub(crate) k: AnyRows<'a>,
    pub(crate) v: AnyRows<'a>,
    lens: &'a [i32],
    rows: Option<&'a [i32]>,
}

impl<'a> HostDense<'a> {
    fn new(names: &DenseNames, dense: &Dense<'a>, batch: usize) -> Result<Self> {
        let tokens = dense.k.shape.tokens;
        let lens = indices(names.lens, &dense.lens, batch, tokens)?;
        // No sequence may point into tensors without rows.
        let rows = match (&dense.rows, dense.k.shape.batch.checked_sub(1)) {
            (Some(rows), Some(last)) => Some(indices(names.rows, rows, batch, last)?),
            (Some(_), None) if batch > 0 => return Err(Error::invalid(names.k_batch, 0, "at least 1")),
            _ => None,
        };
        let (k, v) = (AnyRows::new(names.k, &dense.k)?, AnyRows::new(names.v, &dense.v)?);
        Ok(Self { k, v, lens, rows })
    }

    /// Valid tokens of sequence `b`.
    pub(crate) fn len(&self, b: usize) -> usize {
        self.lens[b] as usize
    }

    /// Row of the tensors that holds sequence `b`.
    pub(crate) fn row(&self, b: usize) -> usize {
        self.rows.map_or(b, |rows| rows[b] as usize)
    }
}

/// Compressed section on the host.
#[derive(Debug, Clone, Copy)]
pub(crate) struct HostCompressed<'a> {
    pub(crate) k: Pages<'a>,
    pub(crate) v: Pages<'a>,
    pub(crate) sequences: HostSequences<'a>,
    pub(crate) k_center: Option<HostCenter<'a>>,
}

/// Arguments on the host, contents checked: every length, row and page number is in range.
#[derive(Debug)]
pub(crate) struct Host<'a> {
    pub(crate) shapes: Shapes,
    pub(crate) q: AnyRows<'a>,
    q_indptr: Option<&'a [i32]>,
    pub(crate) sinks: Option<HostDense<'a>>,
    pub(crate) compressed: Option<HostCompressed<'a>>,
    pub(crate) window: Option<HostDense<'a>>,
    first: Option<&'a [i32]>,
    pub(crate) scale: f32,
    pub(crate) softcap: Option<f32>,
    sliding_window: Option<usize>,
}

impl<'a> Host<'a> {
    /// Reads and checks the arrays.
    pub(crate) fn new(args: &Attend<'a>, shapes: Shapes) -> Result<Self> {
        let batch = shapes.batch;
        let dense = |names, dense: &Option<Dense<'a>>| {
            dense.as_ref().map(|d| HostDense::new(names, d, batch)).transpose()
        };
        let compressed = |c: &Compressed<'a>| -> Result<HostCompressed<'a>> {
            let center =
                |center| HostCenter::new("compressed.k_center.values", center, shapes.kv_heads, shapes.k_dim);
            Ok(HostCompressed {
                k: c.k.pages("compressed.k")?,
                v: c.v.pages("compressed.v")?,
                sequences: HostSequences::new(&c.sequences, &c.k.layout)?,
                k_center: c.k_center.as_ref().map(center).transpose()?,
            })
        };
        Ok(Self {
            shapes,
            q: AnyRows::new("q", &args.q)?,
            q_indptr: args.q_indptr.as_ref().map(|m| indptr(m, &shapes)).transpose()?,
            sinks: dense(&SINKS, &args.sinks)?,
            compressed: args.compressed.as_ref().map(compressed).transpose()?,
            window: dense(&WINDOW, &args.window)?,
            first: args.first.as_ref().map(|m| indices("first", m, batch, i32::MAX as usize)).transpose()?,
            scale: args.scale.unwrap_or(1.0 / (shapes.k_dim as f32).sqrt()),
            softcap: args.softcap,
            sliding_window: args.sliding_window,
        })
    }

    /// Query tokens of sequence `b`.
    pub(crate) fn queries(&self, b: usize) -> Range<usize> {
        match self.q_indptr {
            Some(indptr) => indptr[b] as usize..indptr[b + 1] as usize,
            None => {
                let each = self.shapes.total_q / self.shapes.batch;
                b * each..(b + 1) * each
            }
        }
    }

    /// Tokens of sinks, compressed and window of one head of sequence `b`.
    pub(crate) fn lens(&self, b: usize, head: usize) -> [usize; 3] {
        let dense = |dense: &Option<HostDense<'_>>| dense.as_ref().map_or(0, |d| d.len(b));
        let compressed = self.compressed.as_ref().map_or(0, |c| c.sequences.len(b, head));
        [dense(&self.sinks), compressed, dense(&self.window)]
    }

    /// Positions that query `i` of the `count` of sequence `b` sees. Both ends rise with `i`.
    pub(crate) fn visible(&self, b: usize, head: usize, i: usize, count: usize) -> Range<usize> {
        let total: usize = self.lens(b, head).iter().sum();
        let end = (total + i + 1).saturating_sub(count);
        let slid = self.sliding_window.map_or(0, |n| end.saturating_sub(n));
        let start = slid.max(self.first.map_or(0, |first| first[b] as usize));
        start.min(end)..end
    }
}

/// `count` indices, each 0 to `last`.
fn indices<'a>(argument: &'static str, mem: &Mem<'a>, count: usize, last: usize) -> Result<&'a [i32]> {
    let values = mem.slice::<i32>(argument, count)?;
    let last = i64::try_from(last).unwrap_or(i64::MAX);
    for (index, &value) in values.iter().enumerate() {
        if value < 0 || i64::from(value) > last {
            let (value, allowed) = (i64::from(value), (0, last));
            return Err(Error::OutOfRange { argument, index, value, allowed });
        }
    }
    Ok(values)
}

fn indptr<'a>(mem: &Mem<'a>, shapes: &Shapes) -> Result<&'a [i32]> {
    let argument = "q_indptr";
    let count = shapes.batch.checked_add(1).ok_or(Error::Overflow { argument })?;
    let values = mem.slice::<i32>(argument, count)?;
    let total = i64::try_from(shapes.total_q).unwrap_or(i64::MAX);
    let longest = i64::try_from(shapes.max_q_len).unwrap_or(i64::MAX);
    let mut allowed = (0, 0);
    for (index, &value) in values.iter().enumerate() {
        let value = i64::from(value);
        // The last entry closes the queries: anything else would leave outputs unwritten.
        let complete = index < shapes.batch || value == total;
        if value < allowed.0 || value > allowed.1 || !complete {
            let allowed = if complete { allowed } else { (total, total) };
            return Err(Error::OutOfRange { argument, index, value, allowed });
        }
        allowed = (value, value.saturating_add(longest).min(total));
    }
    Ok(values)
}
