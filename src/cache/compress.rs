//! Compressing the oldest tokens of a sequence: scores, selection, pages.

use super::append::Plan;
use super::buffer::{Buffer, Staging};
use super::geometry::Segment;
use super::scores::{Choice, LastQueries};
use super::{Cache, CacheConfig, CenterMode};
use crate::backend::{Context, Run, Stream};
use crate::cpu::median::median;
use crate::cuda;
use crate::dtype::{DType, ValueType};
use crate::error::Result;
use crate::format::PageFormat;
use crate::mem::Mem;
use crate::ops::{self, Append, AppendSide, Center, Compress, Prune, Selection, TokenWeights};
use crate::pool::{PagePoolMut, PoolLayout};
use crate::strategy::Side;
use crate::tensor::{Shape, Tensor, TensorMut};
use std::ops::Range;

/// Tokens that are weighed by one call: enough to fill a GPU.
const WEIGHED: usize = 4096;

/// Memory of the selection in channel direction, which sees `group` tokens of all heads at a time.
#[derive(Debug)]
pub(super) struct ChannelScratch {
    /// The tokens, as uniform pages that keep everything: so that they are centred and gathered as all others are.
    rows: Buffer,
    /// `[group][heads][head_dim / 8]`.
    mask: Buffer,
    /// Token weights, f32 `[weighed_groups * group][heads]`.
    weights: Buffer,
    weighed_groups: usize,
}

impl ChannelScratch {
    pub(super) fn new(context: &Context, config: &CacheConfig) -> Result<Self> {
        let sides = [(config.k_strategy, config.k), (config.v_strategy, config.v)];
        let channel = sides.into_iter().filter(|(strategy, _)| strategy.is_channel());
        let (mut rows, mut mask, mut weights) = (0, 0, 0);
        let weighed_groups = (WEIGHED.min(config.max_tokens) / config.group).max(1);
        for (strategy, format) in channel {
            let page = whole(config, &format)?.page_bytes();
            rows = rows.max(config.group / format.page_tokens() * config.kv_heads * page);
            mask = mask.max(config.group * config.kv_heads * format.bitmap_row_bytes());
            if strategy.needs_queries() {
                weights = weighed_groups * config.group * config.kv_heads * size_of::<f32>();
            }
        }
        Ok(Self {
            rows: Buffer::zeroed(context, rows)?,
            mask: Buffer::zeroed(context, mask)?,
            weights: Buffer::zeroed(context, weights)?,
            weighed_groups,
        })
    }

    pub(super) fn bytes(&self) -> usize {
        self.rows.len() + self.mask.len() + self.weights.len()
    }
}

/// Pages like these that keep everything as it is.
fn whole(config: &CacheConfig, format: &PageFormat) -> Result<PageFormat> {
    let values = match config.dtype(*format) {
        DType::Bf16 => ValueType::Bf16,
        _ => ValueType::F16,
    };
    PageFormat::uniform(values, format.head_dim(), format.page_tokens(), format.head_dim())
}

/// One side of the tokens of some heads.
#[derive(Clone, Copy)]
struct Tokens<'a> {
    /// What is compressed out of the window, and what comes straight from the caller.
    parts: [Tensor<'a>; 2],
    center: Option<Center<'a>>,
}

impl<'a> Tokens<'a> {
    fn heads(&self, heads: &Range<usize>) -> Result<Self> {
        let [old, new] = self.parts;
        let skip = heads.start * old.shape.dim * size_of::<f32>();
        let center = self.center.map(|c| Ok(Center { values: c.values.skip("center", skip)?, batch: 1 }));
        Ok(Self {
            parts: [old.heads("window", heads)?, new.heads("tokens", heads)?],
            center: center.transpose()?,
        })
    }

