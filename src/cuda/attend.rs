//! Launches of `attend`: partial results of every item, then their combination.
#![allow(unsafe_code)]

use super::Device;
use super::args::{int32, int64, stride};
use super::kernels::{Family, Kernel, LaunchShape, attend_rows, grid_rows, ragged_scaled_rows};
use super::params::{AttendParams, AttendPool, CombineParams, DenseParams, SequencesParams};
use super::plan::{Bounds, Plan, TILE_TOKENS, tile_rows};
use crate::backend::Stream;
use crate::cache::CacheConfig;
use crate::dtype::{DType, ValueType};
use crate::error::{Error, Result};
use crate::format::PageFormat;
use crate::mem::MemMut;
use crate::ops::attend::checks::{DenseNames, SINKS, Shapes, WINDOW, WORKSPACE_ALIGN};
use crate::ops::attend::{Attend, Dense};
use crate::pool::PagePool;
use std::ptr::null;

const ATTEND_THREADS: u32 = 128;
const ATTEND_WARPS: usize = 4;
const COMBINE_THREADS: u32 = 256;
/// What a tile, K or V, takes beside bitmaps and values in the kernels for ragged pages: where its rows are, and what
/// keeps its chunks apart.
const RAGGED_BYTES: usize = 8 * TILE_TOKENS + 4 * 128;
/// Scales of a tile, K or V, in the kernels for 8-bit values.
const SCALE_BYTES: usize = 2 * TILE_TOKENS;
/// Kernels hold a sixteenth of the stride in 32 bits.
const MAX_PAGE_STRIDE: usize = 64 << 30;

/// Bytes of workspace; see [`crate::ops::attend_workspace`].
pub(crate) fn attend_workspace(device: &Device, args: &Attend<'_>, shapes: &Shapes) -> Result<usize> {
    let (pages, _) = types(args, shapes)?;
    // Any number of resident blocks gives the same.
    Ok(plan(device, args, shapes, pages, 1)?.workspace)
}

/// Tokens of an item that is fastest when all sequences of a cache decode, each with so many compressed tokens. Refuses
/// a cache that could not be attended to.
pub(crate) fn attend_split(device: &Device, config: &CacheConfig, max_len: usize) -> Result<usize> {
    let _entered = device.context.enter()?;
    let (dim, formats) = (config.k.head_dim(), [config.k, config.v]);
    let pages = attend_formats(&config.k, &config.v)?;
    let dtype = config.dtype(config.k);
    let group = config.q_heads / config.kv_heads;
    let kernel = AttendKernel::new(pages, dtype, dim, group, &formats)?;
    let plan = Plan::new(&Bounds {
        batch: config.max_sequences,
        total_q: config.max_sequences,
        max_q_len: 1,
        q_heads: config.q_heads,
        kv_heads: config.kv_heads,
        dim,
        tiles: pages.tiles(dim),
        max_len,
        max_dense: 0,
        split_tokens: None,
        multiprocessors: device.context.multiprocessors as usize,
        resident: kernel.resident(device)?,
    })?;
    Ok(plan.split)
}

/// Which kernels serve pages of these formats of K and V.
pub(crate) fn attend_formats(k: &PageFormat, v: &PageFormat) -> Result<Pages> {
    if v.head_dim() != k.head_dim() {
        let supported = format!("{}, that of k, on the CUDA backend", k.head_dim());
        return Err(Error::unsupported("v.head_dim", v.head_dim(), supported));
    }
    Pages::of("v.value_type", [*k, *v])
}

/// What kernels differ by.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Pages {
    /// Whether those of K or V are ragged.
    ragged: bool,
    /// The type of their values if these have 8 bits.
    scaled: Option<ValueType>,
}

impl Pages {
    const NONE: Self = Self { ragged: false, scaled: None };

    /// Those of K and V; `v_argument` names the value type of V.
    fn of(v_argument: &'static str, [k, v]: [PageFormat; 2]) -> Result<Self> {
        let values = k.value_type();
        if values != v.value_type() {
            let supported = format!("{values}, the value type of K, on the CUDA backend");
            return Err(Error::unsupported(v_argument, v.value_type(), supported));
        }
        let ragged = k.keep().is_none() || v.keep().is_none();
        Ok(Self { ragged, scaled: Some(values).filter(|values| values.is_scaled()) })
    }

