//! `append`: prune new tokens and store them into uniform pages, by slot.

use crate::backend::{Context, Run, Stream};
use crate::cpu::append::{self as on_cpu, Side, Source, Targets};
use crate::cuda;
use crate::error::{Error, Result};
use crate::mem::Mem;
use crate::ops::attend::Center;
use crate::ops::check::{self, HostCenter};
use crate::pool::PagePoolMut;
use crate::tensor::Tensor;

/// One side (K or V) of an [`Append`].
#[derive(Debug)]
pub struct AppendSide<'a> {
    /// New tokens `[1, tokens, kv_heads, head_dim]` in the type of the pages' values; f16 or bf16 for pages of 8-bit
    /// values.
    pub x: Tensor<'a>,
    /// Destination; uniform pages.
    pub pool: PagePoolMut<'a>,
    /// Selection weights, f32 `[kv_heads, head_dim]`, each >= 0, as [`super::Prune::weights`]; `None`: plain magnitude.
    pub weights: Option<Mem<'a>>,
    /// Centre subtracted before selecting and storing: `x = round16(k - c)`, the difference in f32, to nearest even,
    /// a NaN as the type's canonical one (0x7e00, 0x7fc0). With a per-sequence centre, [`Append::sequence`] says
    /// which one a token uses.
    pub center: Option<Center<'a>>,
}

/// Arguments of [`append`]: K, V or both, stored at the same slots.
#[derive(Debug)]
pub struct Append<'a> {
    /// Keys.
    pub k: Option<AppendSide<'a>>,
    /// Values.
    pub v: Option<AppendSide<'a>>,
    /// Slot of each token, i64 `[tokens]`: `page * page_tokens + offset`, or -1 to skip the token.
    /// A slot given twice keeps the later token on the CPU; on CUDA slots must be distinct, else such a row is a
    /// mixture.
    pub slots: Mem<'a>,
    /// Sequence of each token, i32 `[tokens]`: row of a per-sequence centre. Required when a centre has `batch > 1`,
    /// else not read; neither is the entry of a skipped token.
    pub sequence: Option<Mem<'a>>,
}

/// Selects the `keep` largest scores of each row (magnitudes compare by bit pattern; ties go to the lower channel)
/// and writes bitmap, scale (8-bit values) and values at the token's slot. Other slots of the page are untouched.
///
/// # Errors
/// Each names the argument: neither K nor V, shapes or dtypes that differ, ragged pages, pools that differ in
/// page_tokens, num_pages or kv_heads, `sequence` missing; on the CPU a slot below -1 or past the pool, weights
/// negative or NaN, `sequence` out of range. CUDA skips a token with any negative slot, and one with a slot past the
/// pool or a sequence out of range, which it counts ([`Context::take_device_errors`]); it does not check weights.
pub fn append(context: &Context, stream: Stream, mut args: Append<'_>) -> Result<()> {
    stream.check(context)?;
    check_shapes(&args)?;
    match context.run() {
        Run::Cpu(cpu) => {
            let slots = host_slots(&args)?;
            let sequence = host_sequence(&args, slots)?;
            let k = args.k.as_mut().map(|side| host_side(side, &K)).transpose()?;
            let v = args.v.as_mut().map(|side| host_side(side, &V)).transpose()?;
            on_cpu::append(cpu, k, v, Targets { slots, sequence });
            Ok(())
        }
        Run::Cuda(device) => cuda::append(device, stream, &args),
    }
}

/// How messages name the arguments of a side.
pub(crate) struct Names {
    pub(crate) batch: &'static str,
    pub(crate) heads: &'static str,
    pub(crate) dim: &'static str,
    pub(crate) dtype: &'static str,
    pub(crate) x: &'static str,
    pub(crate) pool: &'static str,
    pub(crate) weights: &'static str,
    pub(crate) center: &'static str,
    pub(crate) center_batch: &'static str,
}

pub(crate) const K: Names = Names {
    batch: "k.x.batch",
    heads: "k.x.heads",
    dim: "k.x.dim",
    dtype: "k.x.dtype",
    x: "k.x",
    pool: "k.pool",
    weights: "k.weights",
    center: "k.center",
    center_batch: "k.center.batch",
};

pub(crate) const V: Names = Names {
    batch: "v.x.batch",
    heads: "v.x.heads",
    dim: "v.x.dim",
    dtype: "v.x.dtype",
    x: "v.x",
    pool: "v.pool",
    weights: "v.weights",
    center: "v.center",
    center_batch: "v.center.batch",
};