    /// One of the parts, to be stored.
    fn part(&self, i: usize, pool: PagePoolMut<'a>, weights: Option<Mem<'a>>) -> AppendSide<'a> {
        AppendSide { x: self.parts[i], pool, weights, center: self.center }
    }

    /// Some of the tokens, counted from the first, by part: each with its place in the range.
    fn pieces(&self, range: &Range<usize>) -> Result<[(usize, Tensor<'a>); 2]> {
        let [old, new] = self.parts;
        let before = old.shape.tokens;
        let clip = |t: usize, len: usize| t.min(len);
        let of_old = (clip(range.start, before), clip(range.end, before));
        let of_new = (range.start.saturating_sub(before), range.end.saturating_sub(before));
        Ok([
            (0, old.tokens("window", 0, of_old.0, of_old.1)?),
            (of_old.1 - of_old.0, new.tokens("tokens", 0, of_new.0, of_new.1)?),
        ])
    }
}

/// Channel direction of one side of one segment.
struct ChannelJob<'a> {
    tokens: Tokens<'a>,
    /// Keys of the same tokens and heads, and the queries whose attention weighs the tokens.
    attention: Option<([Tensor<'a>; 2], LastQueries<'a>)>,
    /// Position of the first token.
    position: usize,
    keep: usize,
    group: usize,
    /// Of the tokens.
    dtype: DType,
    /// Pages that keep everything, in the type of the tokens.
    whole: PageFormat,
    /// Page of each page_tokens tokens.
    pages: &'a [i32],
}

impl Cache {
    /// Writes the pages of one sequence.
    pub(super) fn compress(
        &mut self,
        stream: Stream,
        layer: usize,
        plan: &Plan,
        [k, v]: [Tensor<'_>; 2],
    ) -> Result<()> {
        self.copy_shared_pages(stream, plan)?;
        self.set_center(stream, layer, plan, k)?;
        let place = (layer, plan.row);
        self.scores.order(&self.context, &mut self.staging, stream, place, plan.recent)?;
        self.scores.weigh_keys(&self.context, stream, &self.config, plan.recent)?;

        let page_tokens = self.config.k.page_tokens();
        let pages: Vec<i32> = plan.pages.iter().map(|target| target.page as i32).collect();
        let slots = &mut self.scratch.slots;
        slots.clear();
        slots.extend((plan.before.compressed..plan.before.compressed + plan.compress).map(|t| {
            let page = pages[t / page_tokens - plan.first_page];
            (page as usize * page_tokens + t % page_tokens) as i64
        }));

        let Self {
            context, config, geometry, pool, windows, centers, scores, channel, staging, scratch, ..
        } = self;
        let old = plan.old_tokens();
        let center = match config.center {
            CenterMode::None => None,
            CenterMode::Median => Some(Center { values: centers.mem(layer, plan.row)?, batch: 1 }),
        };
        let k = Tokens { parts: [windows.k.front(layer, plan.row, old)?, k], center };
        let v = Tokens { parts: [windows.v.front(layer, plan.row, old)?, v], center: None };
        for segment in geometry.segments(layer) {
            let heads = &segment.heads;
            let (k, v) = (k.heads(heads)?, v.heads(heads)?);
            let (k_format, v_format) = (segment.layouts.0.format, segment.layouts.1.format);
            let k_keep = config.k_strategy.keep("k", &k_format)?;
            let v_keep = config.v_strategy.keep("v", &v_format)?;
            if plan.before.compressed == 0 {
                let choice = |side, x, center, keep| Choice {
                    side,
                    layer,
                    row: plan.row,
                    heads,
                    x,
                    center,
                    keep,
                    recent: plan.recent,
                };
                scores.fix(context, stream, config, &choice(Side::K, &k.parts, k.center, k_keep))?;
                scores.fix(context, stream, config, &choice(Side::V, &v.parts, None, v_keep))?;
            }
            let weights = [scores.k_weights(config, place, heads)?, scores.v_weights(config, place, heads)?];
            let slots = [&scratch.slots[..old], &scratch.slots[old..]];
            append(context, staging, stream, config, pool, &segment, [&k, &v], weights, slots)?;

            let mut job = |side: Side, tokens: Tokens<'_>, keep, attention| {
                let format = if side == Side::K { config.k } else { config.v };
                let job = ChannelJob {
                    tokens,
                    attention,
                    position: config.sinks + plan.before.compressed,
                    keep,
                    group: config.group,
                    dtype: config.dtype(format),
                    whole: whole(config, &format)?,
                    pages: &pages,
                };
                channel.compress(context, staging, stream, &job, pool, (&segment, side))
            };
            if config.k_strategy.is_channel() {
                job(Side::K, k, k_keep, None)?;
            }
            if config.v_strategy.is_channel() {
                let queries = match config.v_strategy.needs_queries() {
                    true => scores.last_queries(config, plan.recent)?,
                    false => None,
                };
                let q_heads = segment.q_heads(config.q_heads / config.kv_heads);
                let queries = queries.map(|all| all.heads(&q_heads)).transpose()?;
                job(Side::V, v, v_keep, queries.map(|queries| (k.parts, queries)))?;
            }
        }
        Ok(())
    }