    /// Query rows of the tiles that there are kernels for, smallest first.
    fn tiles(self, dim: usize) -> &'static [u32] {
        if self.ragged && self.scaled.is_some() { ragged_scaled_rows(dim) } else { attend_rows(dim) }
    }
}

/// What the kernels are pages by: the pages, and the type that queries and dense tokens are rounded to, which is that of
/// the pages or, beside 8-bit values, that of the dense tokens.
fn types(args: &Attend<'_>, shapes: &Shapes) -> Result<(Pages, DType)> {
    if shapes.v_dim != shapes.k_dim {
        let supported = format!("{}, the dim of q, on the CUDA backend", shapes.k_dim);
        return Err(Error::unsupported("out.dim", shapes.v_dim, supported));
    }
    let mut pages = Pages::NONE;
    if let Some(compressed) = &args.compressed {
        let formats = [&compressed.k, &compressed.v].map(|pool| pool.layout.format);
        pages = Pages::of("compressed.v.value_type", formats)?;
        if let Some(dtype) = formats[0].value_type().dtype() {
            return Ok((pages, dtype));
        }
    }
    let Some(dense) = args.window.as_ref().or(args.sinks.as_ref()).map(|d| d.k.dtype) else {
        return Ok((pages, DType::F16)); // there are no dense tokens
    };
    let narrow = [dense, args.q.dtype].into_iter().find(|dtype| *dtype != DType::F32);
    let dtype = narrow.ok_or_else(|| {
        let supported = "f16 or bf16 (or pages, or a window, of one of them) on the CUDA backend";
        Error::unsupported("q.dtype", args.q.dtype, supported)
    })?;
    Ok((pages, dtype))
}

/// A kernel, and the shared memory of a block: the tiles of its warps, and later their results.
struct AttendKernel {
    kernel: Kernel,
    shared_bytes: usize,
}

impl AttendKernel {
    /// For `query_rows` rows of a KV head, over K and V pages of these formats; without pages there are none.
    fn new(
        pages: Pages,
        dtype: DType,
        dim: usize,
        query_rows: usize,
        formats: &[PageFormat],
    ) -> Result<Self> {
        let mut tiles = 8 * dim;
        for format in formats {
            let rows = Rows::new(format)?;
            let pages_of_tile = if format.page_tokens() < TILE_TOKENS { 2 } else { 1 };
            tiles += if pages.ragged {
                RAGGED_BYTES + pages_of_tile * rows.run_bytes as usize
            } else {
                TILE_TOKENS * rows.shared_row_bytes as usize
            };
            tiles += if pages.scaled.is_some() { SCALE_BYTES } else { 0 };
        }
        let rows = tile_rows(pages.tiles(dim), query_rows);
        let kernel = match (pages.scaled, pages.ragged) {
            (None, false) => Kernel::Typed(Family::Attend(rows), dtype, dim),
            (None, true) => Kernel::Typed(Family::AttendRagged(rows), dtype, dim),
            (Some(values), false) => Kernel::AttendScaled(values, dim, rows),
            (Some(values), true) => Kernel::AttendRaggedScaled(values, dim, rows),
        };
        let shared_bytes = (ATTEND_WARPS * tiles + 2 * dim + 16).max(16 * rows as usize * (dim + 2));
        Ok(Self { kernel, shared_bytes })
    }

    /// The shared memory of a block, refused where this device has less.
    fn checked_shared_bytes(&self, device: &Device) -> Result<u32> {
        let most = device.kernels.most_shared_bytes(self.kernel)?;
        if self.shared_bytes > most {
            let bytes = self.shared_bytes;
            let found = format!("rows of such a length that a block needs {bytes} bytes of shared memory");
            return Err(Error::unsupported("compressed", found, format!("{most} bytes on this device")));
        }
        Ok(self.shared_bytes as u32)
    }

