//! Appending: new tokens to sinks and window, and whole groups to pages once the window is full.

use super::copy::Place;
use super::sequences::{Progress, Sequence};
use super::{Cache, CenterMode, SequenceId};
use crate::backend::{Run, Stream};
use crate::cpu::median::median;
use crate::cuda;
use crate::error::{Error, Result};
use crate::format::PageFormat;
use crate::ops::{self, Append, AppendSide, Center};
use crate::pool::PagePoolMut;
use crate::tensor::Tensor;

/// What appending does to one layer of one sequence. Of the new tokens the first go to the sinks, the others behind
/// the window; then the oldest `compress` tokens of window and new ones go to pages.
struct Plan {
    row: usize,
    before: Progress,
    /// New tokens that are sinks.
    sinks: usize,
    /// Tokens in the window before.
    window: usize,
    compress: usize,
    /// Range of the sequence's page list that is written.
    first_page: usize,
    end_page: usize,
    /// How many of these pages have to be taken from the free ones.
    fresh: usize,
    pages: Vec<Target>,
}

/// A page to write.
#[derive(Clone, Copy)]
struct Target {
    page: u32,
    /// The page that the sequence holds in its place; `page` itself if it is written where it is.
    replaces: Option<u32>,
}

impl Plan {
    /// Tokens compressed out of the window; the rest come straight from the new tokens.
    fn old_tokens(&self) -> usize {
        self.compress.min(self.window)
    }

    fn fresh_pages(&self) -> impl Iterator<Item = u32> {
        self.pages.iter().filter(|target| target.replaces != Some(target.page)).map(|target| target.page)
    }

    /// Range of the new tokens that is compressed.
    fn new_tokens(&self) -> (usize, usize) {
        (self.sinks, self.sinks + self.compress - self.old_tokens())
    }
}

impl Cache {
    pub(super) fn append_tokens(
        &mut self,
        stream: Stream,
        layer: usize,
        sequences: &[SequenceId],
        k: Tensor<'_>,
        v: Tensor<'_>,
    ) -> Result<()> {
        let appended = self.append_checked(stream, layer, sequences, k, v);
        let sent = self.staging.finish(stream);
        appended.and(sent)
    }

    fn append_checked(
        &mut self,
        stream: Stream,
        layer: usize,
        sequences: &[SequenceId],
        k: Tensor<'_>,
        v: Tensor<'_>,
    ) -> Result<()> {
        stream.check(&self.context)?;
        self.check_layer(layer)?;
        self.sequences.check(sequences)?;
        self.check_tokens("k", &k, sequences.len(), self.config.k)?;
        self.check_tokens("v", &v, sequences.len(), self.config.v)?;
        if v.shape.tokens != k.shape.tokens {
            return Err(Error::invalid("v.tokens", v.shape.tokens, format!("k.tokens ({})", k.shape.tokens)));
        }

        let mut plans = sequences
            .iter()
            .map(|&id| Ok(self.plan(layer, self.sequences.get("sequences", id)?, k.shape.tokens)))
            .collect::<Result<Vec<_>>>()?;
        let needed = plans.iter().map(|plan| plan.fresh).sum();
        if needed > self.pages.free() {
            return Err(Error::CacheFull { what: "pages", needed, free: self.pages.free() });
        }
        for (plan, &id) in plans.iter_mut().zip(sequences) {
            self.take_pages(plan, id)?;
        }
        // What is written here is free or lies past what any sequence holds: until `commit` nothing has changed.
        let compressed = plans.iter().enumerate().try_for_each(|(b, plan)| match plan.compress {
            0 => Ok(()),
            _ => self.compress(stream, layer, plan, b, k, v),
        });
        if let Err(error) = compressed {
            for page in plans.iter().flat_map(Plan::fresh_pages) {
                self.pages.release(page);
            }
            return Err(error);
        }
        self.store(stream, layer, &plans, [k, v])?;
        plans.iter().zip(sequences).try_for_each(|(plan, &id)| self.commit(layer, plan, id, k.shape.tokens))
    }