fn check_shapes(args: &Append<'_>) -> Result<()> {
    if args.k.is_none() && args.v.is_none() {
        return Err(Error::invalid("k and v", "absent", "at least one of them"));
    }
    if let Some(side) = &args.k {
        check_side(side, args.sequence.is_some(), &K)?;
    }
    if let Some(side) = &args.v {
        check_side(side, args.sequence.is_some(), &V)?;
    }
    if let (Some(k), Some(v)) = (&args.k, &args.v) {
        check::same("v.x.tokens", v.x.shape.tokens, k.x.shape.tokens, "tokens of k.x")?;
        check::paired_pools(&k.pool.layout, &v.pool.layout)?;
    }
    Ok(())
}

fn check_side(side: &AppendSide<'_>, has_sequence: bool, names: &Names) -> Result<()> {
    let (shape, layout) = (side.x.shape, side.pool.layout);
    if layout.format.keep().is_none() {
        return Err(Error::invalid(names.pool, "ragged", "uniform pages"));
    }
    check::page_dtype(names.dtype, side.x.dtype, layout.format.value_type())?;
    check::same(names.batch, shape.batch, 1, "tokens of all sequences follow each other")?;
    check::same(names.heads, shape.heads, layout.kv_heads, "kv_heads of the pool")?;
    check::same(names.dim, shape.dim, layout.format.head_dim(), "head_dim of the pages")?;
    if let Some(center) = &side.center {
        if center.batch == 0 {
            return Err(Error::invalid(names.center_batch, 0, "at least 1"));
        }
        if center.batch > 1 && !has_sequence {
            return Err(Error::invalid("sequence", "absent", "given when a centre has batch > 1"));
        }
    }
    Ok(())
}

/// The sides given, K first.
fn sides<'s, 'a>(args: &'s Append<'a>) -> impl Iterator<Item = &'s AppendSide<'a>> {
    args.k.iter().chain(&args.v)
}

fn host_slots<'a>(args: &Append<'a>) -> Result<&'a [i64]> {
    let argument = "slots";
    let tokens = sides(args).map(|side| side.x.shape.tokens).next().unwrap_or(0);
    let slots = args.slots.slice::<i64>(argument, tokens)?;
    let pool_slots = sides(args).map(|side| side.pool.layout.slots()).min().unwrap_or(0);
    let last = i64::try_from(pool_slots).map_or(i64::MAX, |n| n - 1);
    match slots.iter().position(|slot| *slot < -1 || *slot > last) {
        Some(index) => {
            let value = slots[index];
            Err(Error::OutOfRange { argument, index, value, allowed: (-1, last) })
        }
        None => Ok(slots),
    }
}

/// The sequence of each token, or nothing where no centre depends on it. Tokens that are skipped may have any.
fn host_sequence<'a>(args: &Append<'a>, slots: &[i64]) -> Result<&'a [i32]> {
    let argument = "sequence";
    let batches = sides(args).filter_map(|side| side.center.map(|center| center.batch));
    let (Some(batch), Some(sequence)) = (batches.filter(|n| *n > 1).min(), &args.sequence) else {
        return Ok(&[]);
    };
    let sequence = sequence.slice::<i32>(argument, slots.len())?;
    for (index, (&b, &slot)) in sequence.iter().zip(slots).enumerate() {
        if slot >= 0 && usize::try_from(b).map_or(true, |b| b >= batch) {
            let (value, allowed) = (i64::from(b), (0, batch as i64 - 1));
            return Err(Error::OutOfRange { argument, index, value, allowed });
        }
    }
    Ok(sequence)
}

fn host_side<'s>(side: &'s mut AppendSide<'_>, names: &Names) -> Result<Side<'s>> {
    let layout = side.pool.layout;
    let (heads, dim) = (layout.kv_heads, layout.format.head_dim());
    let source = Source {
        x: side.x.rows(names.x)?,
        dtype: side.x.dtype,
        keep: layout.format.keep().unwrap_or(0),
        weights: side.weights.as_ref().map(|w| check::weights(names.weights, w, heads, dim)).transpose()?,
        center: side.center.map(|c| HostCenter::new(names.center, &c, heads, dim)).transpose()?,
    };
    Ok((source, side.pool.pages_mut(names.pool)?))
}