    /// Blocks that a multiprocessor runs side by side.
    fn resident(&self, device: &Device) -> Result<usize> {
        device.kernels.resident_blocks(self.kernel, ATTEND_THREADS, self.shared_bytes)
    }
}

fn plan(device: &Device, args: &Attend<'_>, shapes: &Shapes, pages: Pages, resident: usize) -> Result<Plan> {
    let tokens = |dense: &Option<Dense<'_>>| dense.as_ref().map_or(0, |d| d.k.shape.tokens);
    Plan::new(&Bounds {
        batch: shapes.batch,
        total_q: shapes.total_q,
        max_q_len: q_len(args, shapes),
        q_heads: shapes.q_heads,
        kv_heads: shapes.kv_heads,
        dim: shapes.k_dim,
        tiles: pages.tiles(shapes.k_dim),
        max_len: args.compressed.as_ref().map_or(0, |c| c.sequences.max_len),
        max_dense: tokens(&args.sinks).max(tokens(&args.window)),
        split_tokens: args.split_tokens,
        multiprocessors: device.context.multiprocessors as usize,
        resident,
    })
}

/// Query tokens of a sequence: all have the same number, or at most this many.
fn q_len(args: &Attend<'_>, shapes: &Shapes) -> usize {
    match args.q_indptr {
        Some(_) => shapes.max_q_len,
        None => shapes.total_q.checked_div(shapes.batch).unwrap_or(0),
    }
}

const NO_POOL: AttendPool = AttendPool {
    pages: null(),
    page_stride_bytes: 0,
    head_stride_bytes: 0,
    row_bytes: 0,
    values_offset_bytes: 0,
    shared_row_bytes: 0,
    row_shift: 0,
    capacity: 0,
    run_bytes: 0,
};

fn attend_pool(device: &Device, argument: &'static str, pool: &PagePool<'_>) -> Result<AttendPool> {
    let (layout, format) = (&pool.layout, pool.layout.format);
    if layout.num_pages > 1 && layout.page_stride >= MAX_PAGE_STRIDE {
        let found = format!("{} bytes from page to page", layout.page_stride);
        return Err(Error::unsupported(argument, found, format!("less than {MAX_PAGE_STRIDE}")));
    }
    let rows = Rows::new(&format)?;
    Ok(AttendPool {
        pages: device.pages(argument, &pool.mem, layout)?,
        page_stride_bytes: stride(argument, layout.num_pages, layout.page_stride)?,
        head_stride_bytes: stride(argument, layout.kv_heads, layout.head_stride)?,
        row_bytes: rows.row_bytes,
        values_offset_bytes: int32("values_offset", format.values_offset())?,
        shared_row_bytes: rows.shared_row_bytes,
        row_shift: rows.row_shift,
        capacity: int32("capacity", format.capacity())?,
        run_bytes: rows.run_bytes,
    })
}

/// The fields of `AttendPool` that say how rows lie in shared memory.
struct Rows {
    row_bytes: i32,
    shared_row_bytes: i32,
    row_shift: i32,
    run_bytes: i32,
}

impl Rows {
    fn new(format: &PageFormat) -> Result<Self> {
        let value_bytes = format.value_type().bytes();
        let row_bytes = int32("keep", format.keep().unwrap_or(0) * value_bytes)?;
        let tile_rows = format.page_tokens().min(TILE_TOKENS);
        let run_values =
            format.keep().map_or(format.capacity().min(tile_rows * format.head_dim()), |k| tile_rows * k);
        // Rows whose length is such a power of two would start in the same few banks of shared memory.
        let apart = (32..=512).contains(&row_bytes) && row_bytes.count_ones() == 1;
        Ok(Self {
            row_bytes,
            shared_row_bytes: if apart { row_bytes + 16 } else { row_bytes },
            row_shift: if apart { (row_bytes / 16).ilog2() as i32 } else { 31 },
            run_bytes: int32("capacity", (value_bytes * run_values + 16 - value_bytes).next_multiple_of(16))?,
        })
    }
}

