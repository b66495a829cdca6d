//! Checks that several ops share, and the host views they hand to the CPU backend.
//!
//! What needs no array contents (sizes, dtypes, strides) is checked for every backend; what needs them (lengths,
//! page numbers, weights) is checked while a host view is made, so a view that exists is valid.

use crate::dtype::{DType, ValueType};
use crate::error::{Error, Result};
use crate::format::{Rows, list};
use crate::mem::Mem;
use crate::ops::attend::Center;
use crate::pool::{Pages, PoolLayout, Sequences};
use crate::variants::HEAD_DIMS;

/// Refuses `found` unless it is `expected`; `source` says what sets the expectation ("head_dim of the pages").
pub(crate) fn same(argument: &'static str, found: usize, expected: usize, source: &str) -> Result<()> {
    if found != expected {
        return Err(Error::invalid(argument, found, format!("{expected} ({source})")));
    }
    Ok(())
}

/// Refuses a dtype that pages of `values` are not made from.
pub(crate) fn page_dtype(argument: &'static str, found: DType, values: ValueType) -> Result<()> {
    match values.dtype() {
        Some(dtype) if found != dtype => {
            Err(Error::invalid(argument, found, format!("{dtype} (type of the pages' values)")))
        }
        None if found == DType::F32 => {
            Err(Error::invalid(argument, found, format!("f16, bf16 (for pages of {values})")))
        }
        _ => Ok(()),
    }
}

/// Refuses a dtype outside `supported`.
pub(crate) fn dtype(argument: &'static str, found: DType, supported: &[DType]) -> Result<()> {
    if !supported.contains(&found) {
        let names: Vec<String> = supported.iter().map(ToString::to_string).collect();
        return Err(Error::unsupported(argument, found, names.join(", ")));
    }
    Ok(())
}

/// Refuses a row length that is no supported head dimension.
pub(crate) fn head_dim(argument: &'static str, found: usize) -> Result<()> {
    if !HEAD_DIMS.contains(&found) {
        return Err(Error::unsupported(argument, found, list(&HEAD_DIMS)));
    }
    Ok(())
}

/// K and V pages of one call stand at the same page numbers, offsets and heads.
pub(crate) fn paired_pools(k: &PoolLayout, v: &PoolLayout) -> Result<()> {
    same("v.pool.page_tokens", v.format.page_tokens(), k.format.page_tokens(), "page_tokens of k.pool")?;
    same("v.pool.num_pages", v.num_pages, k.num_pages, "num_pages of k.pool")?;
    same("v.pool.kv_heads", v.kv_heads, k.kv_heads, "kv_heads of k.pool")
}

/// Selection weights, `[heads, dim]`, on the host: each at least 0 (infinity included).
pub(crate) fn weights<'a>(
    argument: &'static str,
    weights: &Mem<'a>,
    heads: usize,
    dim: usize,
) -> Result<&'a [f32]> {
    let count = heads.checked_mul(dim).ok_or(Error::Overflow { argument })?;
    let values = weights.slice::<f32>(argument, count)?;
    if let Some(i) = values.iter().position(|w| w.is_nan() || *w < 0.0) {
        let place = format!("{} at head {}, channel {}", values[i], i / dim, i % dim);
        return Err(Error::invalid(argument, place, "values of at least 0"));
    }
    Ok(values)
}

/// What shapes attention scores: a finite scale, a softcap above 0, a sliding window of at least 1.
pub(crate) fn scalars(scale: Option<f32>, softcap: Option<f32>, sliding_window: Option<usize>) -> Result<()> {
    if let Some(scale) = scale.filter(|scale| !scale.is_finite()) {
        return Err(Error::invalid("scale", scale, "a finite number"));
    }
    if let Some(softcap) = softcap.filter(|c| !(c.is_finite() && *c > 0.0)) {
        return Err(Error::invalid("softcap", softcap, "a finite number above 0"));
    }
    if sliding_window == Some(0) {
        return Err(Error::invalid("sliding_window", 0, "at least 1"));
    }
    Ok(())
}

/// A centre must serve every sequence of `batch`.
pub(crate) fn center_batch(argument: &'static str, center: &Center<'_>, batch: usize) -> Result<()> {
    if center.batch != 1 && center.batch != batch {
        return Err(Error::invalid(argument, center.batch, format!("1, or {batch} (one per sequence)")));
    }
    Ok(())
}

/// Centres on the host.
#[derive(Debug, Clone, Copy)]
pub(crate) struct HostCenter<'a> {
    values: &'a [f32],
    batch: usize,
    heads: usize,
    dim: usize,
}

impl<'a> HostCenter<'a> {
    /// Reads `[center.batch, heads, dim]`.
    pub(crate) fn new(argument: &'static str, center: &Center<'a>, heads: usize, dim: usize) -> Result<Self> {
        let values = center.values.slice(argument, center.count(argument, heads, dim)?)?;
        Ok(Self { values, batch: center.batch, heads, dim })
    }

    /// The `dim` values of one head for sequence `b`.
    pub(crate) fn row(&self, b: usize, head: usize) -> &'a [f32] {
        let b = if self.batch == 1 { 0 } else { b };
        &self.values[(b * self.heads + head) * self.dim..][..self.dim]
    }
}

