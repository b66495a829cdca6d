//! Appending: new tokens to sinks and window, and whole groups to pages once the window is full.

use super::copy::Place;
use super::sequences::{Progress, Recent, Sequence};
use super::{Cache, CacheQueries, SequenceId};
use crate::backend::{Run, Stream};
use crate::cpu::dense::AnyRows;
use crate::dtype::DType;
use crate::error::{Error, Result};
use crate::format::PageFormat;
use crate::ops::check;
use crate::strategy::Strategy;
use crate::tensor::Tensor;

/// What appending does to one layer of one sequence. Of the new tokens the first go to the sinks, the others behind
/// the window; then the oldest `compress` tokens of window and new ones go to pages.
pub(super) struct Plan {
    pub(super) row: usize,
    pub(super) before: Progress,
    /// Queries remembered after it.
    pub(super) recent: Recent,
    /// New tokens that are sinks.
    sinks: usize,
    /// Tokens in the window before.
    window: usize,
    pub(super) compress: usize,
    /// Range of the sequence's page list that is written.
    pub(super) first_page: usize,
    end_page: usize,
    /// How many of these pages have to be taken from the free ones.
    fresh: usize,
    pub(super) pages: Vec<Target>,
}

/// A page to write.
#[derive(Clone, Copy)]
pub(super) struct Target {
    pub(super) page: u32,
    /// The page that the sequence holds in its place; `page` itself if it is written where it is.
    pub(super) replaces: Option<u32>,
}

impl Plan {
    /// Tokens compressed out of the window; the rest come straight from the new tokens.
    pub(super) fn old_tokens(&self) -> usize {
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
        [k, v]: [Tensor<'_>; 2],
        queries: Option<CacheQueries<'_>>,
    ) -> Result<()> {
        let appended = self.append_checked(stream, layer, sequences, [k, v], queries);
        let sent = self.staging.finish(stream);
        appended.and(sent)
    }

    fn append_checked(
        &mut self,
        stream: Stream,
        layer: usize,
        sequences: &[SequenceId],
        [k, v]: [Tensor<'_>; 2],
        queries: Option<CacheQueries<'_>>,
    ) -> Result<()> {
        stream.check(&self.context)?;
        self.check_layer(layer)?;
        self.sequences.check(sequences)?;
        self.check_tokens("k", &k, sequences.len(), self.config.k)?;
        self.check_tokens("v", &v, sequences.len(), self.config.v)?;
        if v.shape.tokens != k.shape.tokens {
            return Err(Error::invalid("v.tokens", v.shape.tokens, format!("k.tokens ({})", k.shape.tokens)));
        }
        if let Some(queries) = &queries {
            self.check_queries(queries, sequences.len(), k.shape.tokens)?;
        }
        // What no strategy needs is not remembered.
        let queries = queries.filter(|_| self.config.needs_queries());

        let mut plans = sequences
            .iter()
            .map(|&id| {
                Ok(self.plan(layer, self.sequences.get("sequences", id)?, k.shape.tokens, queries.as_ref()))
            })
            .collect::<Result<Vec<_>>>()?;
        plans.iter().try_for_each(|plan| self.check_recent(plan))?;
        let needed = plans.iter().map(|plan| plan.fresh).sum();
        if needed > self.pages.free() {
            return Err(Error::CacheFull { what: "pages", needed, free: self.pages.free() });
        }
        for (plan, &id) in plans.iter_mut().zip(sequences) {
            self.take_pages(plan, id)?;
        }
        if let Some(CacheQueries { q, lse, .. }) = queries {
            let newest: Vec<_> = plans.iter().map(|plan| (plan.row, plan.recent.end())).collect();
            let Self { context, staging, scores, .. } = self;
            scores.observe(context, staging, stream, layer, (q, lse), &newest)?;
        }
        // What is written here is free or lies past what any sequence holds: until `commit` nothing has changed.
        let compressed = plans.iter().enumerate().try_for_each(|(b, plan)| match plan.compress {
            0 => Ok(()),
            _ => {
                let (from, to) = plan.new_tokens();
                self.compress(stream, layer, plan, [k.tokens("k", b, from, to)?, v.tokens("v", b, from, to)?])
            }
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

    fn check_queries(&self, queries: &CacheQueries<'_>, sequences: usize, tokens: usize) -> Result<()> {
        let (config, s) = (&self.config, queries.q.shape);
        check::dtype("queries.q.dtype", queries.q.dtype, &[DType::F16, DType::Bf16, DType::F32])?;
        check::same("queries.q.batch", s.batch, sequences, "sequences")?;
        check::same("queries.q.heads", s.heads, config.q_heads, "q_heads of the cache")?;
        check::same("queries.q.dim", s.dim, config.k.head_dim(), "head_dim of the keys")?;
        if s.tokens == 0 || s.tokens > tokens {
            let allowed = format!("1 to {tokens}, the tokens that are appended");
            return Err(Error::invalid("queries.q.tokens", s.tokens, allowed));
        }
        if let Some(lse) = &queries.lse {
            check::dtype("queries.lse.dtype", lse.dtype, &[DType::F32])?;
            check::same("queries.lse.batch", lse.shape.batch, sequences, "sequences")?;
            check::same("queries.lse.tokens", lse.shape.tokens, s.tokens, "tokens of queries.q")?;
            check::same("queries.lse.heads", lse.shape.heads, config.q_heads, "q_heads of the cache")?;
            check::same("queries.lse.dim", lse.shape.dim, 1, "one value per query and head")?;
        } else if config.v_strategy.needs_queries() {
            return Err(Error::invalid("queries.lse", "absent", format!("given for {}", config.v_strategy)));
        }
        let tensors = [Some(("queries.q", queries.q)), queries.lse.map(|lse| ("queries.lse", lse))];
        for (argument, tensor) in tensors.into_iter().flatten() {
            match self.context.run() {
                Run::Cpu(_) => AnyRows::new(argument, &tensor).map(|_| ())?,
                Run::Cuda(device) => device.check_tensor(argument, &tensor)?,
            }
        }
        check::scalars(queries.scale, queries.softcap, queries.sliding_window)
    }

    /// Refuses a compression whose scores need queries where none are remembered.
    fn check_recent(&self, plan: &Plan) -> Result<()> {
        let fixed = |strategy: Strategy| strategy.is_structured() && plan.before.compressed > 0;
        let strategies = [self.config.k_strategy, self.config.v_strategy];
        let needs = strategies.into_iter().find(|s| s.needs_queries() && !fixed(*s));
        match needs.filter(|_| plan.compress > 0 && plan.recent.count() == 0) {
            Some(strategy) => Err(Error::invalid(
                "queries",
                "absent",
                format!("the newest queries, with these tokens or by an attend before, for {strategy}"),
            )),
            None => Ok(()),
        }
    }

    fn plan(
        &self,
        layer: usize,
        sequence: &Sequence,
        tokens: usize,
        queries: Option<&CacheQueries<'_>>,
    ) -> Plan {
        let config = &self.config;
        let before = sequence.layers[layer];
        let mut recent = before.recent;
        if let Some(queries) = queries {
            recent.add(before.tokens + tokens, queries.q.shape.tokens, queries.scoring());
        }
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
            recent,
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
        progress.recent = plan.recent;
        Ok(())
    }
}