const NO_DENSE: DenseParams = DenseParams {
    k: null(),
    v: null(),
    lens: null(),
    rows: null(),
    k_row_stride: 0,
    k_token_stride: 0,
    k_head_stride: 0,
    v_row_stride: 0,
    v_token_stride: 0,
    v_head_stride: 0,
    k_dtype: 0,
    v_dtype: 0,
};

fn dense_params(
    device: &Device,
    names: &DenseNames,
    dense: Option<&Dense<'_>>,
    batch: usize,
) -> Result<DenseParams> {
    // Nothing to read: without rows or tokens the lengths cannot be other than 0.
    let Some(dense) = dense.filter(|d| d.k.shape.tokens > 0 && d.k.shape.batch > 0) else {
        return Ok(NO_DENSE);
    };
    let (k, v) = (&dense.k.shape, &dense.v.shape);
    Ok(DenseParams {
        k: device.tensor(names.k, &dense.k)?,
        v: device.tensor(names.v, &dense.v)?,
        lens: device.read(names.lens, &dense.lens, batch)?,
        rows: device.read_optional(names.rows, dense.rows.as_ref(), batch)?,
        k_row_stride: stride(names.k, k.batch, k.batch_stride)?,
        k_token_stride: stride(names.k, k.tokens, k.token_stride)?,
        k_head_stride: stride(names.k, k.heads, k.head_stride)?,
        v_row_stride: stride(names.v, v.batch, v.batch_stride)?,
        v_token_stride: stride(names.v, v.tokens, v.token_stride)?,
        v_head_stride: stride(names.v, v.heads, v.head_stride)?,
        k_dtype: dense.k.dtype as i32,
        v_dtype: dense.v.dtype as i32,
    })
}