/// Checks of [`Sequences`] that need no array contents.
pub(crate) fn sequences(sequences: &Sequences<'_>, layout: &PoolLayout) -> Result<()> {
    let max_pages = sequences.max_pages(layout.format.page_tokens());
    let all = sequences
        .batch
        .checked_mul(max_pages)
        .ok_or(Error::Overflow { argument: "sequences.batch * sequences.max_len" })?;
    if sequences.table.is_none() && all > layout.num_pages {
        return Err(Error::invalid(
            "sequences.max_len",
            format!("{} for {} contiguous sequences", sequences.max_len, sequences.batch),
            format!("what fits in the pool's {} pages", layout.num_pages),
        ));
    }
    if sequences.table.is_some() && sequences.batch > 1 && sequences.table_stride < max_pages {
        return Err(Error::invalid(
            "sequences.table_stride",
            sequences.table_stride,
            format!("at least {max_pages} (pages of max_len)"),
        ));
    }
    Ok(())
}

/// Lengths and pages of a batch on the host. Lengths are 0 to max_len and every page they reach is in the pool.
#[derive(Debug, Clone, Copy)]
pub(crate) struct HostSequences<'a> {
    pub(crate) batch: usize,
    pub(crate) kv_heads: usize,
    pub(crate) page_tokens: usize,
    lens: &'a [i32],
    lens_per_head: bool,
    table: Option<&'a [i32]>,
    /// Pages from one sequence to the next: of the table's rows, or of contiguous sequences.
    stride: usize,
}

impl<'a> HostSequences<'a> {
    /// Reads lengths and table, and checks both.
    pub(crate) fn new(sequences: &Sequences<'a>, layout: &PoolLayout) -> Result<Self> {
        self::sequences(sequences, layout)?;
        let (batch, kv_heads) = (sequences.batch, layout.kv_heads);
        let page_tokens = layout.format.page_tokens();
        let argument = "sequences.lens";
        let lens = sequences.lens.slice::<i32>(argument, sequences.lens_len(kv_heads)?)?;
        let max_len = i64::try_from(sequences.max_len).unwrap_or(i64::MAX);
        for (index, &len) in lens.iter().enumerate() {
            if len < 0 || i64::from(len) > max_len {
                let (value, allowed) = (i64::from(len), (0, max_len));
                return Err(Error::OutOfRange { argument, index, value, allowed });
            }
        }
        let table = match &sequences.table {
            Some(table) => Some(table.slice("sequences.table", sequences.table_len(page_tokens)?)?),
            None => None,
        };
        let view = Self {
            batch,
            kv_heads,
            page_tokens,
            lens,
            lens_per_head: sequences.lens_per_head,
            table,
            stride: sequences.page_stride(page_tokens),
        };
        view.check_table(layout.num_pages)?;
        Ok(view)
    }

    fn check_table(&self, num_pages: usize) -> Result<()> {
        let Some(table) = self.table else { return Ok(()) };
        for b in 0..self.batch {
            let first = b * self.stride;
            let used = self.longest(b).div_ceil(self.page_tokens);
            for (i, &page) in table[first..][..used].iter().enumerate() {
                if usize::try_from(page).map_or(true, |p| p >= num_pages) {
                    return Err(Error::OutOfRange {
                        argument: "sequences.table",
                        index: first + i,
                        value: i64::from(page),
                        allowed: (0, num_pages as i64 - 1),
                    });
                }
            }
        }
        Ok(())
    }

    /// Compressed tokens of a head of sequence `b`.
    pub(crate) fn len(&self, b: usize, head: usize) -> usize {
        self.lens[if self.lens_per_head { b * self.kv_heads + head } else { b }] as usize
    }

    /// Compressed tokens of the longest head of sequence `b`.
    pub(crate) fn longest(&self, b: usize) -> usize {
        let heads = if self.lens_per_head { self.kv_heads } else { self.kv_heads.min(1) };
        (0..heads).map(|head| self.len(b, head)).max().unwrap_or(0)
    }

    /// The page that holds tokens `i * page_tokens ..` of sequence `b`; they must be below its length.
    pub(crate) fn page(&self, b: usize, i: usize) -> usize {
        match self.table {
            Some(table) => table[b * self.stride + i] as usize,
            None => b * self.stride + i,
        }
    }
}

/// Checks every row of every page that the sequences reach. Names sequence, head, page and row of the first
/// violation.
pub(crate) fn pages(pages: &Pages<'_>, sequences: &HostSequences<'_>) -> Result<()> {
    for b in 0..sequences.batch {
        for head in 0..sequences.kv_heads {
            let len = sequences.len(b, head);
            for (i, start) in (0..len).step_by(sequences.page_tokens).enumerate() {
                let page = sequences.page(b, i);
                let rows = (len - start).min(sequences.page_tokens);
                pages.layout.format.validate(pages.page(page, head), rows).map_err(|e| match e {
                    Error::CorruptData { what, reason } => Error::CorruptData {
                        what,
                        reason: format!("sequence {b}, head {head}, page {page}: {reason}"),
                    },
                    other => other,
                })?;
            }
        }
    }
    Ok(())
}

/// Ops that read ragged pages check their row offsets first, since those say what is read; the rows of uniform
/// pages cannot leave their page.
pub(crate) fn ragged_pages(pages: &Pages<'_>, sequences: &HostSequences<'_>) -> Result<()> {
    match pages.layout.format.rows() {
        Rows::Uniform { .. } => Ok(()),
        Rows::Ragged { .. } => self::pages(pages, sequences),
    }
}
