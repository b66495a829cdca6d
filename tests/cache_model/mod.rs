//! A cache that keeps everything dense and derives the rest: what `Cache` must agree with.
#![allow(dead_code, unreachable_pub, unused_imports, clippy::panic, clippy::unwrap_used)]

mod check;
mod layer;
mod pair;
mod snapshot;

pub use pair::{Pair, new_cache, pairs, part, random_tokens, small_config};
pub use snapshot::seal;

use crate::common::Dense;
use layer::{Layer, formats, gather_queries};
use mustafar::{CacheBytes, CacheConfig, Context, Error, PageFormat, SequenceId};
use std::collections::{BTreeMap, BTreeSet};

#[derive(Debug, Clone)]
pub struct Sequence {
    pub layers: Vec<Layer>,
    /// Names of the pages it holds, never used twice.
    pub pages: Vec<u64>,
}

/// The sequences that should be alive.
#[derive(Debug)]
pub struct Model {
    pub config: CacheConfig,
    /// What the cache was made for.
    pub context: Context,
    pub live: BTreeMap<SequenceId, Sequence>,
    next_page: u64,
}

impl Model {
    pub fn new(config: &CacheConfig) -> Self {
        let context = Context::cpu(1).unwrap();
        Self { config: config.clone(), context, live: BTreeMap::new(), next_page: 0 }
    }

    pub fn create(&mut self, id: SequenceId) {
        let layers = vec![Layer::default(); self.config.layers];
        assert!(self.live.insert(id, Sequence { layers, pages: Vec::new() }).is_none(), "{id:?} was alive");
    }

    pub fn pages_in_use(&self) -> usize {
        self.live.values().flat_map(|s| &s.pages).collect::<BTreeSet<_>>().len()
    }

    pub fn pages_free(&self) -> usize {
        self.config.max_tokens.div_ceil(self.config.k.page_tokens()) - self.pages_in_use()
    }

    fn is_shared(&self, page: u64) -> bool {
        self.live.values().filter(|s| s.pages.contains(&page)).count() > 1
    }

    /// Appends to one layer of some sequences; or says how many pages are missing and changes nothing.
    pub fn append(&mut self, layer: usize, ids: &[SequenceId], k: &Dense, v: &Dense) -> Result<(), Error> {
        self.append_with_queries(layer, ids, k, v, None)
    }

    /// As [`Model::append`]; `queries` are q and lse of the newest tokens.
    pub fn append_with_queries(
        &mut self,
        layer: usize,
        ids: &[SequenceId],
        k: &Dense,
        v: &Dense,
        queries: Option<(&Dense, &Dense)>,
    ) -> Result<(), Error> {
        let config = self.config.clone();
        let page_tokens = config.k.page_tokens();
        let mut after = Vec::new();
        for (b, id) in ids.iter().enumerate() {
            let mut l = self.live[id].layers[layer].clone();
            for t in 0..k.shape.tokens {
                l.k.push((0..config.kv_heads).map(|h| k.row_bits(b, t, h)).collect());
                l.v.push((0..config.kv_heads).map(|h| v.row_bits(b, t, h)).collect());
            }
            if let Some((q, lse)) = queries {
                l.observe(&config, gather_queries(&config, b, q, lse, l.k.len()), (None, None, None));
            }
            let due = l.due(&config);
            let written = if due == 0 {
                0..0
            } else {
                l.compressed / page_tokens..(l.compressed + due).div_ceil(page_tokens)
            };
            if due > 0 {
                l.compress(&config, layer, due);
            }
            let held = &self.live[id].pages;
            let new: Vec<usize> =
                written.filter(|&i| held.get(i).is_none_or(|&p| self.is_shared(p))).collect();
            after.push((l, new));
        }
        let (needed, free) = (after.iter().map(|(_, new)| new.len()).sum(), self.pages_free());
        if needed > free {
            return Err(Error::CacheFull { what: "pages", needed, free });
        }
        for (id, (l, new)) in ids.iter().zip(after) {
            let sequence = self.live.get_mut(id).unwrap();
            sequence.layers[layer] = l;
            for i in new {
                sequence.pages.resize(sequence.pages.len().max(i + 1), u64::MAX);
                sequence.pages[i] = self.next_page;
                self.next_page += 1;
            }
            assert!(!sequence.pages.contains(&u64::MAX));
        }
        Ok(())
    }

    pub fn fork(&mut self, from: SequenceId, to: SequenceId) {
        let copy = self.live[&from].clone();
        assert!(self.live.insert(to, copy).is_none(), "{to:?} was alive");
    }

    pub fn truncate(&mut self, id: SequenceId, len: usize) {
        let config = self.config.clone();
        let sequence = self.live.get_mut(&id).unwrap();
        for l in &mut sequence.layers {
            l.k.truncate(len);
            l.v.truncate(len);
            l.compressed = l.compressed.min(len.saturating_sub(config.sinks));
            l.rows.truncate(l.compressed);
            l.queries.retain(|query| query[0].position < len);
            l.end = l.end.min(len);
            if l.compressed == 0 {
                l.center = None;
                l.fixed = [None, None];
            }
        }
        let longest = sequence.layers.iter().map(|l| l.compressed).max().unwrap();
        sequence.pages.truncate(longest.div_ceil(config.k.page_tokens()));
    }

    /// The restored copy of a sequence holds pages of its own.
    pub fn restore(&mut self, from: SequenceId, to: SequenceId) {
        self.fork(from, to);
        for page in &mut self.live.get_mut(&to).unwrap().pages {
            *page = self.next_page;
            self.next_page += 1;
        }
    }

    /// Bytes of one dense token of a layer, and of one page of all heads and layers.
    pub fn sizes(&self) -> (usize, usize) {
        let c = &self.config;
        let values = |f: PageFormat| match f.value_type().bytes() {
            1 => 2 * f.page_tokens() + f.capacity(),
            _ => 2 * f.capacity(),
        };
        let page = |f: PageFormat| {
            let offsets = if f.keep().is_none() { (f.page_tokens() * 2 + 2).next_multiple_of(16) } else { 0 };
            f.page_tokens() * f.head_dim() / 8 + offsets + values(f)
        };
        let mut pages = 0;
        for (layer, head) in (0..c.layers).flat_map(|l| (0..c.kv_heads).map(move |h| (l, h))) {
            let (k, v) = formats(c, layer, head);
            pages += page(k) + page(v);
        }
        (c.kv_heads * (c.k.head_dim() + c.v.head_dim()) * 2, pages)
    }

    pub fn sequence_bytes(&self, id: SequenceId) -> CacheBytes {
        let (token, page) = self.sizes();
        let sequence = &self.live[&id];
        let tokens: usize = sequence.layers.iter().map(|l| l.k.len()).sum();
        let compressed: usize = sequence.layers.iter().map(|l| l.compressed).sum();
        CacheBytes {
            dense_equivalent: tokens * token,
            pages: sequence.pages.len() * page,
            window: (tokens - compressed) * token,
            allocated: 0,
        }
    }
}