    fn check_tokens(
        &self,
        argument: &'static str,
        x: &Tensor<'_>,
        sequences: usize,
        format: PageFormat,
    ) -> Result<()> {
        let (s, heads, dim) = (x.shape, self.config.kv_heads, format.head_dim());
        let dtype = self.config.dtype(format);
        // Positions are i32 in the ops.
        let fits = s.batch == sequences && s.tokens <= i32::MAX as usize && s.heads == heads && s.dim == dim;
        if !fits || x.dtype != dtype {
            let found = format!("[{}, {}, {}, {}] {}", s.batch, s.tokens, s.heads, s.dim, x.dtype);
            let allowed = format!("[{sequences}, 0 to {}, {heads}, {dim}] {}", i32::MAX, dtype);
            return Err(Error::invalid(argument, found, allowed));
        }
        match self.context.run() {
            Run::Cpu(_) => x.rows::<u16>(argument).map(|_| ()),
            Run::Cuda(device) => device.check_tensor(argument, x),
        }
    }

    fn plan(&self, layer: usize, sequence: &Sequence, tokens: usize) -> Plan {
        let config = &self.config;
        let before = sequence.layers[layer];
        let sinks = (config.sinks - before.sinks(config)).min(tokens);
        let window = before.window(config);
        let dense = window + tokens - sinks;
        let compress = dense.saturating_sub(config.window) / config.group * config.group;

        let page_tokens = config.k.page_tokens();
        let first = before.compressed / page_tokens;
        let end = (before.compressed + compress).div_ceil(page_tokens);
        // A page that another sequence holds too is replaced by a copy. The newest one is shared after a fork of a
        // truncated sequence, later ones if it was forked while this layer lagged behind others.
        let held = |i: usize| sequence.pages.get(i).copied();
        let writable = |i: &usize| held(*i).is_some_and(|page| !self.pages.is_shared(page));
        let fresh = if compress == 0 { 0 } else { (first..end).filter(|i| !writable(i)).count() };
        Plan {
            row: sequence.row,
            before,
            sinks,
            window,
            compress,
            first_page: first,
            end_page: end,
            fresh,
            pages: Vec::new(),
        }
    }

    /// Gives a plan the pages it writes. There are enough.
    fn take_pages(&mut self, plan: &mut Plan, id: SequenceId) -> Result<()> {
        if plan.compress == 0 {
            return Ok(());
        }
        let sequence = self.sequences.get("sequences", id)?;
        for i in plan.first_page..plan.end_page {
            let held = sequence.pages.get(i).copied();
            plan.pages.push(match held {
                Some(page) if !self.pages.is_shared(page) => Target { page, replaces: held },
                _ => Target { page: self.pages.take(), replaces: held },
            });
        }
        Ok(())
    }