pub(crate) fn attend(
    device: &Device,
    stream: Stream,
    args: &mut Attend<'_>,
    shapes: &Shapes,
    mut workspace: MemMut<'_>,
) -> Result<()> {
    let _entered = device.context.enter()?;
    let (pages, dtype) = types(args, shapes)?;
    let (dim, kv_heads, batch) = (shapes.k_dim, shapes.kv_heads, shapes.batch);
    let formats = args.compressed.as_ref().map(|c| [c.k.layout.format, c.v.layout.format]);
    let formats = formats.as_ref().map_or(&[][..], |both| &both[..]);
    let query_rows = q_len(args, shapes).saturating_mul(shapes.group());
    let kernel = AttendKernel::new(pages, dtype, dim, query_rows, formats)?;
    // A cut that the caller fixes does not depend on them.
    let resident = if args.split_tokens.is_some() { 1 } else { kernel.resident(device)? };
    let plan = plan(device, args, shapes, pages, resident)?;

    let argument = "workspace";
    let scratch = device.write::<u8>(argument, &mut workspace, plan.workspace)?;
    if !scratch.addr().is_multiple_of(WORKSPACE_ALIGN) {
        return Err(Error::Misaligned { argument, value: scratch.addr() as u64, required: WORKSPACE_ALIGN });
    }
    // Room for the plan's results was counted without overflow.
    let results = shapes.total_q * shapes.q_heads * plan.items;
    let partial_out = scratch.cast::<f32>();
    let partial_lse = partial_out.wrapping_add(results * dim);

    let compressed = args.compressed.as_ref();
    let pool = |argument, pool: Option<&PagePool<'_>>| {
        pool.map_or(Ok(NO_POOL), |pool| attend_pool(device, argument, pool))
    };
    let k = pool("compressed.k", compressed.map(|c| &c.k))?;
    let v = pool("compressed.v", compressed.map(|c| &c.v))?;
    let no_sequences =
        SequencesParams { table: null(), lens: null(), table_stride: 0, lens_per_head: 0, page_tokens: 16 };
    let center = compressed.and_then(|c| c.k_center.as_ref());
    let per_sequence = center.is_some_and(|center| center.batch > 1);
    let indptr = batch.checked_add(1).ok_or(Error::Overflow { argument: "q_indptr" })?;
    let q = &args.q.shape;
    let params = AttendParams {
        k,
        v,
        sequences: compressed.map_or(Ok(no_sequences), |c| device.sequences(&c.sequences, &c.k.layout))?,
        sinks: dense_params(device, &SINKS, args.sinks.as_ref(), batch)?,
        window: dense_params(device, &WINDOW, args.window.as_ref(), batch)?,
        q: device.tensor("q", &args.q)?,
        q_indptr: device.read_optional("q_indptr", args.q_indptr.as_ref(), indptr)?,
        first: device.read_optional("first", args.first.as_ref(), batch)?,
        center: device.center("compressed.k_center.values", center, kv_heads, dim)?,
        partial_out,
        partial_lse,
        q_token_stride: stride("q", q.tokens, q.token_stride)?,
        q_head_stride: stride("q", q.heads, q.head_stride)?,
        center_batch_stride: if per_sequence { int64("compressed.k_center", kv_heads * dim)? } else { 0 },
        q_dtype: args.q.dtype as i32,
        group: int32("q.heads", shapes.group())?,
        kv_heads: int32("kv_heads", kv_heads)?,
        max_q_len: int32("max_q_len", q_len(args, shapes))?,
        row_tiles: int32("max_q_len", plan.row_tiles)?,
        page_items: int32("split_tokens", plan.page_items)?,
        long_items: int32("split_tokens", plan.long_items)?,
        dense_split: int32("window.k.tokens", plan.dense_split)?,
        split: int32("split_tokens", plan.split)?,
        short_split: int32("split_tokens", plan.short_split)?,
        sliding_window: args.sliding_window.map_or(i32::MAX, |n| i32::try_from(n).unwrap_or(i32::MAX)),
        scale: args.scale.unwrap_or(1.0 / (dim as f32).sqrt()),
        softcap: args.softcap.unwrap_or(0.0),
        max_len: int32("sequences.max_len", compressed.map_or(0, |c| c.sequences.max_len))?,
        items: int32("items", plan.items)?,
        dense_dtype: dtype as i32,
    };
    int32("tokens of sinks, compressed and window", shapes.max_positions)?;
    let grid = [
        grid_rows("kv_heads * tiles of max_q_len", kv_heads.saturating_mul(plan.row_tiles))?,
        grid_rows("batch", batch)?,
        grid_rows("sequences.max_len / split_tokens", plan.items)?,
    ];
    let shape = LaunchShape {
        shared_bytes: kernel.checked_shared_bytes(device)?,
        ..LaunchShape::new(grid, ATTEND_THREADS)
    };

    let out = args.out.shape;
    let (lse, lse_token_stride, lse_head_stride) = device.lse(args.lse.as_mut())?;
    let overlaps = device.overlaps() && plan.items > 0;
    // All at once on the device, that is: blocks of a second wave would have nothing to wait for.
    let blocks = shapes.q_heads * shapes.total_q;
    let combine = CombineParams {
        partial_out,
        partial_lse,
        out_token_stride: stride("out", out.tokens, out.token_stride)?,
        out_head_stride: stride("out", out.heads, out.head_stride)?,
        lse_token_stride,
        lse_head_stride,
        items: params.items,
        dim: int32("out.dim", dim)?,
        out_dtype: args.out.dtype as i32,
        rehearse: i32::from(overlaps && blocks <= 2 * device.context.multiprocessors as usize),
        out: device.tensor_mut("out", &mut args.out)?,
        lse,
    };
    let grid = [grid_rows("q.heads", shapes.q_heads)?, grid_rows("q.tokens", shapes.total_q)?, 1];
    let combine_shape =
        LaunchShape { overlaps_previous: overlaps, ..LaunchShape::new(grid, COMBINE_THREADS) };

    // SAFETY: every pointer was checked to reach as far as counts, strides and upper bounds go, the workspace is as
    // large as the plan's partial results, and views promise the memory until the stream has run this.
    unsafe {
        device.kernels.launch(kernel.kernel, shape, stream, &params)?;
        device.kernels.launch(Kernel::Combine, combine_shape, stream, &combine)
    }
}