    /// Copies the pages that other sequences hold too to those that take their place.
    fn copy_shared_pages(&mut self, stream: Stream, plan: &Plan) -> Result<()> {
        for target in &plan.pages {
            let Some(from) = target.replaces.filter(|&from| from != target.page) else { continue };
            // Other layers may have tokens in any page that the sequence holds.
            for segment in (0..self.config.layers).flat_map(|layer| self.geometry.segments(layer)) {
                let (from, to) = (segment.at(from as usize), segment.at(target.page as usize));
                self.pool.copy_within(stream, from, to, segment.page())?;
            }
        }
        Ok(())
    }

    /// Computes the centre of a sequence that compresses its first tokens.
    fn set_center(&mut self, stream: Stream, layer: usize, plan: &Plan, k: Tensor<'_>) -> Result<()> {
        if self.config.center == CenterMode::None || plan.before.compressed > 0 {
            return Ok(());
        }
        let old = self.windows.k.front(layer, plan.row, plan.old_tokens())?;
        match self.context.run() {
            Run::Cpu(cpu) => {
                let center = median(cpu.threads, "k", &[old, k])?;
                let bytes: Vec<u8> = center.into_iter().flat_map(f32::to_ne_bytes).collect();
                self.centers.write(layer, plan.row, 0, &bytes)
            }
            Run::Cuda(device) => {
                cuda::median(device, stream, &[old, k], self.centers.mem_mut(layer, plan.row)?)
            }
        }
    }
}

