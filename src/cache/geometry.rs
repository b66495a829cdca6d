//! Sizes and places that follow from a configuration, in bytes unless said otherwise.

use super::config::{CacheConfig, CenterMode};
use crate::error::{Error, Result};
use crate::ops::RECENT_QUERIES;
use crate::pool::PoolLayout;
use std::ops::Range;

/// Consecutive heads of one layer whose pages have the same formats. They have a pool of their own, and ops take them
/// together.
#[derive(Debug, Clone)]
pub(super) struct Segment {
    /// KV heads.
    pub(super) heads: Range<usize>,
    /// Layouts of the K and V pages.
    pub(super) layouts: (PoolLayout, PoolLayout),
    /// Offset of its pages.
    first: usize,
}

/// Consecutive layers with the same formats.
#[derive(Debug, Clone)]
struct Section {
    layers: Range<usize>,
    /// Of one layer; their offsets count from its first page.
    segments: Vec<Segment>,
    /// Pages of one layer.
    bytes: usize,
    /// Offset of the first layer.
    first: usize,
}

impl Segment {
    /// K and V pages of all its heads under one page number.
    pub(super) fn page(&self) -> usize {
        self.layouts.0.page_stride
    }

    /// Offset of a page.
    pub(super) fn at(&self, page: usize) -> usize {
        self.first + page * self.page()
    }

    /// Query heads, of which each KV head has `group`.
    pub(super) fn q_heads(&self, group: usize) -> Range<usize> {
        self.heads.start * group..self.heads.end * group
    }
}

#[derive(Debug, Clone)]
pub(super) struct Geometry {
    /// Pages of each segment, a number.
    pub(super) num_pages: usize,
    sections: Vec<Section>,
    /// One page number in all layers: K and V pages of all heads.
    pub(super) page: usize,
    /// All pages.
    pub(super) pages: usize,
    /// One dense token of one layer: K and V of all heads.
    pub(super) token: usize,
    /// The centre of one layer of one sequence; 0 without centre.
    pub(super) center: usize,
    /// Fixed selection weights of K and of V of one layer of one sequence; 0 unless the strategy is structured.
    pub(super) fixed: [usize; 2],
    /// One query token, f32; 0 if no strategy needs queries.
    pub(super) query: usize,
    /// The log-sum-exps of one query token; 0 unless a strategy needs attention weights.
    pub(super) lse: usize,
    /// All of it: pages, and what each layer of each sequence has besides. Scratch memory is not counted.
    pub(super) total: usize,
}

impl Geometry {
    /// The segments of a layer.
    pub(super) fn segments(&self, layer: usize) -> impl Iterator<Item = Segment> {
        let sections = self.sections.iter().filter(move |section| section.layers.contains(&layer));
        sections.flat_map(move |section| {
            let first = section.first + (layer - section.layers.start) * section.bytes;
            section
                .segments
                .iter()
                .map(move |segment| Segment { first: first + segment.first, ..segment.clone() })
        })
    }

    /// One layer of each kind.
    pub(super) fn distinct_layers(&self) -> impl Iterator<Item = usize> {
        self.sections.iter().map(|section| section.layers.start)
    }

    /// The sizes of a configuration after all its checks.
    pub(super) fn checked(config: &CacheConfig) -> Result<Self> {
        config.check()?;
        Self::new(config)
    }

    pub(super) fn new(config: &CacheConfig) -> Result<Self> {
        let num_pages = config.max_tokens.div_ceil(config.k.page_tokens());
        let (mut sections, mut pages, mut page) = (Vec::new(), 0, 0);
        for layers in sections_of_layers(config) {
            let (mut segments, mut bytes, mut page_of_layer) = (Vec::new(), 0, 0);
            for heads in runs(config, layers.start) {
                let (k, v) = config.formats(layers.start, heads.start);
                let layouts = PoolLayout::pair(k, v, num_pages, heads.len())?;
                let segment = Segment { heads, layouts, first: bytes };
                bytes = sum("max_tokens", &[bytes, product("max_tokens", &[num_pages, segment.page()])?])?;
                page_of_layer += segment.page();
                segments.push(segment);
            }
            let all = product("layers", &[layers.len(), bytes])?;
            page += layers.len() * page_of_layer;
            sections.push(Section { layers, segments, bytes, first: pages });
            pages = sum("layers", &[pages, all])?;
        }
        let float = size_of::<f32>();
        let heads = |dim| product("kv_heads", &[config.kv_heads, dim, float]);
        let (k_dim, v_dim) = (config.k.head_dim(), config.v.head_dim());
        let row = k_dim * config.dtype(config.k).bytes() + v_dim * config.dtype(config.v).bytes();
        let token = product("kv_heads", &[config.kv_heads, row])?;
        let only = |wanted: bool, bytes: Result<usize>| if wanted { bytes } else { Ok(0) };
        let center = only(config.center != CenterMode::None, heads(k_dim))?;
        let fixed = [
            only(config.k_strategy.is_structured(), heads(k_dim))?,
            only(config.v_strategy.is_structured(), heads(v_dim))?,
        ];
        let query = only(config.needs_queries(), product("q_heads", &[config.q_heads, k_dim, float]))?;
        let lse = only(config.v_strategy.needs_queries(), product("q_heads", &[config.q_heads, float]))?;
        let dense = product("window", &[config.sinks + config.window + config.group, token])?;
        let queries = product("q_heads", &[RECENT_QUERIES, query + lse])?;
        let row = sum("window", &[dense, center, fixed[0], fixed[1], queries])?;
        let rows = product("max_sequences", &[config.layers, config.max_sequences, row])?;
        let total = sum("layers", &[pages, rows])?;
        Ok(Self { num_pages, sections, page, pages, token, center, fixed, query, lse, total })
    }
}

/// The layers, cut where an override begins or ends.
fn sections_of_layers(config: &CacheConfig) -> Vec<Range<usize>> {
    cut(config.layers, config.overrides.iter().map(|formats| &formats.layers))
}

/// The heads of a layer, cut where formats differ.
fn runs(config: &CacheConfig, layer: usize) -> Vec<Range<usize>> {
    let of_layer = config.overrides.iter().filter(|formats| formats.layers.contains(&layer));
    let mut runs: Vec<Range<usize>> = Vec::new();
    for heads in cut(config.kv_heads, of_layer.map(|formats| &formats.heads)) {
        match runs.last_mut() {
            Some(run) if config.formats(layer, run.start) == config.formats(layer, heads.start) => {
                run.end = heads.end;
            }
            _ => runs.push(heads),
        }
    }
    runs
}

/// `0..n`, cut at the ends of `ranges`.
fn cut<'a>(n: usize, ranges: impl Iterator<Item = &'a Range<usize>>) -> Vec<Range<usize>> {
    let mut ends: Vec<usize> = ranges.flat_map(|range| [range.start, range.end]).chain([0, n]).collect();
    ends.sort_unstable();
    ends.dedup();
    ends.windows(2).map(|pair| pair[0]..pair[1]).collect()
}

fn product(argument: &'static str, factors: &[usize]) -> Result<usize> {
    factors.iter().try_fold(1usize, |a, &b| a.checked_mul(b)).ok_or(Error::Overflow { argument })
}

fn sum(argument: &'static str, terms: &[usize]) -> Result<usize> {
    terms.iter().try_fold(0usize, |a, &b| a.checked_add(b)).ok_or(Error::Overflow { argument })
}