    /// Writes the pages of one sequence.
    fn compress(
        &mut self,
        stream: Stream,
        layer: usize,
        plan: &Plan,
        b: usize,
        k: Tensor<'_>,
        v: Tensor<'_>,
    ) -> Result<()> {
        let bytes = self.geometry.page;
        for target in &plan.pages {
            let Some(from) = target.replaces.filter(|&from| from != target.page) else { continue };
            // Other layers may have tokens in any page that the sequence holds.
            for layer in 0..self.config.layers {
                let first = layer * self.geometry.layer_pages;
                self.pool.copy_within(
                    stream,
                    first + from as usize * bytes,
                    first + target.page as usize * bytes,
                    bytes,
                )?;
            }
        }

        let page_tokens = self.config.k.page_tokens();
        let slots = &mut self.scratch.slots;
        slots.clear();
        slots.extend((plan.before.compressed..plan.before.compressed + plan.compress).map(|t| {
            let page = plan.pages[t / page_tokens - plan.first_page].page;
            (page as usize * page_tokens + t % page_tokens) as i64
        }));
        let old = plan.old_tokens();
        let (from, to) = plan.new_tokens();
        let k_parts =
            [self.windows.k.tensor(layer)?.tokens("k", plan.row, 0, old)?, k.tokens("k", b, from, to)?];
        let v_parts =
            [self.windows.v.tensor(layer)?.tokens("v", plan.row, 0, old)?, v.tokens("v", b, from, to)?];
        let center_at = self.geometry.center_at(&self.config, layer, plan.row);
        if self.config.center == CenterMode::Median && plan.before.compressed == 0 {
            match self.context.run() {
                Run::Cpu(cpu) => {
                    let center = median(cpu.threads, "k", &k_parts)?;
                    let bytes: Vec<u8> = center.into_iter().flat_map(f32::to_ne_bytes).collect();
                    self.centers.write(center_at, &bytes)?;
                }
                Run::Cuda(device) => {
                    let out = self.centers.mem_mut().skip("center", center_at)?;
                    cuda::median(device, stream, &k_parts, out)?;
                }
            }
        }
        let center = match self.config.center {
            CenterMode::None => None,
            CenterMode::Median => {
                Some(Center { values: self.centers.mem().skip("center", center_at)?, batch: 1 })
            }
        };
        let slots = [&slots[..old], &slots[old..]];
        for ((k, v), slots) in k_parts.into_iter().zip(v_parts).zip(slots) {
            if slots.is_empty() {
                continue;
            }
            let mem = self.pool.mem_mut().skip("pages", layer * self.geometry.layer_pages)?;
            let (k_pool, v_pool) = PagePoolMut::pair("pages", mem, self.geometry.layouts)?;
            let args = Append {
                k: Some(AppendSide { x: k, pool: k_pool, weights: None, center }),
                v: Some(AppendSide { x: v, pool: v_pool, weights: None, center: None }),
                slots: self.staging.send(stream, slots)?,
                sequence: None,
            };
            ops::append(&self.context, stream, args)?;
        }
        Ok(())
    }

    /// Moves what stays dense to where `plans` wants it: sequence b of the batch has plan b.
    fn store(&mut self, stream: Stream, layer: usize, plans: &[Plan], new: [Tensor<'_>; 2]) -> Result<()> {
        let tokens = new[0].shape.tokens;
        let mut to_sinks = Vec::new();
        let mut to_window = Vec::new();
        for (b, plan) in plans.iter().enumerate() {
            let old = plan.old_tokens();
            if old > 0 {
                self.windows.drop_front(stream, layer, plan.row, old, plan.window)?;
            }
            let place = |from_token, to_token, tokens| Place {
                from_row: b,
                from_token,
                to_row: plan.row,
                to_token,
                tokens,
            };
            if plan.sinks > 0 {
                to_sinks.push(place(0, plan.before.sinks(&self.config), plan.sinks));
            }
            let (_, rest) = plan.new_tokens();
            if rest < tokens {
                to_window.push(place(rest, plan.window - old, tokens - rest));
            }
        }
        let Self { context, staging, sinks, windows, .. } = self;
        sinks.store(context, staging, stream, layer, new, &to_sinks)?;
        windows.store(context, staging, stream, layer, new, &to_window)
    }

    /// Makes one sequence hold what `plan` says. Everything is written.
    fn commit(&mut self, layer: usize, plan: &Plan, id: SequenceId, tokens: usize) -> Result<()> {
        let sequence = self.sequences.get_mut("sequences", id)?;
        for (i, target) in (plan.first_page..).zip(&plan.pages) {
            match target.replaces {
                None => sequence.pages.push(target.page),
                Some(old) if old == target.page => {}
                Some(old) => {
                    sequence.pages[i] = target.page;
                    self.pages.release(old);
                }
            }
        }
        let progress = &mut sequence.layers[layer];
        progress.tokens += tokens;
        progress.compressed += plan.compress;
        Ok(())
    }
}