/// Stores the sides that are pruned in token direction.
#[allow(clippy::too_many_arguments, reason = "parts of a cache that is borrowed piecewise")]
fn append(
    context: &Context,
    staging: &mut Staging,
    stream: Stream,
    config: &CacheConfig,
    pool: &mut Buffer,
    segment: &Segment,
    [k, v]: [&Tokens<'_>; 2],
    [k_weights, v_weights]: [Option<Mem<'_>>; 2],
    slots: [&[i64]; 2],
) -> Result<()> {
    let (by_k, by_v) = (!config.k_strategy.is_channel(), !config.v_strategy.is_channel());
    for (part, slots) in slots.into_iter().enumerate() {
        if slots.is_empty() || !(by_k || by_v) {
            continue;
        }
        let (k_pool, v_pool) =
            PagePoolMut::pair("pages", pool.mem_mut().skip("pages", segment.at(0))?, segment.layouts)?;
        let args = Append {
            k: by_k.then(|| k.part(part, k_pool, k_weights)),
            v: by_v.then(|| v.part(part, v_pool, v_weights)),
            slots: staging.send(stream, slots)?,
            sequence: None,
        };
        ops::append(context, stream, args)?;
    }
    Ok(())
}

impl ChannelScratch {
    /// Compresses `group` tokens at a time.
    fn compress(
        &mut self,
        context: &Context,
        staging: &mut Staging,
        stream: Stream,
        job: &ChannelJob<'_>,
        pool: &mut Buffer,
        (segment, side): (&Segment, Side),
    ) -> Result<()> {
        let format = match side {
            Side::K => segment.layouts.0.format,
            Side::V => segment.layouts.1.format,
        };
        let (page_tokens, heads) = (format.page_tokens(), segment.heads.len());
        let pages_each = job.group / page_tokens;
        let layout = PoolLayout::contiguous(job.whole, pages_each, heads)?;
        let all: Vec<i64> = (0..job.group as i64).collect();
        let numbers = staging.send(stream, job.pages)?;
        for (i, pages) in job.pages.chunks(pages_each).enumerate() {
            let range = i * job.group..(i + 1) * job.group;
            for (first, x) in job.tokens.pieces(&range)? {
                if x.shape.tokens > 0 {
                    let pool = PagePoolMut::new("rows", self.rows.mem_mut(), layout)?;
                    let k = AppendSide { x, pool, weights: None, center: job.tokens.center };
                    let slots = staging.send(stream, &all[first..first + x.shape.tokens])?;
                    ops::append(context, stream, Append { k: Some(k), v: None, slots, sequence: None })?;
                }
            }
            let weighed = i % self.weighed_groups;
            if weighed == 0 {
                let end = job.pages.len().div_ceil(pages_each).min(i + self.weighed_groups);
                self.weigh(context, stream, job, &(range.start..end * job.group))?;
            }
            let skip = weighed * job.group * heads * size_of::<f32>();
            let weights = job.attention.as_ref().map(|_| self.weights.mem().skip("weights", skip));
            let weights = weights.transpose()?;
            let rows = self.rows.mem_mut().skip("rows", layout.format.values_offset())?;
            let args = Prune {
                x: TensorMut::new("rows", rows, job.dtype, values(&layout))?,
                selection: Selection::Channel { keep: job.keep },
                weights: None,
                token_weights: weights,
                mask: Some(self.mask.mem_mut()),
            };
            ops::prune(context, stream, args)?;
            for page in 0..pages.len() {
                let skip = layout.offset(page, 0) + layout.format.values_offset();
                let shape = Shape { batch: 1, ..values(&layout) };
                let mask = page * page_tokens * heads * format.bitmap_row_bytes();
                let mem = pool.mem_mut().skip("pages", segment.at(0))?;
                let (k_pool, v_pool) = PagePoolMut::pair("pages", mem, segment.layouts)?;
                let args = Compress {
                    x: Tensor::new("rows", self.rows.mem().skip("rows", skip)?, job.dtype, shape)?,
                    mask: Some(self.mask.mem().skip("mask", mask)?),
                    pool: if side == Side::K { k_pool } else { v_pool },
                    pages: numbers.skip("pages", (i * pages_each + page) * size_of::<i32>())?,
                    needed: None,
                };
                ops::compress(context, stream, args)?;
            }
        }
        Ok(())
    }

    /// Fills in the token weights of a range of tokens.
    fn weigh(
        &mut self,
        context: &Context,
        stream: Stream,
        job: &ChannelJob<'_>,
        range: &Range<usize>,
    ) -> Result<()> {
        let Some((parts, queries)) = &job.attention else { return Ok(()) };
        let Some(lse) = queries.lse else { return Ok(()) };
        let keys = Tokens { parts: *parts, center: None };
        for (first, k) in keys.pieces(range)? {
            let skip = first * k.shape.heads * size_of::<f32>();
            let args = TokenWeights {
                q: queries.q,
                lse,
                q_position: queries.position,
                k,
                k_position: job.position + range.start + first,
                scale: queries.scoring.scale,
                softcap: queries.scoring.softcap,
                sliding_window: queries.scoring.sliding_window,
                out: self.weights.mem_mut().skip("weights", skip)?,
            };
            ops::token_weights(context, stream, args)?;
        }
        Ok(())
    }
}

/// The values of pages that keep everything, as a tensor `[pages, page_tokens, heads, head_dim]`.
fn values(layout: &PoolLayout) -> Shape {
    let (format, element) = (layout.format, layout.format.value_type().bytes());
    Shape {
        batch: layout.num_pages,
        tokens: format.page_tokens(),
        heads: layout.kv_heads,
        dim: format.head_dim(),
        batch_stride: layout.page_stride / element,
        token_stride: format.head_dim(),
        head_stride: layout.head_stride / element,
    }
}
